"""What federated learning is compared with: every site alone, every site's model elsewhere, all data in one place.

The survey's names (Guan, Yap, Bozoki and Liu, 2024, section 6, after Li et al., Medical Image Analysis 2020):
Single trains and tests within a site, Cross trains at one site and tests at another, Mix pools the data. Mix is FedAvg
over one site that holds everything; the study arranges its data.
"""

from dataclasses import dataclass
from typing import NamedTuple

from polyclinic.core.method import Ask, Method
from polyclinic.core.site import Site
from polyclinic.core.state import savable
from polyclinic.core.stats import Gather, Reply
from polyclinic.core.tree import Tree, Trees
from polyclinic.methods.fedavg import FedAvg
from polyclinic.tasks.local import Local
from polyclinic.tasks.task import Task


@savable
class Alone(NamedTuple):
    """Nothing but the count: what sites learn stays there."""

    round: int
    params: Tree


@dataclass(frozen=True)
class Single(Method[Alone]):
    """Every site trains alone, from the same beginning. Nothing leaves it."""

    task: Task
    local: Local = Local()

    def init(self, params: Tree) -> Alone:
        return Alone(0, params)

    def ask(self, state: Alone) -> Ask:
        return Ask(state.round, {"params": state.params})

    def site_update(self, ask: Ask, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start = self.model_at(ask, memory)
        return Reply(), {**memory, "params": self.local.fit(self.task, start, site, ask.round)}

    def server_update(self, state: Alone, reply: Reply, server: Site) -> Alone:
        return state._replace(round=state.round + 1)

    def model_at(self, ask: Ask, memory: Trees) -> Tree:
        return memory.get("params", ask.trees["params"])


@savable
class Exchanged(NamedTuple):
    """The models of all sites, as of the last round, and where they began."""

    round: int
    params: Tree
    models: dict[str, Tree]


@dataclass(frozen=True)
class Cross(Method[Exchanged]):
    """Every site trains alone, and is tested with each of the other sites' models in turn."""

    task: Task
    local: Local = Local()

    def init(self, params: Tree) -> Exchanged:
        return Exchanged(0, params, {})

    def ask(self, state: Exchanged) -> Ask:
        return Ask(state.round, {"params": state.params})

    def site_update(self, ask: Ask, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        end = self.local.fit(self.task, memory.get("params", ask.trees["params"]), site, ask.round)
        return Reply({"model": Gather({site.name: end})}), {**memory, "params": end}

    def server_update(self, state: Exchanged, reply: Reply, server: Site) -> Exchanged:
        return Exchanged(state.round + 1, state.params, {**state.models, **reply.gather("model")})

    def trials(self, state: Exchanged) -> tuple[Ask, ...]:
        names, asks = sorted(state.models), []
        for shift in range(1, len(names)):
            each = {name: {"params": state.models[names[(i + shift) % len(names)]]} for i, name in enumerate(names)}
            elsewhere = state.models[names[shift]]  # for a site that has no model of its own
            asks.append(Ask(state.round, {"params": elsewhere}, each=each))
        return tuple(asks)


def single(task: Task, local: Local) -> Single:
    """Every site trains alone."""
    return Single(task, local)


def cross(task: Task, local: Local) -> Cross:
    """Every site is tested with the models of the others."""
    return Cross(task, local)


def mix(task: Task, local: Local) -> FedAvg:
    """All data in one place, which is what federated learning avoids: the bound to compare with."""
    return FedAvg(task, local)
