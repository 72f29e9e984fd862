"""Baselines: local training at each site, each site's model tested at another site, and no training at all.

The survey (Guan, Yap, Bozoki and Liu, 2024, section 6, after Li et al., Medical Image Analysis 2020) calls them Single
and Cross. Its third baseline, Mix, is FedAvg over one site that holds all data; the study arranges the data.
"""

from dataclasses import dataclass
from typing import NamedTuple

from polyclinic.core.aggregates import PerSite, Reply
from polyclinic.core.method import Capabilities, Method, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import State


@dataclass(frozen=True)
class LocalOnly(Method[State]):
    """Local training at each site from the same initial model. Nothing leaves a site."""

    task: Task
    local: LocalTraining = LocalTraining()

    def init(self, params: Tree) -> State:
        return State(0, params)

    def request(self, state: State) -> Request:
        return Request(state.round, {"params": state.params})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start = self.site_model(request, memory)
        return Reply(), {**memory, "params": self.local.fit(self.task, start, site, request.round)}

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        return state._replace(round=state.round + 1)

    def site_model(self, request: Request, memory: Trees) -> Tree:
        return memory.get("params", request.trees["params"])

    def kept_at_sites(self, name: str) -> bool:
        return True  # of every leaf there are as many values as sites


@dataclass(frozen=True)
class Frozen(Method[State]):
    """The start weights, evaluated as they are. No site trains, and nothing but scores leaves a site.

    With ``[task.weights]`` this is the external validation of a finished model. It takes one round, in which sites do
    nothing, so that it passes through the same requests and approvals as other methods.
    """

    task: Task

    def init(self, params: Tree) -> State:
        return State(0, params)

    def request(self, state: State) -> Request | None:
        return None if state.round else Request(0, {"params": state.params})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        return Reply(), memory

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        return state._replace(round=state.round + 1)


@savable("cross.State", 1)
class Exchanged(NamedTuple):
    """The initial model, and the models of all sites after the last round."""

    round: int
    params: Tree
    models: Trees


@dataclass(frozen=True)
class Cross(Method[Exchanged]):
    """Local training, evaluated with the model of the next site in name order.

    With two sites this is the survey's Cross. With more, each model and each site's data are used once.
    """

    task: Task
    local: LocalTraining = LocalTraining()

    capabilities = Capabilities(needs_each_reply=True)

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

    def kept_at_sites(self, name: str) -> bool:
        return True  # of every leaf there are as many values as sites
