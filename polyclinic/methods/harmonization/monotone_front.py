"""A front that bends the scale of gray values: piecewise linear and increasing, channel by channel."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class MonotoneMap:
    """Builds the front that takes the knots ``here`` to the knots ``there``, [channels, knots]; at first, the identity.

    Between knots it is linear; beyond the last ones it keeps the distance to them.

    Attributes:
        channels: Of the images, or columns of the table.
        knots: How many, at least 2.
    """

    channels: int
    knots: int

    def __call__(self) -> nn.Module:
        """The front."""
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
        """[b, C, *spatial] or [b, C] to the same."""
        flat = x.transpose(0, 1).flatten(1).contiguous()
        right = torch.searchsorted(self.here, flat).clamp(1, self.here.shape[1] - 1)
        left = right - 1
        a, b = self.here.gather(1, left), self.here.gather(1, right)
        share = ((flat - a) / (b - a).clamp_min(1e-12)).clamp(0, 1)
        inside = torch.lerp(self.there.gather(1, left), self.there.gather(1, right), share)
        beyond = (flat - self.here[:, :1]).clamp_max(0) + (flat - self.here[:, -1:]).clamp_min(0)
        return (inside + beyond).reshape(x.transpose(0, 1).shape).transpose(0, 1)
