"""Shape of a U-Net for a patch: how often each axis is halved, kernels, widths, and the size of its feature maps.

The rules of nnU-Net: Isensee, Jaeger, Kohl, Petersen and Maier-Hein, "nnU-Net: a self-configuring method for deep
learning-based biomedical image segmentation", Nature Methods 18:203, 2021, online methods,
https://doi.org/10.1038/s41592-020-01008-z; the residual encoder is that of Isensee et al., "nnU-Net Revisited", MICCAI
2024, https://arxiv.org/abs/2404.09556. Imports no numerical library, so that a plan can be made and read without one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

SMALLEST = 4
"""Smallest number of voxels along an axis at the bottom of the network."""
RESIDUAL_BLOCKS = (1, 3, 4, 6, 6, 6, 6, 6, 6, 6, 6)
"""Number of residual blocks of each encoder stage."""
WIDEST = {2: 512, 3: 320}


ANISOTROPIC = 3.0
"""Ratio of spacings, and of sizes, from which one axis is treated as coarse."""


@dataclass(frozen=True)
class Topology:
    """Stages of a U-Net, from the finest to the bottleneck.

    Attributes:
        patch: Size of the patch along each axis, a multiple of the total stride.
        kernels: Kernel of the convolutions of each stage.
        strides: Stride with which each stage begins; 1 along every axis for the first.
    """

    patch: tuple[int, ...]
    kernels: tuple[tuple[int, ...], ...]
    strides: tuple[tuple[int, ...], ...]

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.strides)

    @property
    def divisors(self) -> tuple[int, ...]:
        """Total stride along each axis."""
        return tuple(math.prod(stride[axis] for stride in self.strides) for axis in range(len(self.patch)))

    def widths(self, base: int = 32, widest: int | None = None) -> tuple[int, ...]:
        """Return the number of features of each stage: doubled at each, up to 320 in 3-D and 512 in 2-D."""
        limit = WIDEST[len(self.patch)] if widest is None else widest
        return tuple(min(base * 2**stage, limit) for stage in range(self.stages))


def topology(patch: Sequence[float], spacing_mm: Sequence[float] | None = None) -> Topology:
    """Return the stages for a ``patch`` of voxels of ``spacing_mm``, which is enlarged to a multiple of the strides.

    An axis is halved while it keeps at least ``SMALLEST`` voxels, and while its spacing is less than twice the finest
    of the axes that can still be halved; the last axis that remains must have 3 · ``SMALLEST`` voxels. The kernel along
    an axis is 1 until its spacing is less than twice the finest one, and 3 from there on.
    """
    axes = range(len(patch))
    size, spacing = list(patch), [1.0] * len(patch) if spacing_mm is None else list(spacing_mm)
    kernel, kernels, strides = [1] * len(patch), list[tuple[int, ...]](), [(1,) * len(patch)]
    while halved := _halved(size, spacing):
        kernel = [3 if spacing[a] < 2 * min(spacing) else kernel[a] for a in axes]
        kernels.append(tuple(kernel))
        strides.append(tuple(2 if a in halved else 1 for a in axes))
        for a in halved:
            size[a], spacing[a] = -(-size[a] // 2), 2 * spacing[a]
    kernels.append((3,) * len(patch))
    divisors = [math.prod(stride[a] for stride in strides) for a in axes]
    padded = tuple(int(-(-n // d) * d) for n, d in zip(patch, divisors, strict=True))
    return Topology(padded, tuple(kernels), tuple(strides))


def _halved(size: Sequence[float], spacing: Sequence[float]) -> list[int]:
    """Return the axes that the next stage halves; none if the network ends here."""
    large = [a for a, n in enumerate(size) if n >= 2 * SMALLEST]
    finest = min((spacing[a] for a in large), default=0.0)
    chosen = [a for a in large if spacing[a] < 2 * finest]
    return [] if len(chosen) == 1 and size[chosen[0]] < 3 * SMALLEST else chosen


def target_spacing(
    median_mm: Sequence[float], fine_mm: Sequence[float], median_size: Sequence[float]
) -> tuple[float, ...]:
    """Return the spacing to which images are resampled: the median along each axis.

    A coarse axis, with more than three times the spacing of any other and less than a third of their voxels, takes the
    10 % quantile, but no finer one than the others have.

    Args:
        median_mm: Median spacing along each axis.
        fine_mm: 10 % quantile of the spacing.
        median_size: Median size of the images.
    """
    spacing = list(median_mm)
    if len(spacing) < 3:
        return tuple(spacing)
    coarse = max(range(len(spacing)), key=lambda axis: (spacing[axis], -axis))
    others = [axis for axis in range(len(spacing)) if axis != coarse]
    widest = max(spacing[axis] for axis in others)
    few = median_size[coarse] * ANISOTROPIC < min(median_size[axis] for axis in others)
    if spacing[coarse] > ANISOTROPIC * widest and few:
        spacing[coarse] = widest + 1e-5 if fine_mm[coarse] < widest else fine_mm[coarse]
    return tuple(spacing)


def feature_map_values(
    shape: Topology, widths: Sequence[int], classes: int, blocks: Sequence[int], decoder: int, residual: bool = False
) -> int:
    """Return the number of values that the convolutions of one example produce, a measure of the memory needed.

    Args:
        shape: The stages.
        widths: Number of features of each stage.
        classes: Number of output channels.
        blocks: Convolutions of each encoder stage, or residual blocks of two.
        decoder: Convolutions of each decoder stage.
        residual: Whether the encoder is residual, with a stem and, where a stage changes its features or size, a
            projection in the shortcut.
    """
    sizes, size = list[int](), list(shape.patch)
    for stride in shape.strides:
        size = [n // s for n, s in zip(size, stride, strict=True)]
        sizes.append(math.prod(size))
    total = sizes[0] * widths[0] if residual else 0
    for stage, (voxels, width, count) in enumerate(zip(sizes, widths, blocks, strict=False)):
        shortcut = widths[max(stage - 1, 0)] != width or max(shape.strides[stage]) > 1
        total += voxels * width * ((2 * count + shortcut) if residual else count)
    for voxels, width in zip(sizes[:-1], widths[:-1], strict=True):
        total += voxels * width * (decoder + 1)
    return total + sizes[0] * classes
