"""nnU-Net's planner: the preprocessing, the patch, the batch and the network that follow from statistics of cases.

Isensee, Jaeger, Kohl, Petersen and Maier-Hein, "nnU-Net: a self-configuring method for deep learning-based biomedical
image segmentation", Nature Methods 18:203, 2021, online methods, https://doi.org/10.1038/s41592-020-01008-z; presets of
the residual encoder from Isensee et al., "nnU-Net Revisited", MICCAI 2024, https://arxiv.org/abs/2404.09556. The rules
and constants are those of nnU-Net 2.8 (https://github.com/MIC-DKFZ/nnUNet, Apache-2.0); ``tests/data/fingerprint``
compares the plans with nnU-Net's own.

Everything here is a function of its arguments. Axes are (z, y, x) until ``transpose``, which is applied to the plan.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from polyclinic.errors import ConfigError
from polyclinic.learning.networks.unet_topology import RESIDUAL_BLOCKS, Topology, feature_map_values, topology

FEWEST = 2
"""Smallest batch."""
LOW_RESOLUTION = 0.25
"""Part of the median image that a patch must cover, or a stage of low resolution is planned."""
STEP = 1.03
"""Factor by which the spacing of the stage of low resolution grows until the patch covers enough."""
MASKED = 0.75
"""Median part of an image that is left after cropping, below which intensities are scaled over nonzero voxels."""
SCHEMES = {
    "ct": "ct",
    "nonorm": "none",
    "zscore": "zscore",
    "rescale_to_0_1": "range",
    "rgb_to_0_1": "bytes",
}
"""Normalization by the lower-case name of a channel; ``zscore`` for all others."""


@dataclass(frozen=True)
class Preset:
    """Network and memory of a plan.

    Attributes:
        network: Name of the network.
        memory_gb: GPU memory for which the patch and the batch are chosen.
        reference: Feature-map values of one example for which a batch of ``BATCHES`` fits into it, by the number of
            axes.
        covered: Largest part of the data set's voxels in one batch.
        fewest: The batch that must fit into the memory, for which the patch is made smaller, by the number of axes.
    """

    network: str
    memory_gb: float
    reference: dict[int, float]
    covered: float = 0.05
    fewest: dict[int, int] = field(default_factory=lambda: {3: 2, 2: 2})


BATCHES = {3: 2, 2: 12}
"""Batch for which the reference values of the presets hold."""
PRESETS: dict[str, Preset] = {
    "default": Preset("nnunet", 8, {3: 560e6, 2: 85e6}),
    "resenc-m": Preset("resenc", 8, {3: 680e6, 2: 135e6}, covered=1, fewest=BATCHES),
    "resenc-l": Preset("resenc", 24, {3: 2100e6, 2: 380e6}, covered=1, fewest=BATCHES),
    "resenc-xl": Preset("resenc", 40, {3: 3600e6, 2: 560e6}, covered=1, fewest=BATCHES),
}


@dataclass(frozen=True)
class Intensities:
    """Foreground intensities of one channel over all cases, each case with the same weight.

    Attributes:
        mean: Mean.
        deviation: Standard deviation.
        low: 0.5 % quantile.
        high: 99.5 % quantile.
    """

    mean: float
    deviation: float
    low: float
    high: float


@dataclass(frozen=True)
class CaseFacts:
    """What a plan follows from, besides the spacing and the size of the images.

    Attributes:
        cases: Number of cases.
        cropped: Median part of an image that is left after cropping.
        intensities: For each channel, its foreground intensities; None if they are not known.
        channels: The names of the channels, which decide how their values are scaled.
        classes: Number of classes with background.
    """

    cases: int
    cropped: float
    intensities: tuple[Intensities | None, ...]
    channels: tuple[str, ...]
    classes: int


@dataclass(frozen=True)
class Configuration:
    """One network with its input, in transposed axes.

    Attributes:
        spacing_mm: Spacing to which images are resampled.
        median_size: Median size of the images then.
        patch: Size of a patch.
        batch_size: Patches in a batch.
        kernels: Kernel of each stage.
        strides: Stride with which each stage begins.
        widths: Features of each stage.
        batch_dice: Whether the Dice loss is computed over all patches of a batch together.
    """

    spacing_mm: tuple[float, ...]
    median_size: tuple[float, ...]
    patch: tuple[int, ...]
    batch_size: int
    kernels: tuple[tuple[int, ...], ...]
    strides: tuple[tuple[int, ...], ...]
    widths: tuple[int, ...]
    batch_dice: bool = False


@dataclass(frozen=True)
class Planned:
    """A plan.

    Attributes:
        preset: Name of the preset.
        network: Name of the network.
        transpose: Which axis comes first, second, ...: the coarsest one first.
        full: Volumes at full resolution; None for two-dimensional images.
        slices: Slices, or two-dimensional images.
        low: Volumes at low resolution, if a patch covers too little at full resolution.
        schemes: How each channel is scaled: ``ct``, ``zscore``, ``none``, ``range`` or ``bytes``.
        masked: For each channel, whether only nonzero voxels count.
    """

    preset: str
    network: str
    transpose: tuple[int, ...]
    full: Configuration | None
    slices: Configuration
    low: Configuration | None = None
    schemes: tuple[str, ...] = ()
    masked: tuple[bool, ...] = field(default=())


def resampled(size: Sequence[float], spacing_mm: Sequence[float], to_mm: Sequence[float]) -> tuple[int, ...]:
    """Return the size in voxels after resampling from ``spacing_mm`` to ``to_mm``."""
    return tuple(round(a / b * n) for n, a, b in zip(size, spacing_mm, to_mm, strict=True))


def configuration(
    spacing_mm: Sequence[float],
    median_size: Sequence[float],
    voxels: float,
    classes: int,
    preset: Preset,
    memory_gb: float | None = None,
) -> Configuration:
    """Return the patch, the batch and the network for images of ``median_size`` with ``spacing_mm``.

    The patch has the aspect ratio of the spacing, is at most as large as the median image, and shrinks along the axis
    that is largest relative to it until the smallest batch of the preset fits into the memory.

    Args:
        spacing_mm: Spacing after resampling.
        median_size: Median size after resampling.
        voxels: Number of voxels of the data set, estimated from the median size.
        classes: Number of classes with background.
        preset: Network and memory.
        memory_gb: GPU memory in place of the preset's.
    """
    axes = len(spacing_mm)
    memory = preset.memory_gb if memory_gb is None else memory_gb
    budget = preset.reference[axes] * (memory / preset.memory_gb)
    patch: list[float] = [min(n, m) for n, m in zip(_initial(spacing_mm), median_size, strict=True)]
    shape = topology(patch, spacing_mm)
    while (needed := _values(shape, classes, preset)) / BATCHES[axes] * preset.fewest[axes] > budget:
        ratios = [n / m for n, m in zip(shape.patch, median_size, strict=True)]
        axis = max(range(axes), key=lambda a: (ratios[a], a))
        smaller = list(shape.patch)
        smaller[axis] -= shape.divisors[axis]
        step = topology(smaller, spacing_mm).divisors[axis]  # the size may be a multiple of a smaller number then
        patch = list(shape.patch)
        patch[axis] -= step
        if patch[axis] <= 0 or topology(patch, spacing_mm).stages < 2:
            raise ConfigError(f"no patch fits into {memory:g} GB: give more memory")
        shape = topology(patch, spacing_mm)
    if shape.stages < 2:
        some = " x ".join(f"{n:g}" for n in median_size)
        raise ConfigError(f"images of {some} voxels are too small for a U-Net, which halves 8 voxels along two axes")
    batch = round(budget / needed * BATCHES[axes])
    batch = min(batch, round(voxels * preset.covered / math.prod(shape.patch)))
    return Configuration(
        tuple(spacing_mm),
        tuple(median_size),
        shape.patch,
        max(batch, FEWEST),
        shape.kernels,
        shape.strides,
        shape.widths(),
    )


def _initial(spacing_mm: Sequence[float]) -> list[int]:
    """Return the size of a patch of 256³ voxels, or 2048² pixels, with the aspect ratio of ``1 / spacing_mm``."""
    inverse = [1 / mm for mm in spacing_mm]
    volume = 256**3 if len(inverse) == 3 else 2048**2
    scale = (volume / math.prod(inverse)) ** (1 / len(inverse))
    return [round(n * scale) for n in inverse]


def _values(shape: Topology, classes: int, preset: Preset) -> int:
    residual = preset.network == "resenc"
    blocks = RESIDUAL_BLOCKS[: shape.stages] if residual else (2,) * shape.stages
    return feature_map_values(shape, shape.widths(), classes, blocks, 1 if residual else 2, residual)


def planned(
    facts: CaseFacts,
    spacing_mm: Sequence[float],
    median_size: Sequence[float],
    preset: str = "default",
    memory_gb: float | None = None,
) -> Planned:
    """Return the plan.

    Args:
        facts: Statistics of the cases.
        spacing_mm: Spacing to which images are resampled (``unet_topology.target_spacing``), (z, y, x) or (y, x).
        median_size: Median size after resampling to it.
        preset: Name of a preset.
        memory_gb: GPU memory in place of the preset's.

    Raises:
        ConfigError: If no preset has this name, or nothing fits into the memory.
    """
    if preset not in PRESETS:
        raise ConfigError(f'no preset is called "{preset}"; there are {", ".join(PRESETS)}')
    chosen, axes = PRESETS[preset], len(spacing_mm)
    coarse = max(range(axes), key=lambda axis: (spacing_mm[axis], -axis)) if axes == 3 else 0
    order = (coarse, *(axis for axis in range(axes) if axis != coarse))
    spacing, median = [spacing_mm[a] for a in order], [median_size[a] for a in order]
    voxels = math.prod(median) * facts.cases

    def made(mm: Sequence[float], size: Sequence[float], count: float, batch_dice: bool) -> Configuration:
        found = configuration(mm, size, count, facts.classes, chosen, memory_gb)
        return Configuration(**{**vars(found), "batch_dice": batch_dice})

    full = low = None
    if axes == 3 and median[0] != 1:
        full = made(spacing, median, voxels, False)
        low = _low(full, median, facts, lambda mm, size, count: made(mm, size, count, False))
        full = full if low is None else made(spacing, median, voxels, True)
    flat = slice(axes - 2, None)
    slices = made(spacing[flat], median[flat], voxels, True)
    schemes = tuple(SCHEMES.get(name.casefold(), "zscore") for name in facts.channels)
    masked = tuple(scheme == "zscore" and facts.cropped < MASKED for scheme in schemes)
    return Planned(preset, chosen.network, order, full, slices, low, schemes, masked)


def _low(
    full: Configuration,
    median: Sequence[float],
    facts: CaseFacts,
    made: Callable[[Sequence[float], Sequence[float], float], Configuration],
) -> Configuration | None:
    """Return the stage of low resolution; None if the patch covers enough of the median image without it."""
    spacing, found, patch, voxels = list(full.spacing_mm), None, math.prod(full.patch), math.prod(median)
    while patch / voxels < LOW_RESOLUTION:
        coarsest = max(spacing)
        fine = [coarsest / mm > 2 for mm in spacing]
        spacing = [mm * STEP if small or not any(fine) else mm for mm, small in zip(spacing, fine, strict=True)]
        ratios = [a / b for a, b in zip(full.spacing_mm, spacing, strict=True)]
        voxels = math.prod(ratio * n for ratio, n in zip(ratios, median, strict=True))
        size = [round(ratio * n) for ratio, n in zip(ratios, median, strict=True)]
        found = made(spacing, size, voxels * facts.cases)
        patch = math.prod(found.patch)
    return None if found is None or math.prod(median) / voxels < 2 else found
