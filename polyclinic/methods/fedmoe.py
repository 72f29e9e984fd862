"""Fed-MoE: a federated and a private model, mixed by a private gate.

Li, Gu, Dvornek, Staib, Ventola and Duncan, "Multi-site fMRI analysis using privacy-preserving federated learning and
domain adaptation: ABIDE results", Medical Image Analysis 2020, section 2.3.2. https://arxiv.org/abs/2001.05647.

The private model learns from its own loss, the federated one and the gate from the mixture's. Logits are mixed. For
images, the gate sees each channel's mean and deviation instead of every pixel.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polyclinic.core import tree
from polyclinic.core.method import Ask
from polyclinic.core.site import Site
from polyclinic.core.stats import Mean, Reply
from polyclinic.core.tree import Tree, Trees
from polyclinic.methods.fedavg import FedAvg
from polyclinic.tasks.composed import predicting_with
from polyclinic.tasks.local import Local
from polyclinic.tasks.mixture import Mixture
from polyclinic.tasks.model import initial
from polyclinic.tasks.task import Batch, Task


@dataclass(frozen=True)
class FedMoE(FedAvg):
    """FedAvg of one expert; a second expert and the gate between them never leave the site.

    The gate can lean on the private model where a site is unlike the others, and on the federated one elsewhere.
    """

    @property
    def predicts(self) -> Task:
        return predicting_with(self.task, Mixture(self.task.network))

    def site_update(self, ask: Ask, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start = self.model_at(ask, memory)
        end = self.local.fit(self.predicts, start, site, ask.round, loss=self._loss)
        update = tree.under("shared", tree.sub(end, start))
        return Reply({"update": Mean.of(update, self.weight(site))}), {**memory, "own": tree.select(end, _private)}

    def model_at(self, ask: Ask, memory: Trees) -> Tree:
        params = ask.trees["params"]
        own = memory["own"] if "own" in memory else self._first(params)
        return {**tree.prefixed("shared", params), **own}

    def _first(self, params: Tree) -> Tree:
        """A private model that begins as the federated one, and a gate at one half."""
        gate = tree.select(initial(self.predicts.network, 0), lambda name: name.startswith("gate."))
        return {**tree.prefixed("own", params), **{name: torch.zeros_like(leaf) for name, leaf in gate.items()}}

    def _loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.task.loss(model, batch) + self.task.loss(model.get_submodule("own"), batch)


def _private(name: str) -> bool:
    return not name.startswith("shared.")


def fed_moe(task: Task, local: Local, *, lr: float = 1.0, uniform: bool = True) -> FedMoE:
    """A federated and a private model, mixed by a private gate; sites count the same, as in the paper."""
    return FedMoE(task, local, lr, uniform)
