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
from polyclinic.core.aggregates import PerSite, Reply, WeightedMean
from polyclinic.core.method import Capabilities, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ProtocolError
from polyclinic.learning.networks.adapters import DOWN, UP, factorized, factors, is_factor, product
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.base.site_weights import SizeWeighted

WEIGHT = "weight"


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

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(needs_each_reply=True, uniform=self.uniform)

    def init(self, params: Tree) -> State:
        return State(0, params, 0.0)

    def request(self, state: State) -> Request:
        return Request(state.round, {"params": state.params})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start = request.trees["params"]
        end = self.local.fit(self.task, start, site, request.round)
        others = tree.select(tree.sub(end, start), lambda name: not is_factor(name))
        weight = self.site_weight(site)
        own = {**tree.select(end, is_factor), WEIGHT: torch.tensor(weight, dtype=torch.float64)}
        return Reply({"update": WeightedMean.of(others, weight), "factors": PerSite({site.name: own})}), memory

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        sites = reply.gather("factors")
        weights = {name: self._weight(name, own) for name, own in sites.items()}
        total, moved = sum(weights.values()), reply.mean("update").apply_to(state.params)
        cut = norm = 0.0
        for layer, (down, _) in factors(state.params).items():
            # ΔW = Σ p_i B_i A_i, without the common factor α / r
            pairs = {name: (own[layer + DOWN], own[layer + UP]) for name, own in sorted(sites.items())}
            mean = torch.stack([weights[name] / total * product(a, b) for name, (a, b) in pairs.items()]).sum(0)
            a, b, left = factorized(mean, len(down))
            moved = {**moved, layer + DOWN: a, layer + UP: b}
            cut, norm = cut + left**2, norm + float(mean.double().square().sum())
        return State(state.round + 1, moved, (cut / norm) ** 0.5 if norm else 0.0)

    def _weight(self, site: str, own: Tree) -> float:
        """Return a site's weight.

        Raises:
            ProtocolError: If it is not a positive finite number.
        """
        weight = float(own[WEIGHT]) if WEIGHT in own and own[WEIGHT].numel() == 1 else 0.0
        if not 0 < weight < float("inf"):
            raise ProtocolError(f"{site} sent the weight {weight}, which is not a positive finite number")
        return 1.0 if self.uniform else weight
