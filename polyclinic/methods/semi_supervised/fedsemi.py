"""Federated semi-supervised learning with pseudo-labels: some sites have labels, others only images.

Yang, Xu, Li, Myronenko, Roth, Harmon, Xu, Turkbey, Turkbey, Wang, Zhu, Carrafiello, Patella, Cariati, Obinata, Mori,
Tamura, An, Wood and Xu, "Federated semi-supervised learning for COVID region segmentation in chest CT using
multi-national data from China, Italy, Japan", Medical Image Analysis 70:101992, 2021,
https://arxiv.org/abs/2011.11750. The exact formulas were not at hand. Our reading: after a warm-up on labeled sites,
each image is pseudo-labeled from a weak view by the model being trained, a strong view is learned from it where the
model is sure enough, and unlabeled images count less in the average. Pseudo-labels enter by cross-entropy, labels by
the task's own loss (Dice and cross-entropy for segmentation). A site with both kinds of data learns from both.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.method import Request
from polyclinic.core.site import Site
from polyclinic.core.tree import Trees
from polyclinic.learning.objectives.pseudo_labels import pseudo_loss, two_views
from polyclinic.learning.tasks.example_pool import fit_both, size
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import FedAvg


@dataclass(frozen=True)
class FedSemi(FedAvg):
    """FedAvg in which sites without labels learn from the model's own sure predictions, once it can be trusted.

    Attributes:
        warmup: Rounds in which unlabeled images wait.
        threshold: The least probability of a pseudo-label.
        trust: What an unlabeled image counts, in a site's loss beside its labels and in the average over sites.
    """

    warmup: int = 1
    threshold: float = 0.9
    trust: float = 0.5

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start, rng = request.trees["params"], site.rng(request.round, "views")
        labeled = bool(size(site.data, "train"))

        def alone(model: nn.Module, x: Tensor) -> Tensor:
            weak, strong = two_views(self.task.kind, x, rng)
            with torch.no_grad():
                believed = model(weak).softmax(1)
            return (self.trust if labeled else 1.0) * pseudo_loss(model(strong), believed, self.threshold)

        wait = request.round < self.warmup
        end, labels, free = fit_both(
            self.local, self.task, start, site, request.round, self.task.loss, alone, wait=wait
        )
        weight = labels + self.trust * free
        weight = float(weight > 0) if self.uniform else weight
        return Reply({"update": WeightedMean.of(tree.sub(end, start), weight)}), memory


def fedsemi(
    task: Task,
    local: LocalTraining,
    rounds: int,
    *,
    warmup: float = 0.2,
    threshold: float = 0.9,
    trust: float = 0.5,
    lr: float = 1.0,
    uniform: bool = False,
) -> FedSemi:
    """Pseudo-labels at sites without labels, after the share ``warmup`` of the rounds.

    Args:
        warmup: The share of them in which unlabeled images wait.
    """
    return FedSemi(task, local, lr, uniform, math.ceil(warmup * rounds), threshold, trust)
