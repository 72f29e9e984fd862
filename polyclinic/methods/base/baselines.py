"""What federated learning is compared with: every site alone, every site's model elsewhere, all data in one place.

The survey's names (Guan, Yap, Bozoki and Liu, 2024, section 6, after Li et al., Medical Image Analysis 2020):
Single trains and tests within a site, Cross trains at one site and tests at another, Mix pools the data. Mix is FedAvg
over one site that holds everything; the study arranges its data.
"""

from dataclasses import dataclass
from typing import NamedTuple

from polyclinic.core.aggregates import PerSite, Reply
from polyclinic.core.method import Method, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import FedAvg


@savable("local.State", 1)
class Alone(NamedTuple):
    """Nothing but the count: what sites learn stays there."""

    round: int
    params: Tree


@dataclass(frozen=True)
class Single(Method[Alone]):
    """Every site trains alone, from the same beginning. Nothing leaves it."""

    task: Task
    local: LocalTraining = LocalTraining()

    def init(self, params: Tree) -> Alone:
        return Alone(0, params)

    def request(self, state: Alone) -> Request:
        return Request(state.round, {"params": state.params})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start = self.site_model(request, memory)
        return Reply(), {**memory, "params": self.local.fit(self.task, start, site, request.round)}

    def server_update(self, state: Alone, reply: Reply, server: Site) -> Alone:
        return state._replace(round=state.round + 1)

    def site_model(self, request: Request, memory: Trees) -> Tree:
        return memory.get("params", request.trees["params"])


@savable("cross.State", 1)
class Exchanged(NamedTuple):
    """The models of all sites, as of the last round, and where they began."""

    round: int
    params: Tree
    models: Trees


@dataclass(frozen=True)
class Cross(Method[Exchanged]):
    """Every site trains alone, and predicts with the model of the next site in name order.

    With two sites this is the survey's Cross. With more, every model and every site's data are used once.
    """

    task: Task
    local: LocalTraining = LocalTraining()

    def init(self, params: Tree) -> Exchanged:
        return Exchanged(0, params, {})

    def request(self, state: Exchanged) -> Request:
        names = sorted(state.models)
        each = {name: {"other": state.models[names[(i + 1) % len(names)]]} for i, name in enumerate(names)}
        return Request(state.round, {"params": state.params}, per_site=each)

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        end = self.local.fit(self.task, memory.get("params", request.trees["params"]), site, request.round)
        return Reply({"model": PerSite({site.name: end})}), {**memory, "params": end}

    def server_update(self, state: Exchanged, reply: Reply, server: Site) -> Exchanged:
        return Exchanged(state.round + 1, state.params, {**state.models, **reply.gather("model")})

    def site_model(self, request: Request, memory: Trees) -> Tree:
        return request.trees.get("other", request.trees["params"])


def single(task: Task, local: LocalTraining) -> Single:
    """Every site trains alone."""
    return Single(task, local)


def cross(task: Task, local: LocalTraining) -> Cross:
    """Every site is tested with the model of another."""
    return Cross(task, local)


def mix(task: Task, local: LocalTraining) -> FedAvg:
    """All data in one place, which is what federated learning avoids: the bound to compare with."""
    return FedAvg(task, local)
