"""Clustered federated learning (CFL): a group of sites is divided once its model no longer fits all of them.

Sattler, Müller and Samek, "Clustered Federated Learning: Model-Agnostic Distributed Multi-Task Optimization Under
Privacy Constraints", IEEE Transactions on Neural Networks and Learning Systems 32(8):3710-3722, 2021,
https://arxiv.org/abs/1910.01991, after the published code: all sites have equal weight, and a cluster is divided by
complete linkage of the cosines of its sites' changes, whereas the paper minimizes the largest cosine across the
division. Norms and cosines are those of the trained parameters, without running statistics.
"""

from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from polyclinic.core import tree
from polyclinic.core.aggregates import PerSiteUniform, Reply
from polyclinic.core.method import Capabilities, Method, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.networks.model_tree import trainable
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining


@savable("cfl.State", 1)
class State(NamedTuple):
    """The sites and the model of each cluster."""

    round: int
    clusters: tuple[tuple[str, ...], ...]
    models: tuple[Tree, ...]

    @property
    def params(self) -> Tree:
        """The model of the largest cluster, which an unseen site gets."""
        return self.models[max(range(len(self.clusters)), key=lambda k: len(self.clusters[k]))]


@dataclass(frozen=True)
class CFL(Method[State]):
    """FedAvg within clusters; a cluster divides if its mean change is small and that of one of its sites is large.

    Attributes:
        sites: The training sites, which begin in one cluster.
        mean_below: ε₁, the norm of the mean change below which a cluster is near a stationary point.
        largest_above: ε₂, the norm of a site's change above which that point does not suit the site.
        start_round: Number of rounds before the first division.
    """

    task: Task
    sites: tuple[str, ...]
    local: LocalTraining = LocalTraining()
    mean_below: float = 0.4
    largest_above: float = 1.6
    start_round: int = 20

    capabilities = Capabilities(needs_each_reply=True)

    def init(self, params: Tree) -> State:
        return State(0, (tuple(self.sites),), (params,))

    def request(self, state: State) -> Request:
        own = {
            site: {"params": model} for sites, model in zip(state.clusters, state.models, strict=True) for site in sites
        }
        return Request(state.round, {"params": state.params}, per_site=own)

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        change = self.local.change(self.task, request.trees["params"], site, request.round)
        return Reply({"update": PerSiteUniform({site.name: change})}), memory

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        changes, trained = reply.gather("update"), trainable(self.task.model())
        flat = {site: tree.flatten(tree.select(c, trained.__contains__)).double() for site, c in changes.items()}
        clusters, models = list[tuple[str, ...]](), list[Tree]()
        for sites, model in zip(state.clusters, state.models, strict=True):
            present = [site for site in sites if site in changes]
            parts = [sites]
            if present and self._divides(torch.stack([flat[s] for s in present]), state.round):
                one = bipartition(torch.stack([flat[s] for s in present]))
                first = {present[i] for i in one}
                parts = [tuple(s for s in sites if s in first), tuple(s for s in sites if s not in first)]
            for part in parts:
                there = [changes[site] for site in part if site in changes]
                clusters.append(part)
                models.append(tree.shift(model, reduce(tree.add, there), 1 / len(there)) if there else model)
        return State(state.round + 1, tuple(clusters), tuple(models))

    def _divides(self, changes: Tensor, round: int) -> bool:
        """Return whether a cluster with these changes [sites, numbers] is divided."""
        small, large = changes.mean(0).norm() < self.mean_below, changes.norm(dim=1).max() > self.largest_above
        return len(changes) > 2 and round >= self.start_round and bool(small) and bool(large)


def bipartition(changes: Tensor) -> list[int]:
    """Return one of two groups of the rows of ``changes``, by complete linkage of their cosines."""
    unit = changes / changes.norm(dim=1, keepdim=True).clamp_min(1e-12)
    cosine, groups = unit @ unit.T, [[i] for i in range(len(changes))]
    while len(groups) > 2:
        pairs = [(a, b) for a in range(len(groups)) for b in range(a)]
        a, b = max(pairs, key=lambda p: float(cosine[groups[p[0]]][:, groups[p[1]]].min()))
        groups[b] += groups.pop(a)
    return groups[0]
