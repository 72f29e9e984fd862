"""Engine that runs sites in worker processes on the machines of a Ray cluster.

Every worker holds the data of some sites, which are sent to it once, and computes on one thread. Requests, replies and
site states travel as safetensors in Ray's object store. If a worker or its machine dies, its sites move to another
worker and the request is repeated, which gives the same reply, since a site's work depends only on its inputs.
"""

import json
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from polyclinic.core import serialization
from polyclinic.core.method import Method, Request
from polyclinic.core.rounds import Arrival
from polyclinic.core.site import Compute, Site
from polyclinic.core.tree import Trees
from polyclinic.data.examples import Examples
from polyclinic.data.geometry import Geometry
from polyclinic.engines.ray.cluster import ClusterError, installation, ray, require_same_installation, slots
from polyclinic.engines.site_runtime import work
from polyclinic.errors import DataError
from polyclinic.secure_aggregation.engine_simulation import secured

DEATHS = 3
"""Number of deaths of its worker after which a request is given up."""
START = 120.0
"""Seconds in which a worker must start, after which its sites move to the others."""

ORDERED = ("inputs", "targets")
"""Tensors whose strides are kept. PyTorch chooses its kernels by them, and kernels differ in the last bits."""

Build: TypeAlias = Callable[[str], Method[Any]]
Reference: TypeAlias = Any
"""A reference to a value in Ray's object store."""


def encode_data(site: str, data: Mapping[str, Any]) -> bytes:
    """Encode a site's examples by role.

    Raises:
        DataError: If they are not ``Examples`` in memory.
    """
    roles = {}
    for role, examples in data.items():
        if type(examples) is not Examples:
            raise DataError(
                f'site {site}: its data stay on disk, and kind = "ray" with parallel = "sites" sends data to workers. '
                'Use parallel = "arms" with a folder that all machines share, or kind = "workers"'
            )
        geometries = examples.geometries and [geometry.table for geometry in examples.geometries]
        strides = {name: list(getattr(examples, name).stride()) for name in ORDERED}
        names = {"patients": tuple(examples.patients), "ids": tuple(examples.ids)}
        roles[role] = {"fields": {**vars(examples), **names, "geometries": geometries}, "strides": strides}
    return serialization.encode(roles)


def decode_data(encoded: bytes) -> dict[str, Examples]:
    """Decode the result of ``encode_data``."""
    roles = {}
    for role, found in serialization.decode(bytearray(encoded), share=True).items():
        fields = found["fields"]
        geometries = fields["geometries"] and tuple(map(Geometry.of_table, fields["geometries"]))
        ordered = {name: _with_strides(fields[name], found["strides"][name]) for name in ORDERED}
        roles[role] = Examples(**{**fields, "geometries": geometries, **ordered})
    return roles


def _with_strides(tensor: Tensor, strides: Sequence[int]) -> Tensor:
    """Return ``tensor`` with its elements in memory as ``strides`` say."""
    if list(tensor.stride()) == list(strides):
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype).copy_(tensor)


class SiteWorker:
    """A worker process: an actor of Ray."""

    def __init__(self) -> None:
        torch.set_num_threads(1)

    def begin(self, build: Build, recipe: str, machine: Mapping[str, Any], data: Mapping[str, Reference]) -> str:
        """Build the method of a run, in place of an earlier one; return this machine's name and installation as JSON.

        Args:
            build: The function that builds it.
            recipe: The text that ``build`` reads.
            machine: Further fields of a site.
            data: References to each site's data, which are fetched at the site's first request.
        """
        self._method: Method[Any] | None = build(recipe)
        self._machine = {**machine, "compute": Compute(**machine["compute"])}
        self._references = dict(data)
        self._sites: dict[str, Site] = {}
        return json.dumps({"node": socket.gethostname(), "installation": installation()})

    def adopt(self, data: Mapping[str, Reference]) -> None:
        """Take over the sites of a worker that died."""
        self._references |= data

    def rest(self) -> None:
        """Release the method and the data of a run that has ended."""
        self._method, self._references, self._sites = None, {}, {}

    def work(self, name: str, request: bytes, memory: bytes) -> tuple[bytes, bytes, bytes]:
        """Execute one request at one site: return the outcome as JSON, the reply and the site's state."""
        if name not in self._sites:
            data = decode_data(ray().get(self._references[name]))
            self._sites[name] = Site(name, data, **self._machine)
        assert self._method is not None
        done = work(self._method, _decoded(request), _decoded(memory), self._sites[name])
        lost, reply, kept = done.lost, b"", b""
        if done.reply is not None:
            try:
                reply, kept = serialization.encode(done.reply), serialization.encode(done.memory)
            except TypeError as error:
                lost = f"failed: {type(error).__name__}: {error}"
        return json.dumps([lost, done.seconds]).encode(), reply, kept


