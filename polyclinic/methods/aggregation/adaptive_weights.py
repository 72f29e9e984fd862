"""FedMix's adaptive weights: a site's weight depends on its number of examples and on its loss.

Jeffry Wicaksana, Zengqiang Yan, Dong Zhang, Xijie Huang, Huimin Wu, Xin Yang and Kwang-Ting Cheng, "FedMix: Mixed
Supervised Federated Learning for Medical Image Segmentation", IEEE Transactions on Medical Imaging 42 (2023), 1955,
https://arxiv.org/abs/2205.01840. This is the weighting alone, for any task; ``fedmix`` trains with mixed labels and
uses the same weights.

Both terms are divided by a sum over sites. The sites therefore first send two numbers, which are summed, and receive
the sums; then each site weights its own update. The numbers and updates of single sites remain hidden under secure
summation.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.method import Capabilities, Job, Method, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.tasks.risk import risk
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining


@savable("fedmix-weights.State", 1)
class State(NamedTuple):
    """The model and, between the two requests of a round, the sums over sites."""

    round: int
    params: Tree
    sums: Tree


def amounts(examples: float, loss: float, beta: float = 1.5) -> Tree:
    """Return the two numbers of a site whose sums over sites ``weight`` needs: ``n`` and ``L^β``."""
    return {
        "size": torch.tensor(examples, dtype=torch.float64),
        "loss": torch.tensor(max(loss, 0.0) ** beta, dtype=torch.float64),
    }


def weight(own: Tree, sums: Tree, lam: float = 10.0) -> float:
    """Return a site's weight, ``n_i / Σ n + λ L_i^β / Σ L^β``. The mean supplies the paper's division by 1 + λ."""
    return float(own["size"] / sums["size"] + lam * own["loss"] / sums["loss"].clamp_min(1e-12))


@dataclass(frozen=True)
class AdaptiveWeights(Method[State]):
    """FedAvg in which a site's weight is its share of the examples plus λ times its share of the loss.

    Attributes:
        lam: λ, the weight of the share of the loss.
        beta: β, the exponent of the loss; larger values favor sites with a high loss.
    """

    task: Task
    local: LocalTraining = LocalTraining()
    lam: float = 10.0
    beta: float = 1.5

    capabilities = Capabilities(uniform=False)

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
            return Reply(), memory  # the site was lost before it sent its numbers
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
        return State(state.round + 1, reply.applied("update", state.params), {})
