"""Sharpness-aware losses, whose gradient is taken at the worst point near the current one.

Foret, Kleiner, Mobahi and Neyshabur, "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR
2021, equations 2 and 3, https://arxiv.org/abs/2010.01412; Kwon, Kim, Park and Choi, "ASAM", ICML 2021, equation 3,
https://arxiv.org/abs/2102.11600. The first pass does not update running statistics.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from polyclinic.learning.batch import Batch
from polyclinic.learning.networks.functional import at, still
from polyclinic.learning.networks.model_tree import trainable
from polyclinic.learning.training.local import Loss


def sharpened(loss: Loss, rho: float, adaptive: bool = False) -> Loss:
    """Return the function ``L(θ + δ)`` with ``δ = ρ ∇L(θ) / ‖∇L(θ)‖``, whose gradient at θ is that of L at θ + δ.

    Args:
        loss: L.
        rho: ρ, the length of δ.
        adaptive: Whether each coordinate is scaled by its size: ``δ = ρ θ² ∇L / ‖θ ∇L‖``.
    """

    def value(model: nn.Module, batch: Batch) -> Tensor:
        named = trainable(model)
        with still(model):
            slopes = torch.autograd.grad(loss(model, batch), list(named.values()), allow_unused=True)
        found = {name: g for name, g in zip(named, slopes, strict=True) if g is not None}
        return at(model, _moved(named, found, rho, adaptive), loss, batch)

    return value


def _moved(
    named: Mapping[str, Tensor], slopes: Mapping[str, Tensor], rho: float, adaptive: bool = False
) -> dict[str, Tensor]:
    """Return θ + δ of the parameters that have a gradient."""
    sizes = {name: named[name].detach().abs() if adaptive else 1.0 for name in slopes}
    length = torch.stack([(sizes[name] * g).square().sum() for name, g in slopes.items()]).sum().sqrt()
    return {name: named[name] + rho * sizes[name] ** 2 * g / (length + 1e-12) for name, g in slopes.items()}


def matched(loss: Loss, rho: float, surrogate: float) -> Loss:
    """Return a function whose gradient is that of ``sharpened(loss, rho)`` minus ``surrogate · g⊥``.

    g⊥ is the part of ∇L(θ) that is orthogonal to the gradient of ``L(θ + δ)``, so that a step lowers the gap between
    both without an effect on L(θ + δ). Zhuang and others, "Surrogate Gap Minimization Improves Sharpness-Aware
    Training", ICLR 2022, equation 4, https://arxiv.org/abs/2203.08065. As in public code of it, the first pass updates
    running statistics, and the second does not.
    """

    def value(model: nn.Module, batch: Batch) -> Tensor:
        named = trainable(model)
        parameters = list(named.values())
        plain = torch.autograd.grad(loss(model, batch), parameters, allow_unused=True)
        found = {name: g for name, g in zip(named, plain, strict=True) if g is not None}
        with still(model):
            sharp = at(model, _moved(named, found, rho), loss, batch)
        if not surrogate:
            return sharp
        slopes = torch.autograd.grad(sharp, [named[name] for name in found], retain_graph=True)
        along = torch.stack([(g * h).sum() for g, h in zip(found.values(), slopes, strict=True)]).sum()
        along = along / (torch.stack([h.square().sum() for h in slopes]).sum() + 1e-12)
        pairs = zip(found.items(), slopes, strict=True)
        linear = torch.stack([((g - along * h) * named[name]).sum() for (name, g), h in pairs]).sum()
        return sharp - surrogate * linear  # the gradient of the second term is that of a constant vector

    return value
