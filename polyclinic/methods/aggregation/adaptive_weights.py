"""FedMix's adaptive weights: sites count by how much they have, and by how badly they are served.

Jeffry Wicaksana, Zengqiang Yan, Dong Zhang, Xijie Huang, Huimin Wu, Xin Yang and Kwang-Ting Cheng, "FedMix: Mixed
Supervised Federated Learning for Medical Image Segmentation", IEEE Transactions on Medical Imaging 42 (2023), 1955,
https://arxiv.org/abs/2205.01840. This is the weighting alone, for any task; ``fedmix`` trains with mixed labels and
weighs in the same way.

Both terms are divided by a sum over sites, so that the sites first say their two numbers, which add up, and learn the
sums; then each weighs its own update. Nobody sees one site's numbers or update.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.method import Job, Method, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.tasks.risk import risk
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining


@savable("fedmix-weights.State", 1)
class State(NamedTuple):
    """The model and, between the two exchanges of a round, the sums over sites."""

    round: int
    params: Tree
    sums: Tree


def amounts(examples: float, loss: float, beta: float = 1.5) -> Tree:
    """The two numbers of a site whose sums over sites ``weight`` needs: n and L^β."""
    return {
        "size": torch.tensor(examples, dtype=torch.float64),
        "loss": torch.tensor(max(loss, 0.0) ** beta, dtype=torch.float64),
    }


def weight(own: Tree, sums: Tree, lam: float = 10.0) -> float:
    """What a site counts: n_i / Σ n + λ L_i^β / Σ L^β. The paper's division by 1 + λ is the mean's own."""
    return float(own["size"] / sums["size"] + lam * own["loss"] / sums["loss"].clamp_min(1e-12))


@dataclass(frozen=True)
class AdaptiveWeights(Method[State]):
    """FedAvg in which a site counts by its share of the examples and, λ times that, by its share of the loss.

    Attributes:
        lam: λ, what the loss counts. ``beta``: β, how far it favors the worst.
    """

    task: Task
    local: LocalTraining = LocalTraining()
    lam: float = 10.0
    beta: float = 1.5

    def init(self, params: Tree) -> State:
        return State(0, params, {})

    @property
    def jobs(self) -> tuple[Job, ...]:
        return Job("train"), Job("send", at_start=False)

    def request(self, state: State) -> Request:
        return Request(state.round, {"params": state.params, "sums": state.sums}, "send" if state.sums else "train")

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start = request.trees["params"]
        if request.job == "send" and "change" not in memory:
            return Reply(), memory  # it was lost before it could say its numbers
        if request.job == "send":
            own = weight(memory["amounts"], request.trees["sums"], self.lam)
            return Reply({"update": WeightedMean.of(memory["change"], own)}), {
                k: t for k, t in memory.items() if k != "change"
            }
        end = self.local.fit(self.task, start, site, request.round)
        own_amounts = amounts(len(site.data["train"]), risk(self.task, end, site, request.round), self.beta)
        return Reply({"amounts": WeightedMean(own_amounts, 1.0)}), {
            **memory,
            "amounts": own_amounts,
            "change": tree.sub(end, start),
        }

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        if not state.sums:
            return state._replace(sums=reply.mean("amounts").total)
        return State(state.round + 1, reply.mean("update").apply_to(state.params), {})
