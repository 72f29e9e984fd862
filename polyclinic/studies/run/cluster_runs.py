"""Execution of method runs on the machines of a Ray cluster, each in a worker process.

A method run depends on its own files only, so the machines and their number do not change the results. The run folder
must be in a folder that all machines share. Workers read the study and its data themselves, and send events as JSON;
this process writes the journal, which is one hash chain. If a worker or its machine dies, its method run continues on
another from its checkpoint.
"""

import asyncio
import json
import socket
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from polyclinic.engines.ray.cluster import ClusterError, installation, ray, require_same_installation, slots
from polyclinic.errors import PolyclinicError
from polyclinic.studies.run.events import Event
from polyclinic.studies.run.parallel_runs import DEATHS, MethodRunFailed, Work
from polyclinic.studies.run.run_directory import Note, Stopped

START = 600.0
"""Seconds without any worker after which the run ends."""
SHARED = "machines"
"""A file in the run folder, by which workers recognize it."""

Make: TypeAlias = Callable[[str], tuple[Work[Any], dict[str, Any]]]
"""Builds, from the recipe, the function that executes a method run, and all method runs by name."""


class Mailbox:
    """Messages from the workers to the process of the run: an actor of Ray."""

    def __init__(self) -> None:
        self._messages: asyncio.Queue[str] = asyncio.Queue()
        self._answers: dict[int, asyncio.Future[int]] = {}
        self._asked = 0

    async def tell(self, message: str) -> None:
        """Leave a message."""
        await self._messages.put(message)

    async def ask(self, message: str) -> int:
        """Leave a message, and wait for the answer."""
        self._asked += 1
        answer = self._answers[self._asked] = asyncio.get_running_loop().create_future()
        await self._messages.put(json.dumps({"ask": self._asked, **json.loads(message)}))
        value: int = await answer
        return value

    async def take(self) -> list[str]:
        """Wait for messages, and take all of them."""
        return [await self._messages.get(), *await self.rest()]

    async def rest(self) -> list[str]:
        """Take the messages that are there."""
        return [self._messages.get_nowait() for _ in range(self._messages.qsize())]

    async def answer(self, number: int, value: int) -> None:
        """Answer the question ``number``."""
        self._answers.pop(number).set_result(value)


class Runner:
    """A worker process that executes one method run after the other: an actor of Ray."""

    def __init__(self, make: Make, recipe: str, folder: str, mailbox: Any) -> None:
        torch.set_num_threads(1)
        self._make, self._recipe, self._folder, self._mailbox = make, recipe, Path(folder), mailbox
        self._work: Work[Any] | None = None
        self._jobs: dict[str, Any] = {}

    def prepare(self, mark: str) -> str:
        """Read the study and its data; return the machine, its installation, and the reason why it cannot as JSON."""
        told = {"node": socket.gethostname(), "installation": installation(), "problem": ""}
        file = self._folder / SHARED
        if not file.is_file() or file.read_text(encoding="ascii") != mark:
            told["problem"] = (
                f"the machine {told['node']} does not see the run folder {self._folder}: choose with --out a folder "
                "that all machines of the cluster share"
            )
            return json.dumps(told)
        try:
            self._work, self._jobs = self._make(self._recipe)
        except PolyclinicError as error:
            told["problem"] = f"on the machine {told['node']}: {error}"
        return json.dumps(told)

    def run(self, name: str) -> str:
        """Execute the method run ``name`` from its last checkpoint; return its outcome as JSON."""
        package = ray()

        def note(event: str, details: dict[str, Any]) -> int:
            return int(package.get(self._mailbox.ask.remote(json.dumps({"note": [event, details]}))))

        assert self._work is not None
        try:
            for event in self._work(self._jobs[name], note):
                package.get(self._mailbox.tell.remote(json.dumps({"event": asdict(event)})))
        except Stopped as error:
            return json.dumps(["stopped", str(error)])
        except Exception as error:
            ours = isinstance(error, PolyclinicError)
            return json.dumps(["refused", str(error)] if ours else ["failed", traceback.format_exc()])
        return json.dumps(["done", ""])


@dataclass
class _Running:
    """A worker: while it prepares, and while it executes a method run, ``reference`` is the result."""

    actor: Any
    reference: Any
    job: tuple[Any, int] | None = None
    ready: bool = False


class _Workers:
    """The workers of one run."""

    def __init__(self, make: Make, recipe: str, folder: Path, gpus: float, mark: str) -> None:
        self._remote = ray().remote(num_cpus=1, num_gpus=gpus, max_restarts=0)(Runner)
        self.mailbox = ray().remote(num_cpus=0, max_concurrency=1000)(Mailbox).remote()
        self._given, self._mark = (make, recipe, str(folder), self.mailbox), mark
        self.all: list[_Running] = []

    def start(self) -> None:
        """Start one more worker."""
        actor = self._remote.remote(*self._given)
        self.all.append(_Running(actor, actor.prepare.remote(self._mark)))

    def remove(self, worker: _Running) -> None:
        """Remove a worker that died."""
        self.all.remove(worker)
        with suppress(Exception):
            ray().kill(worker.actor)

    def close(self) -> None:
        """End all workers."""
        for actor in (*(worker.actor for worker in self.all), self.mailbox):
            with suppress(Exception):  # the cluster may be gone
                ray().kill(actor)


