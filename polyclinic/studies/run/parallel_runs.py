"""Parallel execution of method runs, one process each, if a study has more of them than the machine has cores.

A method run depends on its own files only, so the order and the number of processes do not change the results. Children
are forked, so the data are not copied. They send events as JSON over a pipe; this process writes the journal, which is
one hash chain. A child that dies is restarted from its checkpoint.
"""

import ctypes
import json
import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch

from polyclinic.errors import RunError
from polyclinic.studies.run.events import Event
from polyclinic.studies.run.run_directory import Note, Stopped

DEATHS = 3
Job = TypeVar("Job")
Work = Callable[[Job, Note], Iterator[Event]]


class MethodRunFailed(RunError, ValueError):
    """A method run that failed. The message is that of its error."""


def in_turn(jobs: Sequence[Job], work: Work[Job], note: Note) -> Iterator[Event]:
    """Execute the method runs one after the other in this process."""
    for job in jobs:
        yield from work(job, note)


def side_by_side(jobs: Sequence[Job], work: Work[Job], note: Note, workers: int) -> Iterator[Event]:
    """Execute up to ``workers`` method runs at once, and yield their events in the order in which they happen.

    Raises:
        MethodRunFailed: If a method run fails with an error of Polyclinic, or its process dies ``DEATHS`` times.
        Stopped: If the run was asked to stop, after every method run has completed its round.
        RuntimeError: If it fails with any other error. The message contains the traceback.
    """
    waiting = deque((job, 0) for job in jobs)
    running: dict[Connection, tuple[BaseProcess, Job, int]] = {}
    stopped = ""
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                job, deaths = waiting.popleft()
                line, process = _begin(job, work, list(running))
                running[line] = (process, job, deaths)
            for ready in wait(list(running)):
                assert isinstance(ready, Connection)
                line = ready
                process, job, deaths = running[line]
                try:
                    kind, value = json.loads(line.recv_bytes())
                except (EOFError, OSError):
                    kind, value = "died", None
                if kind == "event":
                    yield Event(**{**value, "notes": tuple(value["notes"])})
                    continue
                if kind == "note":
                    line.send_bytes(json.dumps(note(*value)).encode())
                    continue
                del running[line]
                line.close()
                process.join()
                if kind == "died":
                    if deaths + 1 == DEATHS:
                        raise MethodRunFailed(
                            f"the process of a method run died {DEATHS} times; is there enough memory? "
                            "--resume continues from its last round"
                        )
                    waiting.appendleft((job, deaths + 1))
                elif kind == "stopped":
                    waiting.clear()
                    stopped = value
                elif kind == "refused":
                    raise MethodRunFailed(value)
                elif kind == "failed":
                    raise RuntimeError(value)
        if stopped:
            raise Stopped(stopped)
    finally:
        for line, (process, _, _) in running.items():
            process.kill()
            process.join()
            line.close()


def possible() -> bool:
    """Return whether this process can be forked."""
    return "fork" in multiprocessing.get_all_start_methods() and not torch.cuda.is_initialized()


def warm_up() -> None:
    """Make PyTorch import what it loads at the first per-example gradient, so that children do not repeat it."""
    torch.func.grad(torch.sum)(torch.zeros(1))


def _begin(job: Job, work: Work[Job], others: Sequence[Connection]) -> tuple[Connection, BaseProcess]:
    context: Any = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(theirs, [ours, *others], job, work, os.getpid()))
    process.start()
    theirs.close()
    return ours, process


def _child(line: Connection, inherited: Sequence[Connection], job: Job, work: Work[Job], parent: int) -> None:
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
        tell("done", None)
    except (EOFError, BrokenPipeError):
        os._exit(1)
    except Stopped as error:
        tell("stopped", str(error))
    except Exception as error:
        ours = type(error).__module__.startswith("polyclinic.")
        tell("refused" if ours else "failed", str(error) if ours else traceback.format_exc())
    os._exit(0)
