"""FlexLoRA: the server averages the products of the sites' factors, and factorizes the mean anew.

Jiamu Bai, Daoyuan Chen, Bingchen Qian, Liuyi Yao and Yaliang Li, "Federated Fine-tuning of Large Language Models under
Heterogeneous Tasks and Client Resources", NeurIPS 2024, section 3.2, https://arxiv.org/abs/2402.11505. The mean is
exact up to what a singular value decomposition cuts off beyond the rank. Departures: all sites have the same rank, and
both factors get the square roots of the singular values. The server sees each site's factors, which secure sums
exclude.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply
from polyclinic.core.method import Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.networks.adapters import DOWN, UP, factorized, factors, is_factor, product
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.adapters.site_factors import reply_of, shares_of
from polyclinic.methods.base.site_weights import SizeWeighted


@savable("flexlora.State", 1)
class State(NamedTuple):
    """The model after ``round`` rounds, and the share of the last mean product's norm that was cut off."""

    round: int
    params: Tree
    cut: float


@dataclass(frozen=True)
class FlexLoRA(SizeWeighted[State]):
    """FedAvg, except for adapters: their products are averaged, and factorized by singular value decomposition.

    Attributes:
        uniform: Whether all sites have equal weight, instead of in proportion to their training examples.
    """

    task: Task
    local: LocalTraining = LocalTraining()
    uniform: bool = False

    needs_each_reply = True

    def init(self, params: Tree) -> State:
        return State(0, params, 0.0)

    def request(self, state: State) -> Request:
        return Request(state.round, {"params": state.params})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start = request.trees["params"]
        end = self.local.fit(self.task, start, site, request.round)
        own, change = tree.select(end, is_factor), tree.sub(end, start)
        return reply_of(site.name, change, own, self.site_weight(site)), memory

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        sites = reply.gather("factors")
        shares, moved = shares_of(sites, self.uniform), reply.mean("update").apply_to(state.params)
        cut = norm = 0.0
        for layer, (down, _) in factors(state.params).items():
            # ΔW = Σ p_i B_i A_i, without the common factor α / r
            products = [p * product(sites[name][layer + DOWN], sites[name][layer + UP]) for name, p in shares.items()]
            mean = torch.stack(products).sum(0)
            a, b, left = factorized(mean, len(down))
            moved = {**moved, layer + DOWN: a, layer + UP: b}
            cut, norm = cut + left**2, norm + float(mean.double().square().sum())
        return State(state.round + 1, moved, (cut / norm) ** 0.5 if norm else 0.0)
