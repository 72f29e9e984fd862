"""Training in two phases: first a representation from images alone, then the task from the available labels.

The common part of FedMoCo, Fed-MAE and FCL, from no paper of its own. Rounds of both phases count.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.job_enumeration import shifted, within
from polyclinic.core.method import Capabilities, Job, Method, Request, together
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError
from polyclinic.learning.objectives.contrastive import extended
from polyclinic.learning.tasks.example_pool import all_inputs
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.base.site_weights import SizeWeighted


@savable("phases.State", 1)
class State(NamedTuple):
    """The state of the present phase, and whether it is the second."""

    inner: Any
    second: bool

    @property
    def params(self) -> Tree:
        """The model of the study's task."""
        params: Tree = self.inner.params
        return params


@dataclass(frozen=True)
class Then(Method[State]):
    """One method for some rounds, then another that starts with its model. Site state of the first is discarded.

    Attributes:
        first: Runs first; its state has the ``params`` of the study's task.
        second: Runs until the end. Its rounds are counted from 0, as if it ran alone.
        rounds: Number of rounds of the first.
    """

    first: Method[Any]
    second: Method[Any]
    rounds: int

    @property
    def wrapped(self) -> tuple[Method[Any], ...]:
        return self.first, self.second

    @property
    def capabilities(self) -> Capabilities:
        return together(self.first.capabilities, self.second.capabilities)

    def init(self, params: Tree) -> State:
        return State(self.first.init(params), False) if self.rounds else State(self.second.init(params), True)

    @property
    def jobs(self) -> tuple[Job, ...]:
        return within(self.first.jobs, self.rounds) + shifted(self.second.jobs, self.rounds)

    def request(self, state: State) -> Request | None:
        if not state.second:
            return self.first.request(state.inner)
        request = self.second.request(state.inner)
        return request and replace(request, round=request.round + self.rounds)

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        running, request, memory = self._at(request, memory)
        reply, kept = running.site_update(request, memory, site)
        return reply, {f"{self._name(running)}/{name}": leaves for name, leaves in kept.items()}

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        if state.second:
            return state._replace(inner=self.second.server_update(state.inner, reply, server))
        inner = self.first.server_update(state.inner, reply, server)
        request = self.first.request(inner)
        over = request is None or request.round >= self.rounds
        return State(self.second.init(inner.params), True) if over else State(inner, False)

    def site_model(self, request: Request, memory: Trees) -> Tree:
        running, request, memory = self._at(request, memory)
        return running.site_model(request, memory)

    def adapted_model(self, request: Request, memory: Trees, site: Site, role: str) -> Tree:
        running, request, memory = self._at(request, memory)
        return running.adapted_model(request, memory, site, role)

    @property
    def prediction_task(self) -> Any:
        return self.second.prediction_task

    def _at(self, request: Request, memory: Trees) -> tuple[Method[Any], Request, Trees]:
        """Return the method that made ``request``, and its arguments as if it ran alone."""
        running = self.first if request.round < self.rounds else self.second
        start = f"{self._name(running)}/"
        own = {name.removeprefix(start): leaves for name, leaves in memory.items() if name.startswith(start)}
        return running, request if running is self.first else replace(request, round=request.round - self.rounds), own

    def _name(self, running: Method[Any]) -> str:
        return "first" if running is self.first else "second"


@savable("phases.CombinedState", 1)
class Whole(NamedTuple):
    """The study's network and the modules that are trained with it, as one tree."""

    round: int
    whole: Tree

    @property
    def params(self) -> Tree:
        """The study's network alone."""
        return tree.under("backbone", self.whole)


@dataclass(frozen=True)
class Pretrained(SizeWeighted[Whole]):
    """Federated averaging of a network that learns from images alone, labeled or not.

    Attributes:
        learner: Builds an ``Extended`` model and defines its loss, which uses no target.
    """

    learner: Any
    local: LocalTraining = LocalTraining()
    uniform: bool = False

    def init(self, params: Tree) -> Whole:
        return Whole(0, extended(self.learner, params))

    def request(self, state: Whole) -> Request:
        return Request(state.round, {"whole": state.whole})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start, data = request.trees["whole"], all_inputs(site.data)
        end = self.local.fit(self.learner, start, site, request.round, data=data)
        weight = float(bool(len(data)) if self.uniform else len(data))
        return Reply({"update": WeightedMean.of(tree.sub(end, start), weight)}), memory

    def server_update(self, state: Whole, reply: Reply, server: Site) -> Whole:
        return Whole(state.round + 1, reply.mean("update").apply_to(state.whole))

    def site_model(self, request: Request, memory: Trees) -> Tree:
        return tree.under("backbone", request.trees["whole"])


def share_of(rounds: int, share: float) -> int:
    """Return the number of ``rounds`` for a pretraining's ``share``: at least one if any, and never all."""
    if not 0 <= share < 1:
        raise ConfigError(f"pretrain is the share of rounds that come first, at least 0 and less than 1, not {share:g}")
    return min(max(round(rounds * share), 1), rounds - 1) if share else 0
