"""Random changes of one image and its mask, in two and three dimensions, each from the sample's own generator.

The list, its order and the default ranges are those of nnU-Net v2 (Isensee, Jaeger, Kohl, Petersen and Maier-Hein,
"nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation", Nature Methods 2021,
https://doi.org/10.1038/s41592-020-01008-z; ``nnUNetTrainer.get_training_transforms`` and batchgeneratorsv2 0.3.6), with
additions for color pictures. Departures: a sample that is rotated or scaled reads exactly the region that it needs
instead of always the largest, and random numbers come from a given generator instead of global ones.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-7
CHUNK = 2**15
"""Points that are resampled at once: few enough for the processor's cache."""


def uniform(low: float, high: float, rng: torch.Generator) -> float:
    """Draw a number between ``low`` and ``high``."""
    return low + (high - low) * float(torch.rand((), generator=rng, dtype=torch.float64))


def happens(probability: float, rng: torch.Generator) -> bool:
    """Draw whether something of the given probability happens. One number is drawn whatever the probability."""
    return float(torch.rand((), generator=rng, dtype=torch.float64)) < probability


def around_one(low: float, high: float, rng: torch.Generator) -> float:
    """Draw a factor: with even odds below and above 1 if the range contains 1, uniform otherwise."""
    below = happens(0.5, rng)
    if low < 1 < high:
        return uniform(low, 1.0, rng) if below else uniform(1.0, high, rng)
    return uniform(low, high, rng)


@dataclass(frozen=True)
class Rotation:
    """Rotation around the center of the patch.

    Attributes:
        probability: Probability for a sample.
        degrees: The largest angle in each plane. None for nnU-Net's rule: 30 in three dimensions, 180 in two (15 if one
            side of the patch is more than 1.5 times the other), and 180 in the plane of the last two axes alone if
            another side of the patch is more than 3 times the first.
    """

    probability: float
    degrees: float | None = None


@dataclass(frozen=True)
class Scaling:
    """Scaling by one factor for all axes, drawn uniformly; above 1, objects become smaller."""

    probability: float
    low: float = 0.7
    high: float = 1.4


@dataclass(frozen=True)
class Crop:
    """Random resized crop: a box of random size, shape and position is resampled to the size of the patch.

    Attributes:
        probability: Probability for a sample.
        low: The smallest share of the area (or volume).
        high: The largest share.
        aspect: The largest ratio of two relative sides.
    """

    probability: float
    low: float = 0.5
    high: float = 1.0
    aspect: float = 4 / 3


@dataclass(frozen=True)
class QuarterTurns:
    """Rotation by a random multiple of 90 degrees in the plane of the last two axes, if these are equally long."""

    probability: float


@dataclass(frozen=True)
class Noise:
    """Gaussian noise; the standard deviation is drawn from 0 to ``std``, once for all channels."""

    probability: float
    std: float = 0.1

    def __call__(self, x: Tensor, rng: torch.Generator) -> Tensor:
        """Change ``x`` [C, *spatial] in place, and return it."""
        return x.add_(torch.randn(x.shape, generator=rng), alpha=uniform(0.0, self.std, rng))


@dataclass(frozen=True)
class Blur:
    """Gaussian blur of some channels, with a standard deviation in voxels drawn for each axis.

    Attributes:
        probability: Probability for a sample.
        channel: Probability for each of its channels.
        low: The smallest standard deviation.
        high: The largest.
    """

    probability: float
    channel: float = 0.5
    low: float = 0.5
    high: float = 1.0

    def __call__(self, x: Tensor, rng: torch.Generator) -> Tensor:
        """Change ``x`` [C, *spatial] in place, and return it."""
        for channel in x:
            if happens(self.channel, rng):
                blurred: Tensor = channel
                for axis in range(channel.ndim):
                    blurred = _blurred(blurred, axis, uniform(self.low, self.high, rng))
                channel.copy_(blurred)
        return x


@dataclass(frozen=True)
class Brightness:
    """Multiplication of each channel by a factor."""

    probability: float
    low: float = 0.75
    high: float = 1.25

    def __call__(self, x: Tensor, rng: torch.Generator) -> Tensor:
        """Change ``x`` [C, *spatial] in place, and return it."""
        for channel in x:
            channel.mul_(around_one(self.low, self.high, rng))
        return x


@dataclass(frozen=True)
class Contrast:
    """Multiplication of each channel's distance from its mean, within the range of values before."""

    probability: float
    low: float = 0.75
    high: float = 1.25

    def __call__(self, x: Tensor, rng: torch.Generator) -> Tensor:
        """Change ``x`` [C, *spatial] in place, and return it."""
        for channel in x:
            factor, mean = around_one(self.low, self.high, rng), float(channel.mean())
            least, most = (float(value) for value in channel.aminmax())
            channel.sub_(mean).mul_(factor).add_(mean).clamp_(least, most)
        return x


