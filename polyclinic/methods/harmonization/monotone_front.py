"""A front that maps gray values by a piecewise linear, increasing function, channel by channel."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class MonotoneMap:
    """Builds the front that maps the knots ``here`` to the knots ``there``, [channels, knots]; initially the identity.

    It is linear between knots, and has slope 1 beyond the last ones.

    Attributes:
        channels: Number of channels of the images, or columns of the table.
        knots: Number of knots, at least 2.
    """

    channels: int
    knots: int

    def __call__(self) -> nn.Module:
        """Build the front."""
        return _Bent(self)


class _Bent(nn.Module):
    here: Tensor
    there: Tensor

    def __init__(self, build: MonotoneMap) -> None:
        super().__init__()
        knots = torch.linspace(-1, 1, build.knots).repeat(build.channels, 1)
        self.register_buffer("here", knots)
        self.register_buffer("there", knots.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, C, *spatial] or [b, C] to the same shape."""
        flat = x.transpose(0, 1).flatten(1).contiguous()
        right = torch.searchsorted(self.here, flat).clamp(1, self.here.shape[1] - 1)
        left = right - 1
        a, b = self.here.gather(1, left), self.here.gather(1, right)
        share = ((flat - a) / (b - a).clamp_min(1e-12)).clamp(0, 1)
        inside = torch.lerp(self.there.gather(1, left), self.there.gather(1, right), share)
        beyond = (flat - self.here[:, :1]).clamp_max(0) + (flat - self.here[:, -1:]).clamp_min(0)
        return (inside + beyond).reshape(x.transpose(0, 1).shape).transpose(0, 1)
