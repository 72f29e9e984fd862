"""A method that first determines the front of a network, and then trains from it."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

from polyclinic.core.aggregates import Reply
from polyclinic.core.method import Capabilities, Job, Method, MethodWrapper, Request, together
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.tasks.task import Task

FIRST = "prepare "


class Finds(Protocol):
    """A method that finishes, and then provides the front of a network."""

    def init(self, params: Tree) -> Any: ...
    @property
    def jobs(self) -> tuple[Job, ...]: ...
    @property
    def capabilities(self) -> Capabilities: ...
    def request(self, state: Any) -> Request | None: ...
    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]: ...
    def server_update(self, state: Any, reply: Reply, server: Site) -> Any: ...
    def front(self, state: Any) -> Tree:
        """Return the front's leaves, ``front.…``, for a site that has none of its own."""


@savable("prepared.State", 1)
class State(NamedTuple):
    """The state of the preparation, and that of the method that is trained from it."""

    found: Any
    inner: Any

    @property
    def params(self) -> Tree:
        """The trained method's model."""
        params: Tree = self.inner.params
        return params


@dataclass(frozen=True)
class Prepared(MethodWrapper[State]):
    """``first`` until it has finished, all within round 0; then ``inner``, whose model starts with the resulting front.

    Attributes:
        first: Determines the front. What belongs to one site it puts into that site's memory, where ``inner`` finds it.
        inner: The method that is trained.
        task: The task with the network that has the front.
    """

    first: Finds
    inner: Method[Any]
    task: Task

    def init(self, params: Tree) -> State:
        found = self.first.init(params)
        return State(found, self.inner.init({**params, **self.first.front(found)}))

    @property
    def jobs(self) -> tuple[Job, ...]:
        first = tuple(replace(job, name=FIRST + job.name, last=0) for job in self.first.jobs)
        return first + self.inner.jobs

    @property
    def capabilities(self) -> Capabilities:
        return together(self.first.capabilities, self.inner.capabilities)

    def request(self, state: State) -> Request | None:
        request = self.first.request(state.found)
        return (
            self.inner.request(state.inner) if request is None else replace(request, round=0, job=FIRST + request.job)
        )

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        if request.job.startswith(FIRST):
            return self.first.site_update(replace(request, job=request.job.removeprefix(FIRST)), memory, site)
        return self.inner.site_update(request, memory, site)

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        if self.first.request(state.found) is None:
            return state._replace(inner=self.inner.server_update(state.inner, reply, server))
        found = self.first.server_update(state.found, reply, server)
        if self.first.request(found) is not None:
            return state._replace(found=found)
        return State(found, self.inner.init({**state.params, **self.first.front(found)}))

    @property
    def prediction_task(self) -> Task:
        return self.task

    def evaluation_request(self, state: State) -> Request:
        return self.inner.evaluation_request(state.inner)