@dataclass(frozen=True)
class LowResolution:
    """Some channels are reduced by a factor (nearest neighbor) and enlarged again (linearly).

    The first axis is left out if another side of the patch is more than 3 times the first.

    Attributes:
        probability: Probability for a sample.
        channel: Probability for each of its channels.
        low: The smallest factor.
        high: The largest.
    """

    probability: float
    channel: float = 0.5
    low: float = 0.5
    high: float = 1.0

    def __call__(self, x: Tensor, rng: torch.Generator) -> Tensor:
        """Change ``x`` [C, *spatial] in place, and return it."""
        size = tuple(x.shape[1:])
        fixed = anisotropic(size)
        for channel in x:
            if happens(self.channel, rng):
                factor = uniform(self.low, self.high, rng)
                small = [n if fixed and a == 0 else max(1, round(n * factor)) for a, n in enumerate(size)]
                reduced = F.interpolate(channel[None, None], small, mode="nearest-exact")
                mode = "bilinear" if len(size) == 2 else "trilinear"
                channel.copy_(F.interpolate(reduced, size, mode=mode)[0, 0])
        return x


@dataclass(frozen=True)
class Gamma:
    """A power of each channel's values scaled to 0...1; mean and standard deviation are restored.

    Attributes:
        probability: Probability for a sample.
        low: The smallest exponent.
        high: The largest.
        inverted: Whether to take the power of the negative image.
    """

    probability: float
    low: float = 0.7
    high: float = 1.5
    inverted: bool = False

    def __call__(self, x: Tensor, rng: torch.Generator) -> Tensor:
        """Change ``x`` [C, *spatial] in place, and return it."""
        for channel in x:
            if self.inverted:
                channel.neg_()
            mean = float(channel.mean())
            std = _norm(channel.sub_(mean))
            least, most = (float(value) for value in channel.aminmax())
            channel.sub_(least).div_(max(most - least, EPS)).pow_(around_one(self.low, self.high, rng))
            now = _norm(channel.sub_(float(channel.mean())))
            channel.mul_(std / max(now, EPS)).add_(mean)
            if self.inverted:
                channel.neg_()
        return x


@dataclass(frozen=True)
class Color:
    """Change of saturation and hue of images with three channels; others are left as they are.

    Attributes:
        probability: Probability for a sample.
        saturation: The largest relative change of the distance from gray.
        hue: The largest rotation around the gray axis, in degrees.
    """

    probability: float
    saturation: float = 0.2
    hue: float = 10.0

    def __call__(self, x: Tensor, rng: torch.Generator) -> Tensor:
        """Change ``x`` [C, *spatial] in place, and return it."""
        factor, angle = uniform(1 - self.saturation, 1 + self.saturation, rng), uniform(-self.hue, self.hue, rng)
        if len(x) != 3:
            return x
        # Rodrigues' formula for the axis (1, 1, 1)/√3: R = cos·I + (1 − cos)/3·J + sin/√3·K
        c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle)) / math.sqrt(3)
        cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]])
        turn = c * torch.eye(3) + (1 - c) / 3 * torch.ones(3, 3) + s * cross
        gray = torch.full((3, 3), 1 / 3)
        matrix = gray + factor * (torch.eye(3) - gray) @ turn
        return x.copy_((matrix @ x.flatten(1)).view_as(x))


@dataclass(frozen=True)
class Mirror:
    """Mirroring along each axis.

    Attributes:
        probability: Probability for each axis.
        axes: The spatial axes, 0 for the first; None for all.
    """

    probability: float
    axes: tuple[int, ...] | None = None


def anisotropic(size: Sequence[int]) -> bool:
    """Return whether a three-dimensional patch is treated slice by slice: another side exceeds 3 times the first."""
    return len(size) == 3 and max(size) > 3 * size[0]


def planes(size: Sequence[int], degrees: float | None) -> tuple[float, list[tuple[int, int]]]:
    """Return the largest angle in degrees and the planes of a rotation, by ``Rotation``'s rule."""
    if len(size) == 2:
        rule, pairs = (15.0 if max(size) > 1.5 * min(size) else 180.0), [(0, 1)]
    elif anisotropic(size):
        rule, pairs = 180.0, [(1, 2)]
    else:
        rule, pairs = 30.0, [(1, 2), (0, 2), (0, 1)]
    return rule if degrees is None else degrees, pairs


