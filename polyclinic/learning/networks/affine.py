"""Affine input layer: the z-score, and the transform that ComBat estimates."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class AffineInput:
    """Builds the layer x ↦ scale · x + shift + carry · c(x), where c(x) are columns of x; initially 1, 0 and 0.

    Attributes:
        shape: Shape of scale and shift, which broadcast with inputs: (C, 1, 1) for images by channel, (F,) for tables.
        covariates: The columns of a table that make up c(x); none for images.
    """

    shape: tuple[int, ...]
    covariates: tuple[int, ...] = ()

    def __call__(self) -> nn.Module:
        """Build the layer."""
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
        """Map [b, *inputs] to the same shape."""
        moved = self.scale * x + self.shift
        return moved + x[:, self.covariates] @ self.get_buffer("carry").T if self.covariates else moved
