"""A shared CNN and, at each site, a graph network over its labels.

Chakravarty, Kar, Sethuraman and Sheet, "Federated Learning for Site Aware Chest Radiograph Screening", ISBI 2021.
https://doi.org/10.1109/ISBI48211.2021.9433876. See ``polyclinic.tasks.label_graph`` for how far the paper was at hand.
"""

from dataclasses import dataclass

import torch

from polyclinic.core import tree
from polyclinic.core.method import Ask
from polyclinic.core.site import Site
from polyclinic.core.stats import Reply
from polyclinic.core.tree import Tree, Trees
from polyclinic.methods.fedavg import FedAvg
from polyclinic.methods.personal import Personal, State
from polyclinic.tasks.composed import predicting_with
from polyclinic.tasks.label_graph import GraphHeaded, comorbidity
from polyclinic.tasks.latent import head_width
from polyclinic.tasks.local import Local
from polyclinic.tasks.task import Task


@dataclass(frozen=True)
class SiteGraph(Personal):
    """FedAvg of the CNN; the graph over labels, with edges from the site's own co-morbidity, never leaves the site.

    A site that was never seen uses the graph network as it began, without edges.

    Attributes:
        task: With the graph-headed network.
    """

    task: Task

    @property
    def predicts(self) -> Task:
        return self.task

    def init(self, params: Tree) -> State:
        begun = self.task.first()
        body = {name: leaf for name, leaf in tree.prefixed("body", params).items() if name in begun}
        return super().init({**begun, **body})

    def site_update(self, ask: Ask, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        if "own" not in memory:
            data = site.data["train"]
            edges = comorbidity(data[torch.arange(len(data))][1], self.task.network.outputs)
            memory = {**memory, "own": {**ask.trees["own"], "graph.adjacency": edges}}
        return super().site_update(ask, memory, site)


def in_graph(name: str) -> bool:
    """Whether a tensor belongs to the graph network."""
    return name.startswith("graph.")


def site_graph(task: Task, local: Local, *, width: int = 16, depth: int = 2, uniform: bool = False) -> SiteGraph:
    """A shared CNN; a graph network over labels stays at each site, ``width`` numbers a node and ``depth`` layers.

    Args:
        width: How many numbers describe a label in the graph.
        depth: How many layers the graph network has.
    """
    headed = predicting_with(task, GraphHeaded(task.network, head_width(task), width, depth))
    return SiteGraph(FedAvg(headed, local, uniform=uniform), in_graph, headed)
