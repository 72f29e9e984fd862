"""Random augmentation of minibatches in two and three dimensions, for all examples at once with a given generator.

An ``Augment`` can be used as ``LocalTraining.augment``, which transforms masks with their images. Methods may use its
two parts: ``moves`` draws the geometry of each image, and ``recolour`` changes intensities only, so that a prediction
for one view of an image fits another. Tables have no geometry; they receive noise and blanked columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from polyclinic.learning.batch import Batch


@dataclass(frozen=True)
class Augment:
    """Ranges of random changes, which are drawn independently for each example.

    Attributes:
        flip: Axes that are mirrored with probability 1/2, as negative numbers; -1 is the last.
        degrees: The largest rotation, in each plane.
        scale: The largest relative change of size.
        shift: The largest change of position, as a fraction of the image.
        noise: The largest standard deviation of Gaussian noise, relative to that of the image.
        contrast: The largest relative change of contrast.
        brightness: The largest change of the mean, relative to the image's standard deviation.
        gamma: The largest relative change of the exponent of intensities scaled to 0...1.
        cutout: The largest side of the box that is replaced by the image's mean, as a fraction of each axis (for a
            table: the largest fraction of columns).
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
        """Return another view of each (inputs, targets); a mask is transformed with its image."""
        x, y = batch
        where = self.moves(x, rng)
        masks = x.ndim > 2 and y.ndim == x.ndim - 1 and y.shape[1:] == x.shape[2:]
        return self.recolour(move(x, where), rng), move(y[:, None], where)[:, 0] if masks else y

    def view(self, x: Tensor, rng: torch.Generator) -> Tensor:
        """Return another view of inputs [b, C, *spatial] or [b, F]."""
        return self.recolour(move(x, self.moves(x, rng)), rng)

    def moves(self, x: Tensor, rng: torch.Generator) -> Tensor:
        """Draw the geometry of each image: affine maps [b, d, d + 1] from new to old positions, for ``move``."""
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
        sides = torch.tensor(x.shape[:1:-1], dtype=torch.float32)  # affine_grid: reversed axes, units of half an image
        turn = turn * sides / sides[:, None]
        mirror = torch.ones(b, d)
        for axis in self.flip:
            mirror[:, -axis - 1] = torch.randint(0, 2, (b,), generator=rng) * 2.0 - 1
        size = 1 + _spread((b, 1, 1), self.scale, rng)
        return torch.cat([turn * mirror[:, None] * size, _spread((b, d, 1), 2 * self.shift, rng)], 2)

    def recolour(self, x: Tensor, rng: torch.Generator) -> Tensor:
        """Change intensities, but not positions."""
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
        """Draw the values [b, -1] to blank: a box of each image, or columns of a table."""
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
    """Transform ``x`` [b, C, *spatial] by ``where`` [b, d, d + 1]; integers to the nearest, floats linearly."""
    if x.ndim < 4:
        return x  # a table
    grid = F.affine_grid(where.to(x.device), list(x.shape), align_corners=False)
    if x.is_floating_point():
        return F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    return F.grid_sample(x.double(), grid.double(), "nearest", "border", align_corners=False).to(x.dtype)


def _spread(shape: int | tuple[int, ...], most: float, rng: torch.Generator) -> Tensor:
    """Draw numbers between -most and most."""
    return (torch.rand(shape, generator=rng) * 2 - 1) * most


WEAK = Augment()
STRONG = Augment(noise=0.2, contrast=0.4, brightness=0.4, gamma=0.3, cutout=0.4)
STILL = Augment(flip=(), degrees=0.0, scale=0.0, shift=0.0)
