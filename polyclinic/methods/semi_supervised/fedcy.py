"""FedCy: sites with labeled videos teach what phases look like; sites without learn from the order of time.

Kassem, Alapatt, Mascagni, Karargyris and Padoy, "Federated Cycling (FedCy): Semi-Supervised Federated Learning of
Surgical Phases", IEEE TMI 2023, https://arxiv.org/abs/2203.07345. The exact losses were not at hand. Our reading: on
labels, the task's loss and a supervised contrast, which makes the frames of a phase alike; without, temporal cycle
consistency between two of the site's videos, so that moments keep their place; weights are averaged over both. Frames
are examples; the data say by ``videos`` to which video each belongs, and are in the order of time.
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
    """FedAvg over labeled and unlabeled videos, the latter learned from the order of their moments.

    Attributes:
        contrast: What the supervised contrast counts beside the labels.
        cycle: What cycle consistency counts at a site that has labels too.
        frames: How many frames of each of two videos are compared.
        temperature: τ of both.
        trust: What an unlabeled frame counts in the average over sites.
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
            """Of two clips; the minibatch ``x`` only counts the steps, for its frames are in no order."""
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
