"""Execution of method runs on the machines of a Ray cluster, each in a worker process.

A method run depends on its own files only, so the machines and their number do not change the results. The run folder
must be in a folder that all machines share. Workers read the study and its data themselves, and send events as JSON;
this process writes the journal, which is one hash chain. If a worker or its machine dies, its method run continues on
another from its checkpoint.
"""

import json
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch

from polyclinic.engines.ray.cluster import ClusterError, installation, ray, require_same_installation, slots
from polyclinic.engines.ray.mailbox import Mailbox, Outbox
from polyclinic.errors import PolyclinicError
from polyclinic.studies.run.events import Event, Job
from polyclinic.studies.run.executors import DEATHS, Ended, Work, ended, event_of
from polyclinic.studies.run.run_directory import Note

START = 600.0
"""Seconds without any worker after which the run ends."""
SHARED = "machines"
"""A file in the run folder, by which workers recognize it."""

Make: TypeAlias = Callable[[str], tuple[Work, dict[str, Job]]]
"""Builds, from the recipe, the function that executes a method run, and all method runs by name."""


class Runner:
    """A worker process that executes one method run after the other: an actor of Ray."""

    def __init__(self, make: Make, recipe: str, folder: str, mailbox: Any) -> None:
        torch.set_num_threads(1)
        self._make, self._recipe, self._folder, self._mailbox = make, recipe, Path(folder), mailbox
        self._work: Work | None = None
        self._jobs: dict[str, Job] = {}

    def prepare(self, mark: str) -> str:
        """Read the study and its data; return, as JSON, the machine, its installation, why it cannot, and seconds."""
        begun = time.perf_counter()
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
        return json.dumps({**told, "reading": time.perf_counter() - begun})

    def run(self, name: str, attempt: int) -> str:
        """Execute the method run ``name`` from its last checkpoint; return outcome, text and number of events as JSON.

        Args:
            attempt: A number that no other execution has; it accompanies each event.
        """
        job, events, outbox = self._jobs[name], 0, Outbox(ray(), self._mailbox)

        def note(event: str, details: dict[str, Any]) -> int:
            return outbox.ask(json.dumps({"note": [event, details]}))

        assert self._work is not None
        end = Ended(job, "done")
        try:
            for event in self._work(job, note):
                outbox.tell(json.dumps({"attempt": attempt, "event": asdict(event)}))
                events += 1
        except Exception as error:
            end = ended(job, error)
        outbox.flush()
        return json.dumps([end.outcome, end.text, events])


@dataclass
class _Worker:
    """A worker: while it prepares, and while it executes a method run, ``reference`` is the result.

    Attributes:
        attempt: The number of this execution of a method run.
        since: When it was started.
    """

    actor: Any
    reference: Any
    job: Job | None = None
    ready: bool = False
    attempt: int = 0
    since: float = field(default_factory=time.perf_counter)


