"""Virtual examples: inputs moved slightly to change a model's prediction most, or to increase its confidence.

Sizes are shares of each input's own standard deviation, as root mean square over its values, so that they suit images
of any size and unit.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from polyclinic.learning.objectives.distillation_loss import divergence


def moved(x: Tensor, direction: Tensor, size: float) -> Tensor:
    """Return ``x`` [b, ...] moved along ``direction`` by ``size`` times each example's standard deviation."""
    flat = direction.flatten(1)
    unit = flat / flat.square().mean(1, keepdim=True).sqrt().clamp_min(1e-12)  # root mean square 1
    return x + (unit * size * x.flatten(1).std(1, keepdim=True)).view_as(x)


def adversarial(
    kind: str, model: nn.Module, x: Tensor, rng: torch.Generator, size: float, probe: float = 0.01
) -> Tensor:
    """Return ``x`` moved by the r of a given ``size`` that changes the prediction most, by one power iteration.

    Miyato, Maeda, Koyama and Ishii, "Virtual Adversarial Training", IEEE TPAMI 2019, equations 5 to 12.
    https://arxiv.org/abs/1704.03976.

    Args:
        probe: ξ, the length of the random step from which the gradient of the divergence is taken.
    """
    with torch.no_grad():
        prediction = model(x)
    v = moved(x, torch.randn(x.shape, generator=rng).to(x), probe).requires_grad_()  # x + ξ d
    # g = ∂ KL(f(x) ‖ f(v)) / ∂ v;  r = ε g / ‖g‖
    (g,) = torch.autograd.grad(divergence(kind, model(v), prediction), v)
    return moved(x, g, size)


def surer(loss: Callable[[Tensor], Tensor], x: Tensor, size: float, steps: int = 1) -> Tensor:
    """Return ``x`` moved in ``steps`` steps of total length ``size`` that decrease the ``loss`` of a model at it."""
    for _ in range(steps):
        x = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(loss(x), x)
        x = moved(x.detach(), -g, size / steps)
    return x
