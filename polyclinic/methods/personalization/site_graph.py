"""A shared CNN and, at each site, a graph network over its labels.

Chakravarty, Kar, Sethuraman and Sheet, "Federated Learning for Site Aware Chest Radiograph Screening", ISBI 2021.
https://doi.org/10.1109/ISBI48211.2021.9433876. ``polyclinic.methods.personalization.label_graph`` says how far the
paper was available.
"""

from dataclasses import dataclass

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply
from polyclinic.core.method import Request
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.batch import targets_of
from polyclinic.learning.networks.latent import head_width
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.personalization.label_graph import GraphHeaded, comorbidity
from polyclinic.methods.personalization.partial_personalization import Personal, State


@dataclass(frozen=True)
class SiteGraph(Personal):
    """FedAvg of the CNN; the graph over labels, with edges from the site's own co-morbidity, never leaves the site.

    A site that never trained uses the initial graph network, without edges.

    Attributes:
        task: The task with the graph-headed network.
    """

    task: Task

    @property
    def prediction_task(self) -> Task:
        return self.task

    def init(self, params: Tree) -> State:
        begun = self.task.first()
        body = {name: leaf for name, leaf in tree.prefixed("body", params).items() if name in begun}
        return super().init({**begun, **body})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        if "own" not in memory:
            data = site.data["train"]
            edges = comorbidity(targets_of(data), self.task.network.outputs)
            memory = {**memory, "own": {**request.trees["own"], "graph.adjacency": edges}}
        return super().site_update(request, memory, site)


def in_graph(name: str) -> bool:
    """Return whether a tensor belongs to the graph network."""
    return name.startswith("graph.")


def site_graph(
    task: Task, local: LocalTraining, *, width: int = 16, depth: int = 2, uniform: bool = False
) -> SiteGraph:
    """Compose FedAvg of the graph-headed network with a graph network that stays at each site.

    Args:
        width: Number of features of a label in the graph.
        depth: Number of layers of the graph network.
    """
    headed = task.with_network(GraphHeaded(task.network, head_width(task.network), width, depth))
    return SiteGraph(FedAvg(headed, local, uniform=uniform), in_graph, headed)