class ClusterWorkers:
    """Executes method runs in worker processes of the cluster to which this process is connected.

    Args:
        make: A function of an importable module, called by every worker with ``recipe``.
        recipe: Text.
        folder: The run folder, which all machines share.
        note: Writes to the journal of the run.
        count: The number of method runs; more workers are not needed.
        workers: Number of workers; by default as many as the cluster can run at once.
        gpus: GPUs of each worker; a fraction shares one GPU between workers.
        started: Filled with the machine and seconds of each worker that has started (``time_profile.RunTimes``).
    """

    def __init__(
        self,
        make: Make,
        recipe: str,
        folder: Path,
        note: Note,
        count: int,
        workers: int | None = None,
        gpus: float = 0.0,
        started: list[dict[str, Any]] | None = None,
    ) -> None:
        self._ray, self._note, self._shared = ray(), note, folder / SHARED
        mark = f"{socket.gethostname()} {self._ray.get_runtime_context().get_job_id()}"
        self._shared.write_text(mark, encoding="ascii")
        self._remote = self._ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0)(Runner)
        here = self._ray.get_runtime_context().get_node_id()
        strategy = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(here, soft=False)
        mailbox = self._ray.remote(num_cpus=0, max_concurrency=1000, scheduling_strategy=strategy)(Mailbox)
        self._mailbox = mailbox.remote()  # on this machine, so that another one may fail
        self._given, self._mark = (make, recipe, str(folder), self._mailbox), mark
        self._letters = self._mailbox.take.remote()
        self._arrived = Counter[int]()  # events, by attempt
        self._attempts = 0
        self._deaths_at_start = 0
        self._workers: list[_Worker] = []
        self._started = [] if started is None else started
        for _ in range(min(workers or slots(1, gpus), count)):
            self._start()

    def has_room(self) -> bool:
        """Return whether a worker is ready and has no method run."""
        return any(worker.ready and worker.job is None for worker in self._workers)

    def begin(self, job: Job) -> None:
        """Give a method run to a worker."""
        worker = next(worker for worker in self._workers if worker.ready and worker.job is None)
        self._attempts += 1
        worker.job, worker.attempt = job, self._attempts
        worker.reference = worker.actor.run.remote(job.name, worker.attempt)

    def happened(self) -> Iterator[Event | Ended]:
        """Wait for messages or for a worker that has prepared, finished a method run or died.

        Raises:
            ClusterError: If a machine does not share the folder, has another installation or other data, or no worker
                can start.
        """
        busy = {w.reference: w for w in self._workers if w.job or not w.ready}
        patience = None if any(worker.ready for worker in self._workers) else START
        done, _ = self._ray.wait([self._letters, *busy], num_returns=1, timeout=patience)
        if not done:
            raise ClusterError(f"no worker could start within {START:g} s: is the cluster busy?")
        if done[0] == self._letters:
            yield from self._events()
            return
        worker = busy[done[0]]
        try:
            result = json.loads(self._ray.get(worker.reference))
        except self._ray.exceptions.RayTaskError as error:
            raise RuntimeError(str(error)) from error
        except self._ray.exceptions.RayError as error:
            yield from self._replace(worker, error)
            return
        if not worker.ready:
            _require_usable(result)
            worker.ready = True
            whole, reading = time.perf_counter() - worker.since, result["reading"]
            times = {"starting": round(max(0.0, whole - reading), 4), "reading": round(reading, 4)}
            self._started.append({"machine": result["node"], **times})
            return
        outcome, text, events = result
        while self._arrived[worker.attempt] < events:  # they arrived in the mailbox before the result
            yield from self._events()
        assert worker.job is not None
        job, worker.job = worker.job, None
        yield Ended(job, outcome, text)

    def close(self) -> None:
        """End all workers."""
        for actor in (*(worker.actor for worker in self._workers), self._mailbox):
            with suppress(Exception):  # the cluster may be gone
                self._ray.kill(actor)
        self._shared.unlink(missing_ok=True)

    def _start(self) -> None:
        """Start one more worker."""
        actor = self._remote.remote(*self._given)
        self._workers.append(_Worker(actor, actor.prepare.remote(self._mark)))

    def _replace(self, worker: _Worker, error: Exception) -> Iterator[Ended]:
        """Start another worker in place of one that died, and yield the end of its method run."""
        self._workers.remove(worker)
        with suppress(Exception):
            self._ray.kill(worker.actor)
        self._deaths_at_start += not worker.ready
        if self._deaths_at_start == DEATHS:
            raise ClusterError(f"{DEATHS} workers died while they started: {error}") from error
        self._start()
        if worker.job:
            yield Ended(worker.job, "died", f"the worker of a method run ({type(error).__name__})")

    def _events(self) -> Iterator[Event]:
        """Wait for messages, write the notes among them to the journal, and yield the events."""
        messages, self._letters = self._ray.get(self._letters), self._mailbox.take.remote()
        for message in messages:
            value = json.loads(message)
            if "event" in value:
                self._arrived[value["attempt"]] += 1
                yield event_of(value["event"])
            else:
                self._mailbox.answer.remote(value["ask"], self._note(*value["note"]))


def _require_usable(told: dict[str, Any]) -> None:
    """Require that a worker can execute method runs.

    Raises:
        ClusterError: If it cannot. The message gives the reason and the machine.
    """
    require_same_installation(told["installation"], told["node"])
    if told["problem"]:
        raise ClusterError(told["problem"])
