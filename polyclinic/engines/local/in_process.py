"""Reference engine: all sites run in this process, one after another."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from polyclinic.core.execution import Policy
from polyclinic.core.method import Method, Request
from polyclinic.core.rounds import Arrival
from polyclinic.core.site import Site
from polyclinic.core.tree import Trees
from polyclinic.engines.site_runtime import work
from polyclinic.secure_aggregation.engine_simulation import secured


class InProcess:
    """Executes requests in the order in which they were sent.

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
        server_data: Mapping[str, Any] | None = None,
        progress: Path | None = None,
    ) -> None:
        """Create the engine for ``sites``.

        Args:
            memory: Site states of an earlier run.
            policies: Policies by site; a site without one allows everything.
            seed: Seed of the server's random generators.
            server_data: The server's own data by role, such as ``"public"`` images for distillation.
            progress: Folder in which the progress of local training is recorded.
        """
        self.server = Site("server", dict(server_data or {}), seed=seed)
        self.memory: dict[str, Trees] = {name: (memory or {}).get(name, {}) for name in sorted(sites)}
        self._method, self._sites, self._policies = method, sites, policies or {}
        self._names = list(self.memory)
        self._progress = progress
        self._queue: deque[tuple[Request, str]] = deque()
        self._last: tuple[Request | None, Sequence[str]] = (None, ())

    @property
    def sites(self) -> Sequence[str]:
        """Names of all sites, in order."""
        return self._names

    def send(self, request: Request, to: Sequence[str]) -> None:
        """Queue ``request`` for the sites ``to``."""
        self._last = (request, to)
        self._queue.extend((request, name) for name in to)

    def replies(self, deadline: float | None = None) -> Iterator[Arrival]:
        """Execute the queued requests. A site that took longer than ``deadline`` seconds is lost."""
        return secured(*self._last, self._arrivals(deadline))

    def _arrivals(self, deadline: float | None) -> Iterator[Arrival]:
        while self._queue:
            yield self._execute(*self._queue.popleft(), deadline)  # nothing here refers to a reply that was used

    def _execute(self, request: Request, name: str, deadline: float | None) -> Arrival:
        site, policy = self._sites[name], self._policies.get(name)
        done = work(self._method, request, self.memory[name], site, policy, self._progress)
        if done.reply is not None and deadline is not None and done.seconds > deadline:
            return Arrival(name, request.round, None, f"no answer within {deadline:g} s", done.seconds)
        self.memory[name] = done.memory
        return Arrival(name, request.round, done.reply, done.lost, done.seconds)

    def close(self) -> None:
        """Do nothing; the engine holds no resources."""
