"""The network and the losses of FedIIC: a projection of features, contrasts within and across sites, and prototypes.

Wu, Yu, Cheng and Yan, "FedIIC: Towards Robust Federated Learning for Class-Imbalanced Medical Image Classification",
MICCAI 2023, equations 1 to 3, https://arxiv.org/abs/2206.13803, after the published code.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyclinic.errors import ConfigError
from polyclinic.learning.networks.composite import Composed
from polyclinic.learning.networks.latent import head_name, head_width

CROSS, LEAST = 0.1, 0.07
"""Temperature of the contrast with prototypes, and the lowest one of the contrast within a site."""


@dataclass(frozen=True)
class Projecting(Composed):
    """A classifier and a module ``projector``, which maps the input of its last layer to ``width`` numbers."""

    width: int = 1024

    def __call__(self) -> nn.Module:
        """Build a module with random parameters."""
        model, features = self.network(), head_width(self.network)
        last_layer(self, model)  # refuses other heads
        model.add_module("projector", nn.Sequential(nn.Linear(features, features), nn.Linear(features, self.width)))
        return model


def last_layer(network: Any, model: nn.Module) -> Tensor:
    """Return the weights [C, F] of the linear layer that is the head of ``model``.

    Raises:
        ConfigError: If the head is something else.
    """
    head = model.get_submodule(head_name(network, model))
    if not isinstance(head, nn.Linear):
        raise ConfigError(f"fediic needs a network that ends with one linear layer, and {network.name} does not")
    return head.weight


def prototypes(projected: Tensor, steps: int = 1000, rate: float = 0.1) -> Tensor:
    """Return class prototypes [C, width] of length 1, after descent of ``Σ_c max(0, max_{k≠c} cos(f_c, f_k))``.

    Args:
        projected: The weights of the last layer, projected.
        steps: Number of steps of gradient descent.
        rate: Its step size.
    """
    f = projected.detach().clone().requires_grad_()
    others = 1 - torch.eye(len(f))
    for _ in range(steps):
        unit = F.normalize(f, dim=1)
        (slope,) = torch.autograd.grad(((unit @ unit.T) * others).amax(1).sum(), f)
        with torch.no_grad():
            f -= rate * slope
    return F.normalize(f.detach(), dim=1)


def within(f: Tensor, y: Tensor, share: Tensor) -> Tensor:
    """Return the supervised contrast of features of length 1, with temperatures ``max(√(p_y p_y'), 0.07)``.

    Args:
        f: Features [n, width]; each class that occurs has at least two.
        y: Classes [n].
        share: p, the share of each class in the site's examples [C].
    """
    heat = (share[y][:, None] * share[y]).sqrt().clamp_min(LEAST)
    other = ~torch.eye(len(f), dtype=torch.bool, device=f.device)
    logits = (f @ f.T / heat).masked_fill(~other, -torch.inf)
    alike = (y[:, None] == y) & other
    each = (logits - logits.logsumexp(1, keepdim=True)).masked_fill(~alike, 0.0).sum(1) / alike.sum(1)
    return -each.mean()


def across(f: Tensor, y: Tensor, centers: Tensor) -> Tensor:
    """Return the cross-entropy of features [n, width] of classes ``y`` with prototypes [C, width], all of length 1."""
    return F.cross_entropy(f @ centers.T / CROSS, y)
