"""Federated semi-supervised learning with pseudo-labels: some sites have labels, others only images.

Yang, Xu, Li, Myronenko, Roth, Harmon, Xu, Turkbey, Turkbey, Wang, Zhu, Carrafiello, Patella, Cariati, Obinata, Mori,
Tamura, An, Wood and Xu, "Federated semi-supervised learning for COVID region segmentation in chest CT using
multi-national data from China, Italy, Japan", Medical Image Analysis 70:101992, 2021, https://arxiv.org/abs/2011.11750.
The exact formulas were not available. Interpretation: after a warm-up on labeled sites, the model pseudo-labels each
image from a weak view, learns a strong view from confident pseudo-labels, and unlabeled images have less weight in the
average. Pseudo-labels enter by cross-entropy, labels by the task's own loss (Dice and cross-entropy for segmentation).
A site with both kinds of data learns from both.
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
from polyclinic.methods.optimization.fedavg import FedAvg


@dataclass(frozen=True)
class FedSemi(FedAvg):
    """FedAvg in which unlabeled images are learned from the model's confident predictions after a warm-up.

    Attributes:
        rounds: Number of planned rounds.
        warmup: Share of the rounds in which unlabeled images are not used.
        threshold: Least probability of a pseudo-label.
        trust: Weight of an unlabeled image, in a site's loss relative to its labels and in the average over sites.
    """

    rounds: int = 1
    warmup: float = 0.2
    threshold: float = 0.9
    trust: float = 0.5

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start, rng = request.trees["params"], site.rng(request.round, "views")
        labeled = bool(size(site.data, "train"))

        def alone(model: nn.Module, x: Tensor) -> Tensor:
            weak, strong = two_views(self.task.kind, x, rng)
            with torch.no_grad():
                predicted = model(weak).softmax(1)
            return (self.trust if labeled else 1.0) * pseudo_loss(model(strong), predicted, self.threshold)

        wait = request.round < math.ceil(self.warmup * self.rounds)
        end, labels, free = fit_both(
            self.local, self.task, start, site, request.round, self.task.loss, alone, wait=wait
        )
        weight = labels + self.trust * free
        weight = float(weight > 0) if self.uniform else weight
        return Reply({"update": WeightedMean.of(tree.sub(end, start), weight)}), memory
