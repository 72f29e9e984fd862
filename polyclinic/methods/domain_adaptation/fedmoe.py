"""Fed-MoE: a federated and a private model, mixed by a private gate.

Li, Gu, Dvornek, Staib, Ventola and Duncan, "Multi-site fMRI analysis using privacy-preserving federated learning and
domain adaptation: ABIDE results", Medical Image Analysis 2020, section 2.3.2. https://arxiv.org/abs/2001.05647.

The private model learns from its own loss, the federated one and the gate from the mixture's. Logits are mixed. For
images, the gate receives each channel's mean and standard deviation instead of every pixel.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.method import Request
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.batch import Batch
from polyclinic.learning.networks.model_mixture import Mixture
from polyclinic.learning.networks.model_tree import initial
from polyclinic.learning.tasks.task import Task
from polyclinic.methods.optimization.fedavg import FedAvg


@dataclass(frozen=True)
class FedMoE(FedAvg):
    """FedAvg of one expert; a second expert and the gate between them never leave the site.

    Attributes:
        uniform: Whether all sites have equal weight, as in the paper, instead of in proportion to their training
            examples.
    """

    uniform: bool = True

    @property
    def prediction_task(self) -> Task:
        return self.task.with_network(Mixture(self.task.network))

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start = self.site_model(request, memory)
        end = self.local.fit(self.prediction_task, start, site, request.round, loss=self._loss)
        update = tree.under("shared", tree.sub(end, start))
        return Reply({"update": WeightedMean.of(update, self.site_weight(site))}), {
            **memory,
            "own": tree.select(end, _private),
        }

    def site_model(self, request: Request, memory: Trees) -> Tree:
        params = request.trees["params"]
        own = memory["own"] if "own" in memory else self._first(params)
        return {**tree.prefixed("shared", params), **own}

    def _first(self, params: Tree) -> Tree:
        """Return a private model equal to the federated one, and a gate at one half."""
        gate = tree.select(initial(self.prediction_task.network, 0), lambda name: name.startswith("gate."))
        return {**tree.prefixed("own", params), **{name: torch.zeros_like(leaf) for name, leaf in gate.items()}}

    def _loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.task.loss(model, batch) + self.task.loss(model.get_submodule("own"), batch)


def _private(name: str) -> bool:
    return not name.startswith("shared.")
