"""FedNI: sites complete their part of a population graph before they learn from it.

Peng, Wang, Dvornek, Zhu and Li, "FedNI: Federated Graph Learning with Network Inpainting for Population-Based Disease
Prediction", IEEE TMI 2022, https://arxiv.org/abs/2112.10166: first, a generator of missing neighbors is learned by all
sites; then a graph network classifies patients in the completed graphs. This is a simple version: the graph joins the
patients of a minibatch whose representations are alike, not those with alike age and sex; the generator learns by mean
absolute error alone, without the paper's discriminator; each patient gets one imagined neighbor.
"""

from dataclasses import dataclass
from typing import Any

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.method import Request
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.networks.model_tree import initial
from polyclinic.learning.tasks.example_pool import all_inputs
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.base.phases import share_of
from polyclinic.methods.optimization.fedavg import FedAvg, State
from polyclinic.methods.synthesis.population_graph import Inpainting, populated


def in_generator(name: str) -> bool:
    """Whether a tensor belongs to what imagines neighbors."""
    return name.startswith("generator.")


@dataclass(frozen=True)
class FedNI(FedAvg):
    """Federated averaging of a generator of missing neighbors, then of a network that learns with them.

    The first phase sees no label and uses all images.

    Attributes:
        task: The study's, with a population graph.
        pretrain: How many rounds the generator learns.
        hidden: The share of patients that are hidden from it meanwhile.
    """

    pretrain: int = 1
    hidden: float = 0.5

    def init(self, params: Tree) -> State:
        return State(0, {**initial(self.task.network, 0), **tree.prefixed("base", params)})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start = request.trees["params"]
        if request.round < self.pretrain:
            data, learner = all_inputs(site.data), Inpainting(self.task, self.hidden)
            end = self.local.fit(learner, start, site, request.round, data=data, trainable=in_generator)
            moved = {name: end[name] if in_generator(name) else leaf for name, leaf in start.items()}
            return Reply({"update": WeightedMean.of(tree.sub(moved, start), float(len(data)))}), memory
        end = self.local.fit(self.task, start, site, request.round, trainable=lambda name: not in_generator(name))
        return Reply({"update": self.update(end, start, site)}), memory

    @property
    def prediction_task(self) -> Any:
        return self.task


def fedni(
    task: Task,
    local: LocalTraining,
    rounds: int,
    *,
    pretrain: float = 0.2,
    hidden: float = 0.5,
    neighbors: int = 5,
    lr: float = 1.0,
    uniform: bool = False,
) -> FedNI:
    """Population graphs, completed by what was learned in the first share ``pretrain`` of the rounds.

    Args:
        pretrain: The share of them in which the generator of neighbors learns.
        hidden: The share of patients that are hidden from it meanwhile.
        neighbors: How many others of a minibatch each patient is joined to.
    """
    return FedNI(populated(task, neighbors), local, lr, uniform, share_of(rounds, pretrain), hidden)
