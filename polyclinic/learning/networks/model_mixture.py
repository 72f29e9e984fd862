"""Several models that predict as one: a gated mixture, and a choice by a selector.

A task with such a network evaluates it like any other. The tensors of its parts are named ``shared.…``, ``own.…``,
``gate.…`` and so on.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polyclinic.learning.networks.composite import Composed
from polyclinic.learning.networks.network_catalog import Network


@dataclass(frozen=True)
class Mixture(Composed):
    """Two copies of a network whose predictions are mixed by an input-dependent gate."""

    def __call__(self) -> nn.Module:
        """Build a module whose gate is initially one half."""
        return _Mixed(self.network(), self.network(), self.network.inputs)


class _Mixed(nn.Module):
    """``a · shared(x) + (1 − a) · own(x)`` with ``a = σ(W x)`` per example. ``own`` receives no gradient."""

    def __init__(self, shared: nn.Module, own: nn.Module, inputs: tuple[int, ...]) -> None:
        super().__init__()
        self.shared, self.own = shared, own
        self.gate = nn.Linear(inputs[0] if len(inputs) == 1 else 2 * inputs[0], 1)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return mixed logits."""
        ours, mine = prediction(self.shared(x)), prediction(self.own(x)).detach()
        a = self.gate(summary(x)).sigmoid().view(-1, *[1] * (ours.ndim - 1))
        mixed: Tensor = a * ours + (1 - a) * mine
        return mixed


@dataclass(frozen=True)
class Selected(Composed):
    """A global model, one model per site, and a selector that predicts which site an input resembles.

    Attributes:
        selector: Builds the selector, which has one output per site.
        threshold: Probability of the selected site at or below which the global model predicts instead.
    """

    selector: Network
    threshold: float

    def __call__(self) -> nn.Module:
        """Build a module with random parameters."""
        return _Chosen(self)


class _Chosen(nn.Module):
    def __init__(self, build: Selected) -> None:
        super().__init__()
        self.shared, self.selector, self.threshold = build.network(), build.selector(), build.threshold
        self.own = nn.ModuleList([build.network() for _ in range(build.selector.outputs)])

    def forward(self, x: Tensor) -> Tensor:
        """Return the prediction of the selected model for each input."""
        sure, site = self.selector(x).softmax(1).max(1)
        chosen = torch.where(sure > self.threshold, site, -1)
        result = prediction(self.shared(x))
        for k, model in enumerate(self.own):
            if bool((mine := chosen == k).any()):
                result = torch.where(mine.view(-1, *[1] * (result.ndim - 1)), prediction(model(x)), result)
        return result


def prediction(output: Any) -> Tensor:
    """Return the first output of a network that may have several."""
    main: Tensor = output if isinstance(output, Tensor) else output[0]
    return main


def summary(x: Tensor) -> Tensor:
    """Return the gate's features [b, F]: a table row, or the mean and standard deviation of each image channel."""
    if x.ndim == 2:
        return x
    flat = x.flatten(2)
    return torch.cat([flat.mean(2), flat.std(2)], 1)
