"""A front that rescales its inputs: the z-score, and what ComBat finds."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class AffineInput:
    """Builds the front x ↦ scale · x + shift + carry · c(x), with c(x) some of the inputs themselves; 1, 0, 0 at first.

    Attributes:
        shape: Of scale and shift, and of what they broadcast with: (C, 1, 1) for images by channel, (F,) for tables.
        covariates: Which columns of a table make up c(x); none for images.
    """

    shape: tuple[int, ...]
    covariates: tuple[int, ...] = ()

    def __call__(self) -> nn.Module:
        """The front."""
        return _Affine(self)


class _Affine(nn.Module):
    scale: Tensor
    shift: Tensor

    def __init__(self, build: AffineInput) -> None:
        super().__init__()
        self.covariates = list(build.covariates)
        self.register_buffer("scale", torch.ones(build.shape))
        self.register_buffer("shift", torch.zeros(build.shape))
        if build.covariates:
            self.register_buffer("carry", torch.zeros(*build.shape, len(build.covariates)))

    def forward(self, x: Tensor) -> Tensor:
        """[b, *inputs] to the same."""
        moved = self.scale * x + self.shift
        return moved + x[:, self.covariates] @ self.get_buffer("carry").T if self.covariates else moved
