"""Simulation of unequal sites: computing time, bandwidth and failure rate of each site.

Time is virtual. The simulation neither sleeps nor reads a clock, so a run with slow sites is reproducible with
bit-identical results and takes as long as one with fast sites. Answers arrive in the order of virtual time,
deadlines drop the sites that would have been late, and ``clock`` gives the time that real sites would have needed. Not
simulated: speed that varies over the day, shared connections, and correlated failures.
"""

import heapq
import math
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from polyclinic.core.execution import Policy
from polyclinic.core.method import Method, Request
from polyclinic.core.rounds import Arrival
from polyclinic.core.site import Site
from polyclinic.core.tree import Trees
from polyclinic.engines.site_runtime import Done, work
from polyclinic.errors import ConfigError
from polyclinic.secure_aggregation.engine_simulation import secured


@dataclass(frozen=True)
class Machine:
    """Computing and communication resources of a site.

    Attributes:
        seconds_per_batch: Computing time for each minibatch that the site reads, in seconds.
        up: Bandwidth from the site to the server, in bytes per second.
        down: Bandwidth from the server to the site, in bytes per second.
        drop_out: Probability of failure per request. Changes to the site state are lost with the reply.
    """

    seconds_per_batch: float = 0.0
    up: float = math.inf
    down: float = math.inf
    drop_out: float = 0.0

    def __post_init__(self) -> None:
        wrong = [
            f"{name} is {value:g}, but must be {what}"
            for name, value, fits, what in (
                ("seconds_per_batch", self.seconds_per_batch, 0 <= self.seconds_per_batch < math.inf, "0 or more"),
                ("up", self.up, self.up > 0, "more than 0 bytes a second"),
                ("down", self.down, self.down > 0, "more than 0 bytes a second"),
                ("drop_out", self.drop_out, 0 <= self.drop_out <= 1, "from 0 to 1"),
            )
            if not fits
        ]
        if wrong:
            raise ConfigError("invalid machine: " + "; ".join(wrong))

    def seconds(self, batches: int, bytes_down: int, bytes_up: int) -> float:
        """Return the time from the request to the arrival of the reply."""
        return bytes_down / self.down + batches * self.seconds_per_batch + bytes_up / self.up


class Unequal:
    """Runs all sites in this process in virtual time. Evaluation takes no time and never fails.

    Attributes:
        clock: Virtual seconds since the start.
        memory: The state of each site.
    """

    def __init__(
        self,
        method: Method[Any],
        sites: Mapping[str, Site],
        machines: Mapping[str, Machine],
        memory: Mapping[str, Trees] | None = None,
        policies: Mapping[str, Policy] | None = None,
        seed: int = 0,
        server_data: Mapping[str, Any] | None = None,
    ) -> None:
        """Create the engine for ``sites``.

        Args:
            machines: Machines by site; a site without one takes no time.
            memory: Site states of an earlier run.
            policies: Policies by site; a site without one allows everything.
            seed: Seed of the server's random generators, and of the drop-outs.
            server_data: The server's own data by role.

        Raises:
            ValueError: If ``machines`` names an unknown site.
        """
        if unknown := machines.keys() - sites.keys():
            raise ConfigError(f"machines name unknown sites {sorted(unknown)}; the sites are {sorted(sites)}")
        self.clock = 0.0
        self.server = Site("server", dict(server_data or {}), seed=seed)
        self.memory: dict[str, Trees] = {name: (memory or {}).get(name, {}) for name in sorted(sites)}
        self._method, self._sites, self._machines, self._policies = method, dict(sites), dict(machines), policies or {}
        self._sent: deque[tuple[Request, str]] = deque()
        self._judged: deque[tuple[Request, str]] = deque()
        self._under_way: list[tuple[float, int, str, Request, Done]] = []
        self._asked: Counter[tuple[str, int, str]] = Counter()
        self._last: tuple[Request | None, Sequence[str]] = (None, ())

    @property
    def sites(self) -> Sequence[str]:
        """Names of all sites, in order."""
        return sorted(self._sites)

    def send(self, request: Request, to: Sequence[str]) -> None:
        """Send ``request`` to the sites ``to`` at the current virtual time."""
        self._last = (request, to)
        (self._judged if _evaluates(request) else self._sent).extend((request, name) for name in to)

    def replies(self, deadline: float | None = None) -> Iterator[Arrival]:
        """Yield answers in the order of virtual time. A site without an answer after ``deadline`` seconds is lost.

        Evaluation requests are answered at once and do not interrupt sites that are training.
        """
        request, to = self._last
        if request is not None and _evaluates(request):
            return self._judgments()
        return secured(request, to, self._arrivals(deadline))

    def close(self) -> None:
        """Do nothing; the engine holds no resources."""

    def _judgments(self) -> Iterator[Arrival]:
        while self._judged:
            request, name = self._judged.popleft()
            done = work(self._method, request, self.memory[name], self._sites[name], self._policies.get(name))
            yield Arrival(name, request.round, done.reply, done.lost)

    def _arrivals(self, deadline: float | None) -> Iterator[Arrival]:
        end = math.inf if deadline is None else self.clock + deadline
        while self._sent or self._under_way:
            while self._sent:
                self._begin(*self._sent.popleft())
            when, _, name, request, done = heapq.heappop(self._under_way)
            self.clock = max(self.clock, min(when, end))
            if when > end:
                yield Arrival(name, request.round, None, f"no answer within {deadline:g} s", deadline or 0.0)
                continue
            self.memory[name] = done.memory
            yield Arrival(name, request.round, done.reply, done.lost, done.seconds)

    def _begin(self, request: Request, name: str) -> None:
        """Execute ``request``, and record when it will be finished."""
        machine = self._machines.get(name, Machine())
        key = (name, request.round, request.job)
        chance = torch.rand((), generator=self.server.rng("drop-out", *key, self._asked[key]))
        self._asked[key] += 1
        if float(chance) < machine.drop_out:
            done = Done(None, self.memory[name], "dropped out", machine.seconds(0, request.nbytes(name), 0))
        else:
            site, reads = self._sites[name], Reads()
            counted = replace(site, data={role: _Counted(data, reads) for role, data in site.data.items()})
            done = work(self._method, request, self.memory[name], counted, self._policies.get(name))
            up = done.reply.nbytes if done.reply else 0
            done = done._replace(seconds=machine.seconds(reads.count, request.nbytes(name), up))
        heapq.heappush(self._under_way, (self.clock + done.seconds, sum(self._asked.values()), name, request, done))


def _evaluates(request: Request) -> bool:
    return request.job.partition("/")[0] in ("score", "predict", "explain", "show")


@dataclass
class Reads:
    """Number of minibatches that were read."""

    count: int = 0


class _Counted:
    """Data that count how often they are read."""

    def __init__(self, data: Any, reads: Reads) -> None:
        self._data, self._reads = data, reads

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: Tensor) -> Any:
        self._reads.count += 1
        return self._data[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._data, name)
