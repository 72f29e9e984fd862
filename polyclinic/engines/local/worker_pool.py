"""Engine that runs sites in worker processes on one machine.

Workers are started once and run as long as the engine. They inherit the sites' data, build each model once, and compute
on one thread each. Sites beyond the number of workers wait. Requests, replies and site states pass through shared
memory. A worker that dies is replaced, and its request is repeated; since a site's work depends only on its inputs, the
results are bit-identical to those of the in-process engine, after any number of failures.
"""

import json
import multiprocessing
import os
import shutil
import signal
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from weakref import finalize, ref

import torch

from polyclinic.core.execution import Policy
from polyclinic.core.method import Method, Request
from polyclinic.core.reply_validation import GROUP
from polyclinic.core.rounds import Arrival
from polyclinic.core.site import Site
from polyclinic.core.tree import Trees
from polyclinic.engines.devices import worker_device
from polyclinic.engines.local import shared_memory
from polyclinic.engines.local.shared_memory import SharedFiles
from polyclinic.engines.site_runtime import work
from polyclinic.secure_aggregation.engine_simulation import secured

DEATHS = 3


@dataclass
class _Job:
    """One request at one site, waiting or being executed."""

    site: str
    round: int
    request: Path
    deaths: int = 0
    files: tuple[Path, ...] = ()
    """The files of the site state, of the reply and of the new site state, while it is executed."""


@dataclass
class _Worker:
    """A worker process and the parent's end of the pipe to it."""

    process: BaseProcess
    line: Connection
    job: _Job | None = None
    since: float = field(default=0.0)


class Workers:
    """Runs up to ``workers`` sites at once. Use it as a context manager, or call ``close``.

    An engine that is not closed is closed when it is no longer used, or when Python exits.

    Attributes:
        memory: The state of each site. Saved with the server's state, it resumes a run with bit-identical results.
    """

    def __init__(
        self,
        method: Method[Any],
        sites: Mapping[str, Site],
        memory: Mapping[str, Trees] | None = None,
        policies: Mapping[str, Policy] | None = None,
        seed: int = 0,
        workers: int = 2,
        server_data: Mapping[str, Any] | None = None,
        progress: Path | None = None,
    ) -> None:
        """Start the workers.

        Args:
            memory: Site states of an earlier run.
            policies: Policies by site; a site without one allows everything.
            seed: Seed of the server's random generators.
            workers: Number of processes. More than the number of CPU cores is slower.
            server_data: The server's own data by role, such as ``"public"`` images for distillation.
            progress: Folder in which the progress of local training is recorded, one file per worker.
        """
        self.server = Site("server", dict(server_data or {}), seed=seed)
        self.memory: dict[str, Trees] = {name: (memory or {}).get(name, {}) for name in sorted(sites)}
        self._given = (method, sites, dict(policies or {}), progress)
        self._names = list(self.memory)
        self._folder = shared_memory.new_folder()
        self._files = SharedFiles(self._folder, spare=2 * workers + GROUP)
        self._queue: deque[_Job] = deque()
        self._pending: dict[Path, int] = {}
        self._viewed: set[Path] = set()
        self._last: tuple[Request | None, Sequence[str]] = (None, ())
        self._workers: list[_Worker] = []
        self._stop = finalize(self, _stop, self._workers, self._folder, os.getpid())
        for number in range(max(1, min(workers, len(sites)))):
            self._workers.append(self._start(number))

    @property
    def sites(self) -> Sequence[str]:
        """Names of all sites, in order."""
        return self._names

    @property
    def pids(self) -> list[int]:
        """Process IDs of the workers."""
        return [worker.process.pid or 0 for worker in self._workers]

    def send(self, request: Request, to: Sequence[str]) -> None:
        """Queue ``request`` for the sites ``to``."""
        self._last = (request, to)
        if not to:
            return
        path = self._files.new("request")
        shared_memory.put(path, request)
        self._pending[path] = len(to)
        self._queue.extend(_Job(name, request.round, path) for name in to)
        self._hand_out()

    def replies(self, deadline: float | None = None) -> Iterator[Arrival]:
        """Yield answers as they arrive. A site that works longer than ``deadline`` seconds is stopped and lost."""
        return secured(*self._last, self._arrivals(deadline))

    def _arrivals(self, deadline: float | None) -> Iterator[Arrival]:
        while self._queue or any(worker.job for worker in self._workers):
            self._hand_out()
            busy = {worker.line: worker for worker in self._workers if worker.job}
            patience = None
            if deadline is not None:
                patience = max(0.0, min(worker.since for worker in busy.values()) + deadline - time.monotonic())
            ready = wait(list(busy), patience)
            for line in ready:
                if (arrival := self._hear(busy[line])) is not None:  # type: ignore[index]
                    yield arrival
                del arrival
            if deadline is not None and not ready:
                yield from self._stop_late(deadline)

    def close(self) -> None:
        """Stop the workers and release the shared memory."""
        self._stop()
        self._queue.clear()

    def __enter__(self) -> "Workers":
        """Return the engine."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the engine."""
        self.close()

    def _start(self, number: int) -> _Worker:
        forks = "fork" in multiprocessing.get_all_start_methods() and not torch.cuda.is_initialized()
        context: Any = multiprocessing.get_context("fork" if forks else "spawn")
        ours, theirs = context.Pipe()
        inherited = [*(worker.line for worker in self._workers), ours] if forks else []
        process = context.Process(target=_serve, args=(theirs, inherited, number, *self._given), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours)

    def _hand_out(self) -> None:
        for worker in self._workers:
            if worker.job is None and self._queue:
                job = worker.job = self._queue.popleft()
                worker.since = time.monotonic()
                job.files = job.files or tuple(map(self._files.new, ("state", "reply", "state")))
                shared_memory.put(job.files[0], self.memory[job.site])
                files = [str(path) for path in (job.request, *job.files)]
                with suppress(OSError):  # the worker died while idle; `wait` will report its closed pipe
                    worker.line.send_bytes(json.dumps([job.site, *files]).encode())

    def _hear(self, worker: _Worker) -> Arrival | None:
        """Receive a worker's result; None if it died and its request is repeated."""
        job = worker.job
        assert job is not None
        try:
            lost, seconds, viewed = json.loads(worker.line.recv_bytes())
        except (EOFError, OSError):
            self._replace(worker)
            job.deaths += 1
            if job.deaths < DEATHS:
                self._queue.appendleft(job)
                return None
            self._finished(job)
            return Arrival(job.site, job.round, None, f"its worker died {DEATHS} times; check the available memory")
        worker.job = None
        reply = None
        if not lost and job.files:
            _, answer, kept = job.files
            job.files = job.files[:1]
            reply, self.memory[job.site] = self._files.take(answer), self._files.take(kept)
        self._viewed.update(map(Path, viewed))
        self._finished(job)
        return Arrival(job.site, job.round, reply, lost, seconds)

    def _stop_late(self, deadline: float) -> Iterator[Arrival]:
        for worker in self._workers:
            if (job := worker.job) and time.monotonic() - worker.since >= deadline:
                worker.process.kill()
                self._replace(worker)
                self._finished(job)
                yield Arrival(job.site, job.round, None, f"no answer within {deadline:g} s", deadline)

    def _replace(self, worker: _Worker) -> None:
        worker.line.close()
        worker.process.join()
        position = self._workers.index(worker)
        del self._workers[position]
        self._workers.insert(position, self._start(position))

    def _finished(self, job: _Job) -> None:
        for path in job.files:
            self._release(path)
        self._pending[job.request] -= 1
        if not self._pending[job.request]:
            del self._pending[job.request]
            self._release(job.request)

    def _release(self, path: Path) -> None:
        self._files.release(path, reusable=path not in self._viewed)
        self._viewed.discard(path)


