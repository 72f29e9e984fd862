"""FedCy: labeled videos train phase recognition; unlabeled ones are learned from their temporal order.

Kassem, Alapatt, Mascagni, Karargyris and Padoy, "Federated Cycling (FedCy): Semi-Supervised Federated Learning of
Surgical Phases", IEEE TMI 2023, https://arxiv.org/abs/2203.07345. The exact losses were not available. Interpretation:
on labels, the task's loss and a supervised contrast between phases; without, temporal cycle consistency between two of
the site's videos; weights are averaged over both. Frames are examples; the data give the video of each in ``videos``
and are in temporal order.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.method import Request
from polyclinic.core.site import Site
from polyclinic.core.tree import Trees
from polyclinic.learning.networks.latent import encoded
from polyclinic.learning.objectives.contrastive import WithContrast
from polyclinic.learning.tasks.example_pool import fit_both
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.semi_supervised.video_cycle import clip, cycle_back


@dataclass(frozen=True)
class FedCy(FedAvg):
    """FedAvg over labeled and unlabeled videos; the latter are learned by temporal cycle consistency.

    Attributes:
        contrast: Weight of the supervised contrast, relative to the labels' loss.
        cycle: Weight of cycle consistency at a site that also has labels.
        frames: Number of frames of each of two videos that are compared.
        temperature: τ of both.
        trust: Weight of an unlabeled frame in the average over sites.
    """

    contrast: float = 0.1
    cycle: float = 0.1
    frames: int = 16
    temperature: float = 0.1
    trust: float = 0.5

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start, rng = request.trees["params"], site.rng(request.round, "clips")
        learner = WithContrast(self.task, self.contrast, self.temperature)
        by = self.cycle if len(site.data.get("train", ())) else 1.0

        def alone(model: nn.Module, x: Tensor) -> Tensor:
            """Return the loss of two clips; ``x``, whose frames are not in order, only counts the steps."""
            one, name = clip(site.data["unlabeled"], self.frames, rng)
            two, _ = clip(site.data["unlabeled"], self.frames, rng, other_than=name)
            seen = torch.cat([one, two]).to(site.device)
            u, v = F.normalize(encoded(self.task.network, model, seen), dim=1).split([len(one), len(two)])
            return by * (cycle_back(u, v, self.temperature) + cycle_back(v, u, self.temperature)) / 2

        end, labels, free = fit_both(self.local, self.task, start, site, request.round, learner.loss, alone)
        weight = labels + self.trust * free
        return Reply(
            {"update": WeightedMean.of(tree.sub(end, start), float(weight > 0) if self.uniform else weight)}
        ), memory
