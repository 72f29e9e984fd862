"""APFL: each site predicts with a mixture of its own model and the shared one.

Deng, Kamani and Mahdavi, "Adaptive Personalized Federated Learning", 2020, Algorithm 1 and equation 10 for the mixing
weight. https://arxiv.org/abs/2003.13461. As in the paper, the mixing weight is updated once per round, on the first
minibatch. Running statistics of batch normalization are not mixed: they are those of the mixture's forward passes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.method import Request
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.networks.functional import at
from polyclinic.learning.networks.model_tree import cached_model, params_of, trainable
from polyclinic.learning.training.seeding import seeded
from polyclinic.methods.optimization.fedavg import FedAvg


@dataclass(frozen=True)
class APFL(FedAvg):
    """FedAvg of shared models w, and at each site a model v that is trained as part of the mixture ``αv + (1 − α)w``.

    Attributes:
        alpha: Initial α, the weight of the site's own model. The paper tries 0.25, 0.5 and 0.75.
        adaptive: Whether each site learns its α.
    """

    alpha: float = 0.5
    adaptive: bool = True

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start, data = request.trees["params"], site.data["train"]
        alpha = float(memory["mixing"]["alpha"]) if "mixing" in memory else self.alpha
        w = cached_model(self.task, start, site.device)
        v = cached_model(self.task, memory.get("own", start), site.device, "own")
        step_w, step_v = self.local.stepper(w, request.round), self.local.stepper(v, request.round)
        rng, first = site.rng(request.round, "train", "train", ""), self.adaptive  # the minibatches of FedAvg
        with seeded(rng, site.device):
            for batch in self.local.batches(data, rng, site.device):
                shared, own = trainable(w), trainable(v)
                mixed = {name: alpha * p + (1 - alpha) * shared[name].detach() for name, p in own.items()}
                global_loss = self.task.loss(w, batch)
                loss = at(v, mixed, self.task.loss, batch)
                moved = alpha - self.local.rate(request.round) * _slope(loss, mixed, own, shared) if first else alpha
                step_w(global_loss)  # w ← w − η ∇f(w)
                step_v(loss)  # v ← v − η ∇_v f(αv + (1 − α)w)
                alpha, first = min(max(moved, 0.0), 1.0), False
        kept = {"own": params_of(v), "mixing": {"alpha": torch.tensor(alpha, dtype=torch.float64)}}
        update = WeightedMean.of(tree.sub(params_of(w), start), self.site_weight(site))
        return Reply({"update": update}), {**memory, **kept}

    def site_model(self, request: Request, memory: Trees) -> Tree:
        if "own" not in memory:
            return request.trees["params"]
        trained = trainable(self.task.model())
        mixed = tree.lerp(request.trees["params"], memory["own"], float(memory["mixing"]["alpha"]))
        return {name: leaf if name in trained else memory["own"][name] for name, leaf in mixed.items()}


def _slope(loss: Tensor, mixed: Tree, own: Tree, shared: Tree) -> float:
    """Return ``∂f/∂α = ⟨v − w, ∇f(αv + (1 − α)w)⟩``."""
    gradients = torch.autograd.grad(loss, list(mixed.values()), retain_graph=True, allow_unused=True)
    gaps = [(own[name] - shared[name]).detach() for name in mixed]
    return sum(float((gap * g).sum()) for gap, g in zip(gaps, gradients, strict=True) if g is not None)
