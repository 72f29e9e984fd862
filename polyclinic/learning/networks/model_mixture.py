"""Several models that predict as one: a gated mixture, and a choice by a selector.

They are networks like any other, so that a task with such a network evaluates them unchanged. Their parts' tensors are
called ``shared.…``, ``own.…``, ``gate.…`` and so on.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polyclinic.learning.networks.composite import Composed
from polyclinic.learning.networks.network_catalog import Network


@dataclass(frozen=True)
class Mixture(Composed):
    """Two copies of a network whose predictions are mixed by a gate that sees the input."""

    def __call__(self) -> nn.Module:
        """A new module; its gate begins at one half."""
        return _Mixed(self.network(), self.network(), self.network.inputs)


class _Mixed(nn.Module):
    """a · shared(x) + (1 − a) · own(x) with a = σ(W x), by example. In training, nothing flows back into ``own``."""

    def __init__(self, shared: nn.Module, own: nn.Module, inputs: tuple[int, ...]) -> None:
        super().__init__()
        self.shared, self.own = shared, own
        self.gate = nn.Linear(inputs[0] if len(inputs) == 1 else 2 * inputs[0], 1)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, as the networks give them."""
        ours, mine = prediction(self.shared(x)), prediction(self.own(x)).detach()
        a = self.gate(summary(x)).sigmoid().view(-1, *[1] * (ours.ndim - 1))
        mixed: Tensor = a * ours + (1 - a) * mine
        return mixed


@dataclass(frozen=True)
class Selected(Composed):
    """A global model, one for each site, and a selector that guesses which site an input resembles.

    Attributes:
        selector: Builds the selector, whose outputs are the sites.
        threshold: How sure the selector must be, or the global model predicts.
    """

    selector: Network
    threshold: float

    def __call__(self) -> nn.Module:
        """A new module."""
        return _Chosen(self)


class _Chosen(nn.Module):
    def __init__(self, build: Selected) -> None:
        super().__init__()
        self.shared, self.selector, self.threshold = build.network(), build.selector(), build.threshold
        self.own = nn.ModuleList([build.network() for _ in range(build.selector.outputs)])

    def forward(self, x: Tensor) -> Tensor:
        """The prediction of whichever model is chosen, input by input."""
        sure, site = self.selector(x).softmax(1).max(1)
        chosen = torch.where(sure > self.threshold, site, -1)
        found = prediction(self.shared(x))
        for k, model in enumerate(self.own):
            if bool((mine := chosen == k).any()):
                found = torch.where(mine.view(-1, *[1] * (found.ndim - 1)), prediction(model(x)), found)
        return found


def prediction(found: Any) -> Tensor:
    """The first output of a network that may give several."""
    main: Tensor = found if isinstance(found, Tensor) else found[0]
    return main


def summary(x: Tensor) -> Tensor:
    """What a gate sees: a table's row as it is; of an image, each channel's mean and deviation. [b, F]"""
    if x.ndim == 2:
        return x
    flat = x.flatten(2)
    return torch.cat([flat.mean(2), flat.std(2)], 1)
