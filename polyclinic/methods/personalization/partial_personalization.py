"""Personalization by keeping part of the model at each site.

FedBN: Li, Jiang, Zhang, Kamp and Dou, ICLR 2021, https://arxiv.org/abs/2102.07623, keeps normalization layers whole;
SiloBN: Andreux, du Terrail, Beguier and Tramel, DART at MICCAI 2020, https://arxiv.org/abs/2008.07424, their running
statistics only; FedPer: Arivazhagan et al., 2019, https://arxiv.org/abs/1912.00818, and FLOP: Yang et al., KDD 2021,
the head; LG-FedAvg: Liang et al., 2020, https://arxiv.org/abs/2001.01523, the representation.

Layers are identified by module type, whereas some official code uses a part of their name.

The functions at the end compose FedAvg with a selection of leaves.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from polyclinic.core import tree
from polyclinic.core.aggregates import ElementwiseMean, PerSite, Reply, Stat, WeightedMean
from polyclinic.core.method import Method, MethodWrapper, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.networks.batch_statistics import recomputed
from polyclinic.learning.tasks.task import InHead, InNormalization, InRunningStatistics, Not, Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import FedAvg


@savable("personal.State", 1)
class State(NamedTuple):
    """The inner method's state, and the initial values of the kept leaves."""

    inner: Any
    first: Tree

    @property
    def params(self) -> Tree:
        """The shared leaves, and the kept ones at their initial values."""
        return {**self.inner.params, **self.first}


@dataclass(frozen=True)
class Personal(MethodWrapper[State]):
    """Any method that sends an ``update``, with the leaves selected by ``keep`` left at the sites.

    For a site that never trained, these have their initial values, so that there is no model for it, unless they can be
    computed from its images, as running statistics can.
    """

    inner: Method[Any]
    keep: Callable[[str], bool]

    def init(self, params: Tree) -> State:
        return State(self.inner.init(tree.select(params, self._share)), tree.select(params, self.keep))

    def request(self, state: State) -> Request | None:
        request = self.inner.request(state.inner)
        return request and replace(request, trees={**request.trees, "own": state.first})

    def evaluation_request(self, state: State) -> Request:
        request = self.inner.evaluation_request(state.inner)
        return replace(request, trees={**request.trees, "own": state.first})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        own = memory.get("own", request.trees["own"])
        whole = replace(request, trees={**request.trees, "params": {**request.trees["params"], **own}})
        reply, memory = self.inner.site_update(whole, memory, site)
        if "update" in reply.parts:
            own = tree.shift(own, tree.select(reply.mean("update").value, self.keep))
        shared = Reply({part: self._without(stat) for part, stat in reply.parts.items()})
        return shared, {**memory, "own": own}

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        return state._replace(inner=self.inner.server_update(state.inner, reply, server))

    def site_model(self, request: Request, memory: Trees) -> Tree:
        return {**self.inner.site_model(request, memory), **memory.get("own", request.trees["own"])}

    def kept_at_sites(self, name: str) -> bool:
        return self.keep(name) or self.inner.kept_at_sites(name)

    def _share(self, name: str) -> bool:
        return not self.keep(name)

    def _without(self, stat: Stat) -> Stat:
        """Return ``stat``, of any kind, without the kept leaves, so that no part of a reply contains them."""
        match stat:
            case WeightedMean(total, weight):
                return WeightedMean(tree.select(total, self._share), weight)
            case ElementwiseMean(total, weight):
                return ElementwiseMean(tree.select(total, self._share), tree.select(weight, self._share))
            case PerSite(items):
                return PerSite({site: tree.select(leaves, self._share) for site, leaves in items.items()})


@dataclass(frozen=True)
class SiloBN(Personal):
    """FedAvg with running statistics kept at the sites; a site that never trained recomputes them from its images.

    Attributes:
        task: The task whose model has the statistics.
    """

    task: Task

    def adapted_model(self, request: Request, memory: Trees, site: Site, role: str) -> Tree:
        params = self.site_model(request, memory)
        return params if "own" in memory else recomputed(self.task, params, site.data[role], site.device)


def fedbn(task: Task, local: LocalTraining, *, uniform: bool = False) -> Personal:
    """FedAvg with normalization layers kept at the sites."""
    return Personal(FedAvg(task, local, uniform=uniform), InNormalization(task))


def silobn(task: Task, local: LocalTraining, *, uniform: bool = False) -> SiloBN:
    """FedAvg with the running statistics of batch normalization kept at the sites; their weights are shared."""
    return SiloBN(FedAvg(task, local, uniform=uniform), InRunningStatistics(task), task)


def fedper(task: Task, local: LocalTraining, *, uniform: bool = False) -> Personal:
    """FedAvg with the head kept at the sites (FedPer, FLOP)."""
    return Personal(FedAvg(task, local, uniform=uniform), InHead(task))


def lg_fedavg(task: Task, local: LocalTraining, *, uniform: bool = False) -> Personal:
    """FedAvg of the head alone; the representation is kept at the sites."""
    return Personal(FedAvg(task, local, uniform=uniform), Not(InHead(task)))