def turn_matrix(size: Sequence[int], degrees: float | None, rng: torch.Generator) -> Tensor:
    """Draw a rotation [d, d] of offsets in voxels."""
    most, pairs = planes(size, degrees)
    matrix = torch.eye(len(size), dtype=torch.float64)
    for i, j in pairs:
        angle = math.radians(uniform(-most, most, rng))
        plane = torch.eye(len(size), dtype=torch.float64)
        plane[i, i] = plane[j, j] = math.cos(angle)
        plane[i, j], plane[j, i] = -math.sin(angle), math.sin(angle)
        matrix = matrix @ plane
    return matrix


def enlarged(size: Sequence[int], rotation: Rotation | None, scaled: bool) -> list[int]:
    """Return the largest region that is read for a sample of ``size``, by nnU-Net's rule.

    Each side is that after a rotation by the largest angle (at most 90 degrees) in one plane, divided by 0.85 if the
    sample may be scaled.
    """
    most, pairs = planes(size, rotation.degrees) if rotation else (0.0, [])
    angle = math.radians(min(most, 90.0))
    sides = [float(n) for n in size]
    for i, j in (*pairs, *((j, i) for i, j in pairs)):
        sides[i] = max(sides[i], math.cos(angle) * size[i] + math.sin(angle) * size[j])
    fixed = anisotropic(size)
    return [n if fixed and i == 0 else math.ceil(sides[i] / (0.85 if scaled else 1)) for i, n in enumerate(size)]


def resample(x: Tensor, matrix: Tensor, shift: Tensor, size: Sequence[int], border: bool) -> Tensor:
    """Resample ``x`` [C, *spatial] linearly to ``size``.

    The value at offset o from the center of the result is that at ``matrix @ o + shift`` from the center of ``x``, in
    voxels. Outside of ``x`` are zeros, or the nearest values if ``border``. The result is that of PyTorch's
    ``grid_sample`` without aligned corners, which takes three times as long in three dimensions.
    """
    if not bool((matrix - matrix.diag().diag()).any()):
        for axis, n in enumerate(size):
            x = _resample_axis(x, axis + 1, float(matrix[axis, axis]), float(shift[axis]), n, border)
        return x
    x = _padded(x, len(size), border)
    result = x.new_empty(len(x), *size)
    flat, out = x.view(len(x), -1), result.view(len(x), -1)
    for begin, end, base, fractions, steps in _corners(x.shape[1:], matrix, shift, size):
        for channel, into in zip(flat, out, strict=True):
            values = [channel.index_select(0, base + step) for step in steps]
            for fraction in fractions:  # the last axis first: halves the number of values each time
                values = [torch.lerp(a, b, fraction) for a, b in zip(values[::2], values[1::2], strict=True)]
            into[begin:end] = values[0]
    return result


def resample_mask(y: Tensor, matrix: Tensor, shift: Tensor, size: Sequence[int], border: bool) -> Tensor:
    """Resample labels ``y`` [*spatial]: each label linearly, then the one with the largest share, the least of equals.

    Outside is the label 0, or the nearest one if ``border``.
    """
    low, high = (int(value) for value in y.aminmax())
    if low == high and (border or low == 0):
        return y.new_full(tuple(size), low)
    labels = _padded(y.to(torch.uint8 if low >= 0 and high < 256 else torch.int32), len(size), border)
    least, most = _corner_extremes(labels)
    flat, mixed = labels.view(-1), (least != most).view(-1)
    result = torch.empty(math.prod(size), dtype=y.dtype)
    for begin, end, base, fractions, steps in _corners(labels.shape, matrix, shift, size):
        found = flat.index_select(0, base).to(y.dtype)
        if len(some := mixed.index_select(0, base).nonzero().flatten()):
            first = base[some]
            corners = torch.stack([flat.index_select(0, first + step) for step in steps])
            found[some] = _largest_share(corners, [fraction[some] for fraction in fractions]).to(y.dtype)
        result[begin:end] = found
    return result.view(*size)


