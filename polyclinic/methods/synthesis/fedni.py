"""FedNI: sites complete their part of a population graph before they learn from it.

Peng, Wang, Dvornek, Zhu and Li, "FedNI: Federated Graph Learning with Network Inpainting for Population-Based Disease
Prediction", IEEE TMI 2022, https://arxiv.org/abs/2112.10166: first, all sites train a generator of missing neighbors;
then a graph network classifies patients in the completed graphs. This is a simplified version. Departures: the graph
connects the patients of a minibatch with similar representations, not those with similar age and sex; the generator
learns by mean absolute error alone, without the paper's discriminator; each patient gets one generated neighbor.
"""

from dataclasses import dataclass

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.method import Request
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.networks.model_tree import initial
from polyclinic.learning.tasks.example_pool import all_inputs
from polyclinic.learning.tasks.task import Task
from polyclinic.methods.base.phases import share_of
from polyclinic.methods.optimization.fedavg import FedAvg, State
from polyclinic.methods.synthesis.population_graph import Inpainting, populated


def in_generator(name: str) -> bool:
    """Return whether a tensor belongs to the generator of neighbors."""
    return name.startswith("generator.")


@dataclass(frozen=True)
class FedNI(FedAvg):
    """Federated averaging of a generator of missing neighbors, then of a network that learns with them.

    The first phase uses all images and no label.

    Attributes:
        rounds: Number of planned rounds.
        pretrain: Share of the rounds in which the generator is trained.
        hidden: Fraction of patients that are hidden from the generator in its training.
        neighbors: Number of other patients of a minibatch that each patient is connected to.
    """

    rounds: int = 1
    pretrain: float = 0.2
    hidden: float = 0.5
    neighbors: int = 5

    @property
    def prediction_task(self) -> Task:
        return populated(self.task, self.neighbors)

    def init(self, params: Tree) -> State:
        return State(0, {**initial(self.prediction_task.network, 0), **tree.prefixed("base", params)})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start, task = request.trees["params"], self.prediction_task
        if request.round < share_of(self.rounds, self.pretrain):
            data, learner = all_inputs(site.data), Inpainting(task, self.hidden)
            end = self.local.fit(learner, start, site, request.round, data=data, trainable=in_generator)
            moved = {name: end[name] if in_generator(name) else leaf for name, leaf in start.items()}
            weight = 1.0 if self.uniform else float(len(data))
            return Reply({"update": WeightedMean.of(tree.sub(moved, start), weight)}), memory
        end = self.local.fit(task, start, site, request.round, trainable=lambda name: not in_generator(name))
        return Reply({"update": self.update(end, start, site)}), memory