def on_cluster(
    jobs: Sequence[Any],
    make: Make,
    recipe: str,
    folder: Path,
    note: Note,
    workers: int | None = None,
    gpus: float = 0.0,
) -> Iterator[Event]:
    """Execute the method runs on the cluster to which this process is connected, and yield their events.

    Args:
        jobs: The method runs.
        make: A function of an importable module, called by every worker with ``recipe``.
        recipe: Text.
        folder: The run folder, which all machines share.
        note: Writes to the journal of the run.
        workers: Number of workers; by default as many as the cluster can run at once.
        gpus: GPUs of each worker; a fraction shares one GPU between workers.

    Raises:
        ClusterError: If a machine does not share the folder, has another installation or other data, or no worker can
            start.
        MethodRunFailed: If a method run fails with an error of Polyclinic, or its worker dies ``DEATHS`` times.
        Stopped: If the run was asked to stop, after every method run has completed its round.
        RuntimeError: If it fails with any other error. The message contains the traceback.
    """
    package, waiting, stopped = ray(), deque((job, 0) for job in jobs), ""
    deaths_at_start, mark = 0, f"{socket.gethostname()} {package.get_runtime_context().get_job_id()}"
    (folder / SHARED).write_text(mark, encoding="ascii")
    own = _Workers(make, recipe, folder, gpus, mark)
    letters = own.mailbox.take.remote()
    try:
        for _ in range(min(workers or slots(1, gpus), len(waiting))):
            own.start()
        while waiting or any(worker.job for worker in own.all):
            for worker in own.all:
                if worker.ready and worker.job is None and waiting:
                    worker.job = waiting.popleft()
                    worker.reference = worker.actor.run.remote(worker.job[0].name)
            busy = {w.reference: w for w in own.all if w.job or not w.ready}
            patience = None if any(worker.ready for worker in own.all) else START
            ready, _ = package.wait([letters, *busy], num_returns=1, timeout=patience)
            if not ready:
                raise ClusterError(f"no worker could start within {START:g} s: is the cluster busy?")
            if ready[0] == letters:
                yield from _events(package.get(letters), own.mailbox, note)
                letters = own.mailbox.take.remote()
                continue
            worker = busy[ready[0]]
            try:
                told = json.loads(package.get(worker.reference))
            except package.exceptions.RayTaskError as error:
                raise RuntimeError(str(error)) from error
            except package.exceptions.RayError as error:
                own.remove(worker)
                deaths_at_start += not worker.ready
                if deaths_at_start == DEATHS:
                    raise ClusterError(f"{DEATHS} workers died while they started: {error}") from error
                own.start()
                if worker.job:
                    waiting.appendleft(_died(worker.job, error))
                continue
            if not worker.ready:
                _require_usable(told)
                worker.ready = True
                continue
            worker.job = None
            yield from _events(package.get(own.mailbox.rest.remote()), own.mailbox, note)
            kind, text = told
            if kind == "stopped":
                waiting.clear()
                stopped = text
            elif kind == "refused":
                raise MethodRunFailed(text)
            elif kind == "failed":
                raise RuntimeError(text)
        package.get(own.mailbox.tell.remote("{}"))  # ends the outstanding call, which may have the last events
        yield from _events(package.get(letters), own.mailbox, note)
        yield from _events(package.get(own.mailbox.rest.remote()), own.mailbox, note)
        if stopped:
            raise Stopped(stopped)
    finally:
        own.close()
        (folder / SHARED).unlink(missing_ok=True)


def _events(messages: Sequence[str], mailbox: Any, note: Note) -> Iterator[Event]:
    """Write the notes among ``messages`` to the journal, and yield the events."""
    for message in messages:
        value = json.loads(message)
        if "event" in value:
            yield Event(**{**value["event"], **{k: tuple(value["event"][k]) for k in ("notes", "external")}})
        elif "ask" in value:
            mailbox.answer.remote(value["ask"], note(*value["note"]))


def _died(job: tuple[Any, int], error: Exception) -> tuple[Any, int]:
    """Return the method run with one more death of its worker.

    Raises:
        MethodRunFailed: If there were ``DEATHS``.
    """
    if job[1] + 1 == DEATHS:
        raise MethodRunFailed(
            f"the worker of a method run died {DEATHS} times ({type(error).__name__}); is there enough memory? "
            "--resume continues from its last round"
        )
    return job[0], job[1] + 1


def _require_usable(told: dict[str, str]) -> None:
    """Require that a worker can execute method runs.

    Raises:
        ClusterError: If it cannot. The message gives the reason and the machine.
    """
    require_same_installation(told["installation"], told["node"])
    if told["problem"]:
        raise ClusterError(told["problem"])
