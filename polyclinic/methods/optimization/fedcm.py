"""FedCM: sites mix the server's last direction into every local gradient.

Xu, Wang, Wang and Yao, "FedCM: Federated Learning with Client-level Momentum", 2021, Algorithm 1,
https://arxiv.org/abs/2106.10874. All sites have equal weight, as in the paper. Departure: the number of local steps K
is the sites' mean if they differ. The direction is divided by the learning rate, so that training must use plain SGD.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.method import Method, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError
from polyclinic.learning.tasks.risk import trained
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining


@savable("fedcm.State", 1)
class State(NamedTuple):
    """The model x and the direction Δ of the last round, as a gradient."""

    round: int
    params: Tree
    direction: Tree


@dataclass(frozen=True)
class FedCM(Method[State]):
    """FedAvg whose sites step along ``α g + (1 − α) Δ``. Sites keep no state, so that they may join and leave.

    Attributes:
        alpha: α, the weight of the site's own gradient; 0.1 in the paper.
        lr: Step size of the server along the mean change; 1 for plain averaging.
    """

    task: Task
    local: LocalTraining = LocalTraining()
    alpha: float = 0.1
    lr: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise ConfigError(f"fedcm: alpha must be above 0 and at most 1, not {self.alpha:g}")
        if self.local.optimizer != "sgd" or self.local.momentum:
            raise ConfigError(
                'fedcm has a momentum of its own: set training.optimizer = "sgd" and momentum = 0, '
                f"not {self.local.optimizer} with momentum {self.local.momentum:g}"
            )

    def init(self, params: Tree) -> State:
        return State(0, params, tree.zeros(tree.select(params, trained(self.task).__contains__)))

    def request(self, state: State) -> Request:
        return Request(state.round, {"params": state.params, "direction": state.direction})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start, towards = request.trees["params"], request.trees["direction"]
        end = self.local.fit(
            self.task,
            start,
            site,
            request.round,
            # x ← x − η_l (α ∇f(x; ζ) + (1 − α) Δ)
            gradient_hook=lambda name, g: self.alpha * g + (1 - self.alpha) * towards[name].to(g.device),
        )
        steps = {"steps": torch.tensor(float(self.local.count(site.data["train"])), dtype=torch.float64)}
        return Reply({"update": WeightedMean.of(tree.sub(end, start)), "work": WeightedMean.of(steps)}), memory

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        mean = reply.mean("update").value
        work = max(float(reply.mean("work").value["steps"]), 1.0) * self.local.rate(state.round)
        # Δ ← −1 / (η_l K |S|) Σ (x_i − x)
        direction = tree.scale(tree.select(mean, state.direction.__contains__), -1 / work)
        return State(state.round + 1, tree.shift(state.params, mean, self.lr), direction)
