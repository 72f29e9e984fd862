"""The loop over the method runs of a study, and what executes them: this process, or child processes.

A method run depends on its own files only, so the order, the number of processes and their places do not change the
results. ``cluster_runs`` has the executor for the machines of a cluster.
"""

import ctypes
import json
import multiprocessing
import os
import signal
import traceback
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Literal, Protocol, TypeAlias

import torch

from polyclinic.errors import PolyclinicError, RunError
from polyclinic.studies.run.events import Event, Job
from polyclinic.studies.run.run_directory import Note, Stopped

DEATHS = 3
Work: TypeAlias = Callable[[Job, Note], Generator[Event, None, None]]
"""Executes one method run from its last checkpoint, and yields its events."""


class MethodRunFailed(RunError, ValueError):
    """A method run that failed. The message is that of its error."""


@dataclass(frozen=True)
class Ended:
    """The end of a method run in an executor.

    Attributes:
        job: The method run.
        outcome: ``done``; ``stopped`` because the run was asked to; ``refused`` with an error of Polyclinic; ``failed``
            with any other error; ``died`` with its process, so that it has to be repeated from its checkpoint.
        text: The message of the error with its traceback if it is none of Polyclinic; of a death, what died.
    """

    job: Job
    outcome: Literal["done", "stopped", "refused", "failed", "died"]
    text: str = ""


class Executor(Protocol):
    """Executes method runs in other processes, one or several at once."""

    def has_room(self) -> bool:
        """Return whether another method run can begin now."""

    def begin(self, job: Job) -> None:
        """Begin a method run. ``has_room`` was true."""

    def happened(self) -> Iterator[Event | Ended]:
        """Wait until something has happened, and yield the events and ends of method runs since the last call."""

    def close(self) -> None:
        """End the method runs that are being executed, and free all resources."""


def run_here(jobs: Sequence[Job], work: Work, note: Note) -> Iterator[Event]:
    """Execute ``jobs`` one after the other in this process, and yield their events. Errors are raised as they are."""
    for job in jobs:
        yield from work(job, note)


def run_jobs(jobs: Sequence[Job], executor: Executor) -> Iterator[Event]:
    """Execute ``jobs`` in other processes, and yield their events in the order in which they happen.

    The executor is closed at the end.

    Raises:
        MethodRunFailed: If a method run fails with an error of Polyclinic, or its process dies ``DEATHS`` times.
        Stopped: If the run was asked to stop, after every method run has completed its round.
        RuntimeError: If a method run fails with any other error. The message has the traceback.
    """
    waiting, running, deaths, stopped = deque(jobs), 0, Counter[str](), ""
    try:
        while waiting or running:
            while waiting and executor.has_room():
                executor.begin(waiting.popleft())
                running += 1
            for item in executor.happened():
                if isinstance(item, Event):
                    yield item
                    continue
                running -= 1
                if item.outcome == "died":
                    deaths[item.job.name] += 1
                    if deaths[item.job.name] == DEATHS:
                        raise MethodRunFailed(
                            f"{item.text} died {DEATHS} times; is there enough memory? --resume continues from its "
                            "last round"
                        )
                    waiting.appendleft(item.job)
                elif item.outcome == "stopped":
                    waiting.clear()
                    stopped = item.text
                elif item.outcome == "refused":
                    raise MethodRunFailed(item.text)
                elif item.outcome == "failed":
                    raise RuntimeError(item.text)
        if stopped:
            raise Stopped(stopped)
    finally:
        executor.close()


def ended(job: Job, error: Exception) -> Ended:
    """Return the end of a method run that raised ``error``."""
    if isinstance(error, Stopped):
        return Ended(job, "stopped", str(error))
    if isinstance(error, PolyclinicError):
        return Ended(job, "refused", str(error))
    return Ended(job, "failed", "".join(traceback.format_exception(error)))


def event_of(values: Mapping[str, Any]) -> Event:
    """Return the event with the fields ``values``, as they are after encoding as JSON and decoding."""
    return Event(**{**values, **{key: tuple(values[key]) for key in ("notes", "external")}})


class ChildProcesses:
    """Executes method runs in forked processes, so that the data are not copied.

    Children send events and entries of the journal, which is one hash chain, as JSON over a pipe to this process.

    Args:
        work: Executes a method run, in a child.
        note: Writes to the journal, in this process.
        workers: The largest number of processes at once.
    """

    def __init__(self, work: Work, note: Note, workers: int) -> None:
        self._work, self._note, self._workers = work, note, workers
        self._running: dict[Connection, tuple[BaseProcess, Job]] = {}

    def has_room(self) -> bool:
        """Return whether fewer processes run than may."""
        return len(self._running) < self._workers

    def begin(self, job: Job) -> None:
        """Start a process for a method run."""
        context: Any = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        inherited = [ours, *self._running]
        process = context.Process(target=_child, args=(theirs, inherited, job, self._work, os.getpid()))
        process.start()
        theirs.close()
        self._running[ours] = process, job

    def happened(self) -> Iterator[Event | Ended]:
        """Wait for messages of the children."""
        for line in wait(list(self._running)):
            assert isinstance(line, Connection)
            process, job = self._running[line]
            try:
                kind, value = json.loads(line.recv_bytes())
            except (EOFError, OSError):
                kind, value = "died", "the process of a method run"
            if kind == "event":
                yield event_of(value)
            elif kind == "note":
                line.send_bytes(json.dumps(self._note(*value)).encode())
            else:
                del self._running[line]
                line.close()
                process.join()
                yield Ended(job, kind, value)

    def close(self) -> None:
        """Kill the processes."""
        for line, (process, _) in self._running.items():
            process.kill()
            process.join()
            line.close()


def possible() -> bool:
    """Return whether this process can be forked."""
    return "fork" in multiprocessing.get_all_start_methods() and not torch.cuda.is_initialized()


def warm_up() -> None:
    """Make PyTorch import what it loads at the first per-example gradient, so that children do not repeat it."""
    torch.func.grad(torch.sum)(torch.zeros(1))


def _child(line: Connection, inherited: Sequence[Connection], job: Job, work: Work, parent: int) -> None:
    """Execute one method run and send its events to ``line``. Ends with its parent process."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the parent decides
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG on Linux
    if os.getppid() != parent:
        os._exit(1)
    for other in inherited:
        other.close()
    torch.set_num_threads(1)

    def tell(kind: str, value: Any) -> None:
        line.send_bytes(json.dumps([kind, value]).encode())

    def note(event: str, details: dict[str, Any]) -> int:
        tell("note", [event, details])
        return int(json.loads(line.recv_bytes()))

    try:
        for event in work(job, note):
            tell("event", asdict(event))
        tell("done", "")
    except (EOFError, BrokenPipeError):
        os._exit(1)
    except Exception as error:
        end = ended(job, error)
        tell(end.outcome, end.text)
    os._exit(0)
