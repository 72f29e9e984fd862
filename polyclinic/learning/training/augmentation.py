"""Random views of a minibatch, in two and three dimensions, all examples at once and with dice that are given.

An ``Augment`` can stand as ``LocalTraining.augment``, and then moves masks with their images; or methods use its two
halves: ``moves`` draws where each image goes, ``recolour`` changes intensities and moves nothing, so that what was
predicted for one view of an image fits another view of it. Tables have no geometry: they get noise and blanked columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from polyclinic.learning.tasks.task import Batch


@dataclass(frozen=True)
class Augment:
    """How much to change an example. Every change is drawn anew for each one.

    Attributes:
        flip: Axes that may be mirrored, each with probability 1/2: negative, -1 for the last.
        degrees: The largest rotation, in each plane.
        scale: The largest relative change of size; ``shift``: of position, as a share of the image.
        noise: The largest standard deviation of Gaussian noise, in units of the image's own.
        contrast: The largest relative change of contrast; ``brightness``: of the mean, in units of the image's
            standard deviation; ``gamma``: of the exponent applied to intensities scaled to 0...1.
        cutout: The largest side of the box that is blanked with the image's mean, as a share of each axis (of a
            table: the largest share of columns).
    """

    flip: tuple[int, ...] = (-1,)
    degrees: float = 10.0
    scale: float = 0.1
    shift: float = 0.1
    noise: float = 0.0
    contrast: float = 0.0
    brightness: float = 0.0
    gamma: float = 0.0
    cutout: float = 0.0

    def __call__(self, batch: Batch, rng: torch.Generator) -> Batch:
        """Another view of each (inputs, targets); a mask moves with its image."""
        x, y = batch
        where = self.moves(x, rng)
        masks = x.ndim > 2 and y.ndim == x.ndim - 1 and y.shape[1:] == x.shape[2:]
        return self.recolour(move(x, where), rng), move(y[:, None], where)[:, 0] if masks else y

    def view(self, x: Tensor, rng: torch.Generator) -> Tensor:
        """Another view of inputs [b, C, *spatial] or [b, F]."""
        return self.recolour(move(x, self.moves(x, rng)), rng)

    def moves(self, x: Tensor, rng: torch.Generator) -> Tensor:
        """Where each image goes: affine maps [b, d, d + 1] from the new place to the old, for ``move``."""
        b, d = len(x), x.ndim - 2
        if d < 1:
            return torch.zeros(b, 0, 1)
        turn = torch.eye(d).expand(b, d, d)
        for i in range(d):
            for j in range(i):
                angle = _spread(b, self.degrees, rng).deg2rad()
                plane = torch.eye(d).repeat(b, 1, 1)
                plane[:, i, i] = plane[:, j, j] = angle.cos()
                plane[:, i, j], plane[:, j, i] = angle.sin(), -angle.sin()
                turn = turn @ plane
        sides = torch.tensor(x.shape[:1:-1], dtype=torch.float32)  # affine_grid counts axes from behind, in half images
        turn = turn * sides / sides[:, None]
        mirror = torch.ones(b, d)
        for axis in self.flip:
            mirror[:, -axis - 1] = torch.randint(0, 2, (b,), generator=rng) * 2.0 - 1
        size = 1 + _spread((b, 1, 1), self.scale, rng)
        return torch.cat([turn * mirror[:, None] * size, _spread((b, d, 1), 2 * self.shift, rng)], 2)

    def recolour(self, x: Tensor, rng: torch.Generator) -> Tensor:
        """Other intensities in the same places."""
        flat = x.flatten(1)
        mean, std = flat.mean(1, keepdim=True), flat.std(1, keepdim=True).clamp_min(1e-6)
        one = (len(x), 1)
        if self.gamma:
            low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
            unit = ((flat - low) / (high - low).clamp_min(1e-6)).clamp(0, 1)
            flat = unit ** (1 + _spread(one, self.gamma, rng).to(x)) * (high - low) + low
        if self.contrast or self.brightness:
            gain, lift = (1 + _spread(one, self.contrast, rng)).to(x), _spread(one, self.brightness, rng).to(x)
            flat = (flat - mean) * gain + mean + lift * std
        if self.noise:
            level = torch.rand(one, generator=rng) * self.noise
            flat = flat + (torch.randn(flat.shape, generator=rng) * level).to(x) * std
        if self.cutout:
            flat = torch.where(self._blanked(x, rng).to(x.device), mean, flat)
        return flat.view_as(x)

    def _blanked(self, x: Tensor, rng: torch.Generator) -> Tensor:
        """Which values [b, -1] to blank: a box of each image, or columns of a table."""
        b = len(x)
        if x.ndim == 2:
            return torch.rand(x.shape, generator=rng) < torch.rand(b, 1, generator=rng) * self.cutout
        inside = torch.ones(b, *x.shape[2:], dtype=torch.bool)
        for axis, side in enumerate(x.shape[2:]):
            length = torch.rand(b, 1, generator=rng) * self.cutout * side
            start = torch.rand(b, 1, generator=rng) * (side - length)
            place = torch.arange(side)
            within = (place >= start) & (place < start + length)
            inside &= within.view(b, *[1] * axis, side, *[1] * (x.ndim - 3 - axis))
        return inside[:, None].expand(b, *x.shape[1:]).reshape(b, -1)


def move(x: Tensor, where: Tensor) -> Tensor:
    """``x`` [b, C, *spatial] moved as ``where`` [b, d, d + 1] says; whole numbers to the nearest, others linearly."""
    if x.ndim < 4:
        return x  # a table
    grid = F.affine_grid(where.to(x.device), list(x.shape), align_corners=False)
    if x.is_floating_point():
        return F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    return F.grid_sample(x.double(), grid.double(), "nearest", "border", align_corners=False).to(x.dtype)


def _spread(shape: int | tuple[int, ...], most: float, rng: torch.Generator) -> Tensor:
    """Numbers between -most and most."""
    return (torch.rand(shape, generator=rng) * 2 - 1) * most


WEAK = Augment()
STRONG = Augment(noise=0.2, contrast=0.4, brightness=0.4, gamma=0.3, cutout=0.4)
STILL = Augment(flip=(), degrees=0.0, scale=0.0, shift=0.0)