def center_crop(x: Tensor, size: Sequence[int]) -> Tensor:
    """Return the central ``size`` of the last axes of ``x``; axes that are too short remain."""
    first = x.ndim - len(size)
    for axis, n in enumerate(size):
        if (have := x.shape[first + axis]) > n:
            x = x.narrow(first + axis, (have - n) // 2, n)
    return x


def _padded(x: Tensor, dims: int, border: bool) -> Tensor:
    """Return ``x`` with a margin of zeros; with ``border`` without one, but at least two voxels along each axis."""
    if not border:
        return F.pad(x, [1, 1] * dims)
    for axis in range(-dims, 0):
        if x.shape[axis] == 1:
            x = torch.cat([x, x], axis)
    return x.contiguous()


Corners = tuple[int, int, Tensor, list[Tensor], list[int]]


def _corners(source: Sequence[int], matrix: Tensor, shift: Tensor, size: Sequence[int]) -> Iterator[Corners]:
    """Yield the voxels around each point of the result, for parts of it.

    Yields:
        Begin and end of the part in the flat result; the index of each point's first voxel in the flat source, int32;
        the distances from it along each axis, the last axis first; and the indices of all corners, relative to the
        first, in binary order with the last axis fastest. Points outside are moved to the nearest voxel.
    """
    d, plane = len(size), math.prod(size[1:])
    strides = [math.prod(source[axis + 1 :]) for axis in range(d)]
    steps = [
        sum(stride for bit, stride in zip(bits, strides, strict=True) if bit)
        for bits in itertools.product((0, 1), repeat=d)
    ]
    offsets = [torch.arange(n, dtype=torch.float32) - (n - 1) / 2 for n in size]
    views = [offset.view([-1 if axis == a else 1 for axis in range(d)]) for a, offset in enumerate(offsets)]
    rows = max(1, CHUNK // plane)
    for begin in range(0, size[0], rows):
        parts = [views[0][begin : begin + rows], *views[1:]]
        base, fractions = None, []
        for axis, n in enumerate(source):
            place = float(shift[axis]) + (n - 1) / 2 + float(matrix[axis, 0]) * parts[0]
            for other in range(1, d):
                place = place + float(matrix[axis, other]) * parts[other]
            place = place.clamp_(0, n - 1)
            low = place.floor().clamp_max_(max(n - 2, 0))
            fractions.append(place.sub_(low).flatten())
            index = low.int().mul_(strides[axis])
            base = index if base is None else base.add_(index)
        assert base is not None
        end = min(begin + rows, size[0])
        yield begin * plane, end * plane, base.flatten(), fractions[::-1], steps


def _corner_extremes(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least and the largest label of each voxel and its next ones along all axes."""
    least, most = labels, labels
    for axis in range(labels.ndim):
        n = labels.shape[axis]
        least, most = least.clone(), most.clone()
        for leaf, pick in ((least, torch.minimum), (most, torch.maximum)):
            here = leaf.narrow(axis, 0, n - 1)
            here.copy_(pick(here, leaf.narrow(axis, 1, n - 1)))
    return least, most


def _largest_share(corners: Tensor, fractions: Sequence[Tensor]) -> Tensor:
    """Return the label with the largest share of weights, the least of equals, of ``corners`` [2^d, n]."""
    best, found = torch.zeros(corners.shape[1]), torch.zeros_like(corners[0])
    for label in torch.unique(corners).tolist():
        values = list((corners == label).float())
        for fraction in fractions:
            values = [torch.lerp(a, b, fraction) for a, b in zip(values[::2], values[1::2], strict=True)]
        better = values[0] > best
        best, found = torch.where(better, values[0], best), torch.where(better, corners.new_tensor(label), found)
    return found


def _norm(x: Tensor) -> float:
    """Return the standard deviation of values whose mean is 0."""
    return float(torch.linalg.vector_norm(x)) / math.sqrt(max(x.numel() - 1, 1))


def _resample_axis(x: Tensor, axis: int, scale: float, shift: float, size: int, border: bool) -> Tensor:
    n = x.shape[axis]
    if n == size and scale == 1 and shift == 0:
        return x
    place = n / 2 + shift + scale * (torch.arange(size, dtype=torch.float64) + 0.5 - size / 2) - 0.5
    if border:
        place = place.clamp(0, n - 1)
    low = place.floor()
    weight = (place - low).float()
    first, second = low.long(), low.long() + 1
    shape = [1] * x.ndim
    shape[axis] = size
    below = ((1 - weight) * ((first >= 0) & (first < n))).view(shape)
    above = (weight * ((second >= 0) & (second < n))).view(shape)
    near = x.index_select(axis, first.clamp(0, n - 1)).mul_(below)
    return near.addcmul_(x.index_select(axis, second.clamp(0, n - 1)), above)


def _blurred(x: Tensor, axis: int, sigma: float) -> Tensor:
    """Convolve ``x`` [*spatial] with a Gaussian of radius about 3 ``sigma`` along ``axis``, reflecting at borders."""
    n = x.shape[axis]
    radius = min(max(1, round(3 * sigma - 0.25)), n - 1)
    if radius < 1:
        return x
    weights = [math.exp(-0.5 * (k / sigma) ** 2) for k in range(radius + 1)]
    total = weights[0] + 2 * sum(weights[1:])
    place = torch.arange(-radius, n + radius).abs()
    place = torch.where(place > n - 1, 2 * (n - 1) - place, place)
    padded = x.index_select(axis, place)
    result = padded.narrow(axis, radius, n) * (weights[0] / total)
    for k in range(1, radius + 1):
        both = padded.narrow(axis, radius - k, n) + padded.narrow(axis, radius + k, n)
        result.add_(both, alpha=weights[k] / total)
    return result
