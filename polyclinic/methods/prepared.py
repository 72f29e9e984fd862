"""One method after another: something is found out first, and what is trained begins from it."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

from polyclinic.core.method import Ask, Job, Method
from polyclinic.core.site import Site
from polyclinic.core.state import savable
from polyclinic.core.stats import Reply
from polyclinic.core.tree import Tree, Trees
from polyclinic.tasks.task import Task

FIRST = "prepare "


class Finds(Protocol):
    """A method that ends, and knows then what the front of a network should hold."""

    def init(self, params: Tree) -> Any: ...
    @property
    def jobs(self) -> tuple[Job, ...]: ...
    def ask(self, state: Any) -> Ask | None: ...
    def site_update(self, ask: Ask, memory: Trees, site: Site) -> tuple[Reply, Trees]: ...
    def server_update(self, state: Any, reply: Reply, server: Site) -> Any: ...
    def front(self, state: Any) -> Tree:
        """The front's leaves, ``front.…``, for a site that has none of its own."""


@savable("prepared.State", 1)
class State(NamedTuple):
    """What was found out, and the state of what is trained from it."""

    found: Any
    inner: Any

    @property
    def params(self) -> Tree:
        """The trained method's model."""
        params: Tree = self.inner.params
        return params


@dataclass(frozen=True)
class Prepared(Method[State]):
    """``first`` until it has finished, all within round 0; then ``inner``, whose model begins with what was found.

    Attributes:
        first: Finds something out; what is a site's own it puts into that site's memory, where ``inner`` looks for it.
        inner: What is trained.
        task: With the network that has the front.
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

    def ask(self, state: State) -> Ask | None:
        ask = self.first.ask(state.found)
        return self.inner.ask(state.inner) if ask is None else replace(ask, round=0, job=FIRST + ask.job)

    def site_update(self, ask: Ask, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        if ask.job.startswith(FIRST):
            return self.first.site_update(replace(ask, job=ask.job.removeprefix(FIRST)), memory, site)
        return self.inner.site_update(ask, memory, site)

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        if self.first.ask(state.found) is None:
            return state._replace(inner=self.inner.server_update(state.inner, reply, server))
        found = self.first.server_update(state.found, reply, server)
        if self.first.ask(found) is not None:
            return state._replace(found=found)
        return State(found, self.inner.init({**state.params, **self.first.front(found)}))

    def model_at(self, ask: Ask, memory: Trees) -> Tree:
        return self.inner.model_at(ask, memory)

    @property
    def predicts(self) -> Task:
        return self.task

    def trial(self, state: State) -> Ask:
        return self.inner.trial(state.inner)
