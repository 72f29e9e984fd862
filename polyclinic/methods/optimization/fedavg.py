"""Federated averaging.

McMahan, Moore, Ramage, Hampson and Agüera y Arcas, "Communication-Efficient Learning of Deep Networks from
Decentralized Data", AISTATS 2017, Algorithm 1. https://arxiv.org/abs/1602.05629. Departure: sites send changes instead
of models. The mean is the same, and the server can scale its step.
"""

from dataclasses import dataclass
from typing import NamedTuple

from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.method import Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.base.site_weights import SizeWeighted


@savable("fedavg.State", 1)
class State(NamedTuple):
    """The model after ``round`` rounds."""

    round: int
    params: Tree


@dataclass(frozen=True)
class FedAvg(SizeWeighted[State]):
    """Sites train from the server's model; the server adds the mean of their changes.

    Attributes:
        lr: Step size of the server along the mean change; 1 for plain averaging.
        uniform: Whether all sites have equal weight, instead of in proportion to their training examples.
    """

    task: Task
    local: LocalTraining = LocalTraining()
    lr: float = 1.0
    uniform: bool = False

    def init(self, params: Tree) -> State:
        return State(0, params)

    def request(self, state: State) -> Request:
        return Request(state.round, {"params": state.params})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start = request.trees["params"]
        update = self.local.change(self.task, start, site, request.round)
        return Reply({"update": WeightedMean.of_own(update, self.site_weight(site))}), memory

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        return State(state.round + 1, reply.mean("update").apply_to(state.params, self.lr))
