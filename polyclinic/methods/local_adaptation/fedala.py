"""FedALA: each site learns, element by element, how much of the shared model's head to take over.

Zhang, Hua, Wang, Song, Xue, Ma and Guan, "FedALA: Adaptive Local Aggregation for Personalized Federated Learning", AAAI
2023, Algorithm 1, https://arxiv.org/abs/2212.01197, after the published code. Departures: the layers whose mixture is
learned are the head, the paper's p = 1, or all; running statistics are the shared model's; the first learning of the
weights ends after at most 100 passes; a site predicts with its model after training instead of before it.
"""

import statistics
from dataclasses import dataclass
from typing import Literal

import torch

from polyclinic.core.aggregates import Reply
from polyclinic.core.method import Request
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.networks.batch_statistics import batches
from polyclinic.learning.networks.functional import at, still
from polyclinic.learning.networks.model_tree import cached_model
from polyclinic.learning.tasks.risk import trained
from polyclinic.learning.tasks.task import InHead
from polyclinic.learning.training.seeding import seeded
from polyclinic.methods.optimization.fedavg import FedAvg

PASSES, WINDOW, SPREAD = 100, 10, 0.1


@dataclass(frozen=True)
class FedALA(FedAvg):
    """FedAvg whose sites start from ``θ + (θ_shared − θ) · W``, with weights W in 0...1 that they learn.

    Attributes:
        rate: η, the step size of W; 1 in the paper.
        share: The fraction of the training examples on which W is learned; 0.8 in the paper.
        part: The layers with learned weights: the head, or all. Other layers are the shared model's.
    """

    rate: float = 1.0
    share: float = 0.8
    part: Literal["head", "all"] = "head"

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start, kept = request.trees["params"], dict(memory)
        begin: Tree = start
        if "own" in memory:
            begin, kept["weights"] = self.mixed(start, memory["own"], memory.get("weights"), site, request.round)
        kept["own"] = self.local.fit(self.task, begin, site, request.round)
        return Reply({"update": self.update(kept["own"], start, site)}), kept

    def mixed(self, shared: Tree, own: Tree, weights: Tree | None, site: Site, round: int) -> tuple[Tree, Tree]:
        """Return the model from which the site trains, and the weights; these start at 1."""
        head, learned = InHead(self.task), trained(self.task)
        names = [name for name in shared if name in learned and (self.part == "all" or head(name))]
        model = cached_model(self.task, shared, site.device, "mixed")
        mine = {name: own[name].to(site.device) for name in names}
        gap = {name: shared[name].to(site.device) - mine[name] for name in names}
        w = {name: torch.ones_like(gap[name]) if weights is None else weights[name].to(site.device) for name in names}
        data, losses = site.data["train"], list[float]()
        count = min(max(2, int(self.share * len(data))), len(data))
        rng = site.rng(round, "mixture")
        first = int(torch.randint(len(data) - count + 1, (), generator=rng))
        with seeded(rng, site.device), still(model):
            while len(losses) < (PASSES if weights is None else 1):
                for chunk in batches(count, self.local.batch_size):
                    x, y = data[first + chunk]
                    theta = {name: (mine[name] + gap[name] * w[name]).requires_grad_() for name in names}
                    loss = at(model, theta, self.task.loss, (x.to(site.device), y.to(site.device)))
                    slopes = torch.autograd.grad(loss, list(theta.values()))
                    # W ← clip(W − η ∂L/∂θ · (θ_shared − θ), 0, 1)
                    w = {
                        name: (w[name] - self.rate * g * gap[name]).clamp(0, 1)
                        for name, g in zip(names, slopes, strict=True)
                    }
                losses.append(float(loss.detach()))
                if len(losses) > WINDOW and statistics.pstdev(losses[-WINDOW:]) < SPREAD:
                    break
        start = {**shared, **{name: (mine[name] + gap[name] * w[name]).cpu() for name in names}}
        return start, {name: leaf.cpu() for name, leaf in w.items()}

    def site_model(self, request: Request, memory: Trees) -> Tree:
        return memory.get("own", request.trees["params"])
