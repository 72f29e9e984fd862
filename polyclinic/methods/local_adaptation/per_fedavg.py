"""Per-FedAvg: a shared model from which one step on a site's examples leads to a good model of the site.

Fallah, Mokhtari and Ozdaglar, "Personalized Federated Learning with Theoretical Guarantees: A Model-Agnostic
Meta-Learning Approach", NeurIPS 2020, Algorithm 1, https://arxiv.org/abs/2002.07948: the first-order variant
(Per-FedAvg FO) or, with ``second_order``, the exact gradient that its Hessian-free variant approximates. As in public
code, a minibatch of twice the size is divided into the two of a step. The trial step does not update running
statistics. Departure: a minibatch that is not full is divided into halves.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from polyclinic.core.aggregates import Reply
from polyclinic.core.method import Request
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError
from polyclinic.learning.batch import Batch
from polyclinic.learning.networks.functional import at, still
from polyclinic.learning.networks.model_tree import trainable
from polyclinic.learning.training.dp_sgd import refuse_private
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import FedAvg


@dataclass(frozen=True)
class PerFedAvg(FedAvg):
    """FedAvg of the objective ``F(w − α ∇F(w))``; each training site predicts after one step on its own examples.

    Attributes:
        alpha: α, the size of the step at a site; 0.01 to 0.001 in the paper.
        second_order: Whether the gradient passes through the step, which takes a second derivative.
    """

    alpha: float = 0.01
    second_order: bool = False

    def __post_init__(self) -> None:
        if self.alpha < 0:
            raise ConfigError(f"per-fedavg: alpha must be at least 0, not {self.alpha:g}")
        refuse_private(self.local, "per-fedavg", "the gradient is taken after a step on other examples")

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start, twice = request.trees["params"], replace(self.local, batch_size=2 * self.local.batch_size)
        end = twice.fit(self.task, start, site, request.round, loss=self.loss)
        return Reply({"update": self.update(end, start, site)}), memory

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return ``L₂(w − α ∇L₁(w))`` for the two halves of a minibatch."""
        x, y = batch
        half = min(self.local.batch_size, -(-len(x) // 2))
        first = (x[:half], y[:half])
        second = (x[half:], y[half:]) if len(x) > 1 else first
        named = trainable(model)
        with still(model):
            inner = self.task.loss(model, first)
        slopes = torch.autograd.grad(inner, list(named.values()), create_graph=self.second_order, allow_unused=True)
        pairs = zip(named.items(), slopes, strict=True)
        return at(model, {n: p - self.alpha * g for (n, p), g in pairs if g is not None}, self.task.loss, second)

    def adapted_model(self, request: Request, memory: Trees, site: Site, role: str) -> Tree:
        params = self.site_model(request, memory)
        if not len(site.data.get("train", ())):
            return params
        once = LocalTraining(batch_size=self.local.batch_size, steps=1, lr=self.alpha, augment=self.local.augment)
        return once.fit(self.task, params, site, request.round, slot="adapted")
