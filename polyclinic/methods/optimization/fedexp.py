"""FedExP: the server's step grows with the disagreement of the sites' updates.

Jhunjhunwala, Wang and Joshi, "FedExP: Speeding Up Federated Averaging via Extrapolation", ICLR 2023, Algorithm 1 and
equation 7, https://arxiv.org/abs/2301.09604. As in the published code, the mean of the last two models predicts, and
sites are weighted by examples. Departure: ε is that of the paper, whereas the code multiplies it by the number of
sites. Running statistics move by the mean.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.method import Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError
from polyclinic.learning.tasks.risk import trained
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.base.site_weights import SizeWeighted


@savable("fedexp.State", 1)
class State(NamedTuple):
    """The model w, the mean of the last two models, and the last step of the server."""

    round: int
    current: Tree
    params: Tree
    step: float


@dataclass(frozen=True)
class FedExP(SizeWeighted[State]):
    """FedAvg with the server's step ``η = max(1, Σ p_i ‖Δ_i‖² / (2 (‖Δ̄‖² + ε)))``.

    Only sums leave the sites: of the changes, and of their squared lengths.

    Attributes:
        epsilon: ε, which bounds the step if the changes cancel; 0.001 to 0.1 in the paper.
        uniform: Whether all sites have equal weight, instead of in proportion to their training examples.
    """

    task: Task
    local: LocalTraining = LocalTraining()
    epsilon: float = 1e-3
    uniform: bool = False

    def __post_init__(self) -> None:
        if self.epsilon <= 0:
            raise ConfigError(f"fedexp: epsilon must be above 0, not {self.epsilon:g}")

    def init(self, params: Tree) -> State:
        return State(0, params, params, 1.0)

    def request(self, state: State) -> Request:
        return Request(state.round, {"params": state.current})

    def evaluation_request(self, state: State) -> Request:
        return Request(state.round, {"params": state.params})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start = request.trees["params"]
        change = self.local.change(self.task, start, site, request.round)
        learned, weight = tree.select(change, trained(self.task).__contains__), self.site_weight(site)
        square = {"square": torch.tensor(tree.dot(learned, learned), dtype=torch.float64)}
        return Reply({"update": WeightedMean.of(change, weight), "square": WeightedMean.of(square, weight)}), memory

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        mean, square = reply.mean("update").value, float(reply.mean("square").value["square"])
        learned = tree.select(mean, trained(self.task).__contains__)
        # η = max(1, Σ p_i ‖Δ_i‖² / (2 (‖Δ̄‖² + ε)))
        step = max(1.0, square / (2 * (tree.dot(learned, learned) + self.epsilon)))
        moved = tree.shift(tree.shift(state.current, mean), learned, step - 1.0)
        shown = tree.lerp(state.current, moved, 0.5) if state.round else moved
        return State(state.round + 1, moved, {**moved, **tree.select(shown, learned.__contains__)}, step)