def _stop(workers: list[_Worker], folder: Path, owner: int) -> None:
    """Stop the workers and delete the folder of the shared memory, in the process that started them."""
    if os.getpid() != owner:  # a worker has a copy of the engine
        return
    for worker in workers:
        worker.line.close()
        worker.process.kill()
        worker.process.join()
    workers.clear()
    shutil.rmtree(folder, ignore_errors=True)


def _serve(
    line: Connection,
    inherited: list[Connection],
    number: int,
    method: Method[Any],
    sites: Mapping[str, Site],
    policies: Mapping[str, Policy],
    progress: Path | None,
) -> None:
    """Serve requests in a worker process until the parent closes the pipe."""
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_IGN)  # the parent handles both
    torch.set_num_threads(1)
    for other in inherited:
        other.close()  # otherwise the pipes would not be reported as closed
    sites = {name: replace(site, device=worker_device(site.device, number)) for name, site in sites.items()}
    while True:
        try:
            name, request, memory, reply, kept = json.loads(line.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)
        (asked, first), (before, second) = shared_memory.view(Path(request)), shared_memory.view(Path(memory))
        views = {request: ref(first), memory: ref(second)}
        del first, second
        done = work(method, asked, before, sites[name], policies.get(name), progress, number)
        lost = done.lost
        if done.reply is not None:
            try:
                shared_memory.put(Path(reply), done.reply)
                shared_memory.put(Path(kept), done.memory)
            except (OSError, TypeError) as error:
                lost = f"failed: {type(error).__name__}: {error}"
        seconds = done.seconds
        del asked, before, done
        viewed = [path for path, mapped in views.items() if mapped() is not None]  # something has kept a tensor
        try:
            line.send_bytes(json.dumps([lost, seconds, viewed]).encode())
        except OSError:
            os._exit(0)
