"""IFCA: several models; each site trains the one with the lowest loss on its data.

Ghosh, Chung, Yin and Ramchandran, "An Efficient Framework for Clustered Federated Learning", NeurIPS 2020, Algorithm 1
with model averaging. https://arxiv.org/abs/2006.04088.

Departure: in the paper a site tells the server its cluster. Here it sends one sum for every cluster, 0 for those that
it is not in, so that secure summation hides the assignment, at k times the traffic. All models but the first have
random initial weights.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.method import Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.batch import chunks
from polyclinic.learning.networks.model_tree import cached_model
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.base.site_weights import SizeWeighted


@savable("ifca.State", 1)
class State(NamedTuple):
    """One model for each cluster, and its weight in the last round, [clusters]."""

    round: int
    models: tuple[Tree, ...]
    weights: torch.Tensor

    @property
    def params(self) -> Tree:
        """The model of the cluster with the largest weight."""
        return self.models[int(self.weights.argmax())]


@dataclass(frozen=True)
class IFCA(SizeWeighted[State]):
    """FedAvg within clusters: a site joins the model with the lowest loss on its data.

    A site that never trained predicts with the model of the cluster with the largest weight.

    Attributes:
        clusters: k, the number of models.
        uniform: Whether all sites have equal weight, instead of in proportion to their training examples.
        lr: Step size of the server along the mean change.
    """

    task: Task
    local: LocalTraining = LocalTraining()
    clusters: int = 2
    uniform: bool = False
    lr: float = 1.0

    def init(self, params: Tree) -> State:
        others = (self.task.first(1000 + j) for j in range(1, self.clusters))
        return State(0, (params, *others), torch.zeros(self.clusters))

    def request(self, state: State) -> Request:
        models = {f"cluster.{j}": model for j, model in enumerate(state.models)}
        return Request(state.round, models)

    def evaluation_request(self, state: State) -> Request:
        request = self.request(state)
        return replace(request, trees={**request.trees, "params": state.params})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        models = [request.trees[f"cluster.{j}"] for j in range(self.clusters)]
        losses = [self._loss(model, site) for model in models]
        mine = min(range(self.clusters), key=losses.__getitem__)  # ĵ = argmin_j F_i(θ_j)
        end = self.local.fit(self.task, models[mine], site, request.round)
        weight = self.site_weight(site)
        total: dict[str, torch.Tensor] = {"weights": torch.zeros(self.clusters)}
        total["weights"][mine] = weight
        for j, model in enumerate(models):
            change = tree.scale(tree.sub(end, model), weight) if j == mine else tree.zeros(model)
            total |= tree.prefixed(str(j), change)
        return Reply({"update": WeightedMean(total, 1.0)}), {**memory, "cluster": {"index": torch.tensor(mine)}}

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        total = reply.mean("update").total
        models = [self._moved(model, total, j) for j, model in enumerate(state.models)]
        return State(state.round + 1, tuple(models), total["weights"])

    def site_model(self, request: Request, memory: Trees) -> Tree:
        return request.trees[f"cluster.{int(memory['cluster']['index'])}" if "cluster" in memory else "params"]

    def _moved(self, model: Tree, total: Tree, j: int) -> Tree:
        weight = float(total["weights"][j])
        return tree.shift(model, tree.scale(tree.under(str(j), total), self.lr / weight)) if weight > 0 else model

    def _loss(self, params: Tree, site: Site) -> float:
        """Return F_i(θ), in evaluation mode."""
        model, data, loss = cached_model(self.task, params, site.device).eval(), site.data["train"], 0.0
        with torch.inference_mode():
            for chunk in chunks(data, 64):
                x, y = data[chunk]
                loss += float(self.task.loss(model, (x.to(site.device), y.to(site.device)))) * len(chunk)
        return loss / len(data)