def _decoded(value: bytes) -> Any:
    return serialization.decode(bytearray(value), share=True)


@dataclass
class _Job:
    """One request at one site, waiting or being executed."""

    site: str
    round: int
    request: Reference
    deaths: int = 0


@dataclass
class _Worker:
    """An actor, its sites, its greeting, whether an earlier run used it, and the job that it executes."""

    actor: Any
    sites: set[str]
    greeting: Reference
    used: bool
    job: _Job | None = None
    result: tuple[Reference, Reference, Reference] | None = None
    since: float = field(default=0.0)


class RaySites:
    """Runs sites on a Ray cluster, to which this process is connected (``cluster.connected``).

    Attributes:
        memory: The state of each site. Saved with the server's state, it resumes a run with bit-identical results.
    """

    def __init__(
        self,
        build: Build,
        recipe: str,
        sites: Mapping[str, Site],
        memory: Mapping[str, Trees] | None = None,
        seed: int = 0,
        workers: int | None = None,
        server_data: Mapping[str, Any] | None = None,
        gpus: float = 0.0,
        idle: list[Any] | None = None,
    ) -> None:
        """Send the data to the workers.

        Args:
            build: A function of an importable module, which builds the method from ``recipe`` at each worker.
            recipe: Text, such as a plan.
            sites: The sites. All have one device.
            memory: Site states of an earlier run.
            seed: Seed of the server's random generators.
            workers: Number of workers; by default as many as the cluster can run at once.
            server_data: The server's own data by role.
            gpus: GPUs of each worker; a fraction shares one GPU between workers.
            idle: Actors of earlier runs with the same ``gpus``, which are used first, and to which those of this run
                are added at its end (``kill`` ends them). If it is not given, the actors end with the run.

        Raises:
            ClusterError: If no worker can start, or a machine has another installation.
            DataError: If a site's data are not in memory.
        """
        self.server = Site("server", dict(server_data or {}), seed=seed)
        self.memory: dict[str, Trees] = {name: (memory or {}).get(name, {}) for name in sorted(sites)}
        self._names = sorted(sites)
        first = next(iter(sites.values()))
        self._given = (build, recipe, {"device": first.device, "seed": first.seed, "compute": vars(first.compute)})
        self._gpus, self._idle = gpus, idle
        self._queue: deque[_Job] = deque()
        self._last: tuple[Request | None, Sequence[str]] = (None, ())
        self._workers: list[_Worker] = []
        package = ray()
        encoded = {name: encode_data(name, sites[name].data) for name in self._names}
        sizes = {name: len(value) for name, value in encoded.items()}
        self._data = {name: package.put(value) for name, value in encoded.items()}
        count = max(1, min(workers or slots(1, gpus), len(self._names)))
        self._workers = [self._start(own) for own in _shares(sizes, count)]
        try:
            for worker in list(self._workers):
                self._require_begun(worker)
        except ClusterError:
            self.close()
            raise

    @property
    def sites(self) -> Sequence[str]:
        """Names of all sites, in order."""
        return self._names

    def send(self, request: Request, to: Sequence[str]) -> None:
        """Queue ``request`` for the sites ``to``."""
        self._last = (request, to)
        if to:
            reference = ray().put(serialization.encode(request))  # once, for all sites
            self._queue.extend(_Job(name, request.round, reference) for name in to)
            self._hand_out()

    def replies(self, deadline: float | None = None) -> Iterator[Arrival]:
        """Yield answers as they arrive. A site that works longer than ``deadline`` seconds is stopped and lost."""
        return secured(*self._last, self._arrivals(deadline))

    def close(self) -> None:
        """Stop the workers and release their memory; those without a job become idle if the caller keeps them."""
        for worker in self._workers:
            if self._idle is None or worker.job is not None:
                kill([worker.actor])
                continue
            with suppress(Exception):  # the cluster may be gone
                worker.actor.rest.remote()
                self._idle.append(worker.actor)
        self._workers, self._queue, self._data = [], deque(), {}

    def __enter__(self) -> "RaySites":
        """Return the engine."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the engine."""
        self.close()

    def _arrivals(self, deadline: float | None) -> Iterator[Arrival]:
        package = ray()
        while self._queue or any(worker.job for worker in self._workers):
            self._hand_out()
            busy = {worker.result[0]: worker for worker in self._workers if worker.result}
            patience = None
            if deadline is not None:
                patience = max(0.0, min(worker.since for worker in busy.values()) + deadline - time.monotonic())
            ready, _ = package.wait(list(busy), num_returns=1, timeout=patience, fetch_local=False)
            for reference in ready:
                if (arrival := self._hear(busy[reference])) is not None:
                    yield arrival
            if deadline is not None and not ready:
                yield from self._stop_late(deadline)

    def _hand_out(self) -> None:
        """Give each free worker the next job of one of its sites."""
        for worker in self._workers:
            if worker.job is None and (job := next((j for j in self._queue if j.site in worker.sites), None)):
                self._queue.remove(job)
                worker.job, worker.since = job, time.monotonic()
                memory = serialization.encode(self.memory[job.site])
                call = worker.actor.work.options(num_returns=3)  # each part is an object of its own
                worker.result = tuple(call.remote(job.site, job.request, memory))

    def _hear(self, worker: _Worker) -> Arrival | None:
        """Receive a worker's result; None if it died and its request is repeated."""
        package, job, result = ray(), worker.job, worker.result
        assert job is not None
        assert result is not None
        try:
            lost, seconds = json.loads(package.get(result[0]))
            values = None if lost else package.get([result[1], result[2]])
        except package.exceptions.RayError as error:
            self._replace(worker)
            job.deaths += 1
            if job.deaths < DEATHS:
                self._queue.appendleft(job)
                return None
            why = type(error).__name__
            return Arrival(job.site, job.round, None, f"its worker died {DEATHS} times ({why}); check the memory")
        worker.job = worker.result = None
        reply = None
        if values is not None:
            reply, self.memory[job.site] = _decoded(values[0]), _decoded(values[1])
        return Arrival(job.site, job.round, reply, lost, seconds)

    def _stop_late(self, deadline: float) -> Iterator[Arrival]:
        for worker in list(self._workers):
            if (job := worker.job) and time.monotonic() - worker.since >= deadline:
                self._replace(worker)
                yield Arrival(job.site, job.round, None, f"no answer within {deadline:g} s", deadline)

    def _start(self, own: set[str]) -> _Worker:
        used = bool(self._idle)
        if self._idle:
            actor = self._idle.pop()
        else:
            kind = ray().remote(num_cpus=1, num_gpus=self._gpus, max_restarts=0)(SiteWorker)
            actor = kind.options(max_concurrency=1).remote()
        data = {name: self._data[name] for name in own}
        return _Worker(actor, own, actor.begin.remote(*self._given, data), used)

    def _require_begun(self, worker: _Worker) -> None:
        """Wait until the worker has begun the run. One of an earlier run is replaced if it died meanwhile."""
        try:
            self._require_started(worker)
        except ClusterError:
            if not worker.used:
                raise
            self._replace(worker)

    def _require_started(self, worker: _Worker) -> None:
        """Wait until the worker has started.

        Raises:
            ClusterError: If it does not start in time, or its machine has another installation.
        """
        package = ray()
        try:
            told = json.loads(package.get(worker.greeting, timeout=START))
        except package.exceptions.GetTimeoutError as error:
            raise ClusterError(f"a worker did not start within {START:g} s: is the cluster busy?") from error
        except package.exceptions.RayError as error:
            raise ClusterError(f"a worker cannot start: {str(error).strip().splitlines()[-1]}") from error
        require_same_installation(told["installation"], told["node"])

    def _replace(self, worker: _Worker) -> None:
        """Start another worker for the sites of ``worker``, or move them to the others if there is no room for one."""
        kill([worker.actor])
        self._workers.remove(worker)
        new = self._start(worker.sites)
        try:
            self._require_started(new)
            self._workers.append(new)
        except ClusterError:
            kill([new.actor])
            if not self._workers:
                raise
            for i, name in enumerate(sorted(worker.sites)):
                other = self._workers[i % len(self._workers)]
                other.sites.add(name)
                other.actor.adopt.remote({name: self._data[name]})


def kill(actors: Sequence[Any]) -> None:
    """End ``actors``, of which some may be dead."""
    for actor in actors:
        with suppress(Exception):  # the cluster may be gone
            ray().kill(actor)


def _shares(sizes: Mapping[str, int], count: int) -> list[set[str]]:
    """Distribute the sites to ``count`` workers, the largest first, each to the worker with the least data."""
    shares: list[set[str]] = [set() for _ in range(count)]
    loads = [0] * count
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = loads.index(min(loads))
        shares[least].add(name)
        loads[least] += sizes[name]
    return shares
