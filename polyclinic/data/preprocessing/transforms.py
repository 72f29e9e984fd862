"""Preprocessing steps, each a value with a version.

Every step sees one image only, so no information passes between patients, roles or sites. Statistics over many patients
(a table's means) are in ``polyclinic.data.sources.feature_tables``.

Resampling, cropping and intensity scaling follow nnU-Net (Isensee et al., Nature Methods 18:203, 2021,
https://doi.org/10.1038/s41592-020-01008-z, online methods), except that images reduced by more than half are averaged
over areas first, to avoid aliasing. A mask is resampled label by label, as the share of each label in a pixel; the
largest share wins (a label with at least one half, as in nnU-Net, which leaves pixels without any such label empty).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from polyclinic.data.examples import DataError
from polyclinic.data.preprocessing.sample import Picture
from polyclinic.learning.tasks.segmentation import IGNORED

LARGEST = 2**31
"""Largest number of values to which one image may be resampled."""


def each_axis(value: float | Sequence[float], axes: int, what: str) -> tuple[float, ...]:
    """Return one number per axis, given one for all or one for each."""
    each = (value,) * axes if isinstance(value, int | float) else tuple(value)
    if len(each) != axes:
        raise DataError(f"{what} = {list(each)} has {len(each)} numbers, but the image has {axes} axes")
    return each


def require_positive(what: str, value: float | Sequence[float]) -> None:
    """Require one number above 0, or several.

    Raises:
        DataError: If ``value`` is not.
    """
    each = (value,) if isinstance(value, int | float) else tuple(value)
    if not each or not all(math.isfinite(n) and n > 0 for n in each):
        raise DataError(f"{what} = {value}: give numbers above 0")


def require_size(picture: Picture, size: Sequence[int]) -> None:
    """Require that the picture may be resampled to ``size``.

    Raises:
        DataError: If the result would be too large.
    """
    if math.prod(size) * picture.pixels.shape[0] > LARGEST:
        raise DataError(f"an image of {' x '.join(map(str, size))} pixels is too large: choose larger pixels")


def _sized(picture: Picture, size: Sequence[int]) -> Picture:
    """Return the picture with ``size`` pixels over the same field of view."""
    if tuple(size) == picture.size:
        return picture
    require_size(picture, size)
    spacing = picture.spacing_mm and tuple(
        mm * old / new for mm, old, new in zip(picture.spacing_mm, picture.size, size, strict=True)
    )
    return replace(
        picture,
        pixels=_interpolated(picture.pixels, size),
        mask=None if picture.mask is None else _resampled_labels(picture.mask, size),
        spacing_mm=spacing,
        geometry=picture.geometry and picture.geometry.resized(size),
    )


def _interpolated(values: Tensor, size: Sequence[int]) -> Tensor:
    """Return ``values`` [C, *spatial] on ``size`` pixels: means over areas for large reductions, then linear."""
    axes, pixels, before = len(size), values[None], values.shape[1:]
    if any(new < old / 2 for new, old in zip(size, before, strict=True)):
        between = [new if new < old / 2 else old for new, old in zip(size, before, strict=True)]
        average: Any = functional.adaptive_avg_pool2d if axes == 2 else functional.adaptive_avg_pool3d
        pixels = average(pixels, between)
    return functional.interpolate(pixels, tuple(size), mode="bilinear" if axes == 2 else "trilinear")[0]


def _resampled_labels(mask: Tensor, size: Sequence[int]) -> Tensor:
    """Return the label with the largest share of each new pixel; of equal shares, that of the larger label."""
    labels = mask.unique().tolist()
    out = torch.full(tuple(size), labels[0], dtype=mask.dtype)
    if len(labels) == 1:
        return out
    most = _interpolated((mask == labels[0]).float()[None], size)[0]
    for label in labels[1:]:
        share = _interpolated((mask == label).float()[None], size)[0]
        wins = share >= most
        out[wins], most = label, torch.maximum(share, most)
    return out


@dataclass(frozen=True)
class Resample:
    """Resampling to ``mm`` millimeters per pixel: one number, or one per axis, (y, x) or (z, y, x)."""

    name: ClassVar[str] = "resample"
    version: ClassVar[int] = 1
    mm: float | tuple[float, ...]

    def __post_init__(self) -> None:
        require_positive("mm", self.mm)

    def __call__(self, picture: Picture) -> Picture:
        """Return the same field of view, to within half a pixel."""
        if picture.spacing_mm is None:
            raise DataError(
                "the file does not state its pixel size, so it cannot be resampled to millimeters: "
                'leave the step "resample" out, or use "resize"'
            )
        wanted = each_axis(self.mm, len(picture.size), "mm")
        size = [
            max(1, round(n * old / new)) for n, old, new in zip(picture.size, picture.spacing_mm, wanted, strict=True)
        ]
        return _sized(picture, size)


@dataclass(frozen=True)
class Resize:
    """Resizing to ``size`` pixels: one number, or one per axis. May change the aspect ratio."""

    name: ClassVar[str] = "resize"
    version: ClassVar[int] = 1
    size: int | tuple[int, ...]

    def __post_init__(self) -> None:
        require_positive("size", self.size)

    def __call__(self, picture: Picture) -> Picture:
        """Return the same field of view in other pixels."""
        return _sized(picture, [int(n) for n in each_axis(self.size, len(picture.size), "size")])


@dataclass(frozen=True)
class CropPad:
    """Cropping to the central ``size`` pixels; smaller images are padded with ``fill``, and masks with background."""

    name: ClassVar[str] = "crop_pad"
    version: ClassVar[int] = 1
    size: int | tuple[int, ...]
    fill: float = 0.0

    def __post_init__(self) -> None:
        require_positive("size", self.size)

    def __call__(self, picture: Picture) -> Picture:
        """Return the center, cropped or padded."""
        pads: list[int] = []
        wanted = [int(n) for n in each_axis(self.size, len(picture.size), "size")]
        for new, old in reversed(list(zip(wanted, picture.size, strict=True))):
            before = int((new - old) / 2)  # negative pads crop; towards 0, so that cropping undoes padding
            pads += [before, new - old - before]
        mask = None if picture.mask is None else functional.pad(picture.mask, pads)
        geometry = picture.geometry and picture.geometry.cropped([-pad for pad in pads[-2::-2]], wanted)
        pixels = functional.pad(picture.pixels, pads, value=self.fill)
        return replace(picture, pixels=pixels, mask=mask, geometry=geometry)


@dataclass(frozen=True)
class Foreground:
    """Cropping to the box around everything brighter than ``above`` in any channel, plus ``margin`` pixels on each
    side.
    """

    name: ClassVar[str] = "foreground"
    version: ClassVar[int] = 1
    above: float = 0.0
    margin: int = 0

    def __call__(self, picture: Picture) -> Picture:
        """Return the box, or the whole image if nothing is brighter."""
        bright = (picture.pixels > self.above).any(dim=0)
        where = bright.nonzero()
        if not len(where):
            return picture
        low = (where.amin(0) - self.margin).clamp(min=0).tolist()
        high = (where.amax(0) + 1 + self.margin).tolist()
        box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        mask = None if picture.mask is None else picture.mask[box]
        pixels = picture.pixels[(slice(None), *box)]
        geometry = picture.geometry and picture.geometry.cropped(low, pixels.shape[1:])
        return replace(picture, pixels=pixels, mask=mask, geometry=geometry)


@dataclass(frozen=True)
class ZScore:
    """Standardization of each channel to mean 0 and deviation 1, over all pixels or the nonzero ones (brain-extracted
    MR).
    """

    name: ClassVar[str] = "zscore"
    version: ClassVar[int] = 1
    nonzero: bool = False

    def __call__(self, picture: Picture) -> Picture:
        """Return the standardized picture. With ``nonzero``, zeros remain 0. A constant channel becomes 0."""
        channels = []
        for channel in picture.pixels.double():
            seen = channel != 0 if self.nonzero else torch.ones_like(channel, dtype=torch.bool)
            values = channel[seen] if bool(seen.any()) else channel.flatten()
            spread = float(values.std(correction=0))
            scaled = (channel - values.mean()) / (spread if spread > 1e-8 else 1.0)
            channels.append(torch.where(seen, scaled, 0.0))
        return replace(picture, pixels=torch.stack(channels).float())


@dataclass(frozen=True)
class Window:
    """CT window: ``center - width / 2`` to ``center + width / 2`` Hounsfield units become 0 to 1; the rest is
    clipped.
    """

    name: ClassVar[str] = "window"
    version: ClassVar[int] = 1
    center: float
    width: float

    def __post_init__(self) -> None:
        require_positive("width", self.width)

    def __call__(self, picture: Picture) -> Picture:
        """Return values from 0 to 1."""
        low = self.center - self.width / 2
        return replace(picture, pixels=((picture.pixels - low) / self.width).clamp(0, 1))


@dataclass(frozen=True)
class Percentiles:
    """Scaling of each channel's ``low`` and ``high`` percentile to 0 and 1; values beyond are clipped."""

    name: ClassVar[str] = "percentiles"
    version: ClassVar[int] = 1
    low: float = 1.0
    high: float = 99.0

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 100:
            raise DataError(f"low = {self.low}: percentiles need 0 <= low < high <= 100, and high is {self.high}")

    def __call__(self, picture: Picture) -> Picture:
        """Return values from 0 to 1. A constant channel becomes 0."""
        channels = []
        for channel in picture.pixels:
            ordered = channel.flatten().sort().values
            at = [round(share / 100 * (len(ordered) - 1)) for share in (self.low, self.high)]
            low, high = (float(ordered[i]) for i in at)
            channels.append(((channel - low) / (high - low if high > low else 1.0)).clamp(0, 1))
        return replace(picture, pixels=torch.stack(channels))


@dataclass(frozen=True)
class Scale:
    """Linear scaling of ``low`` to ``high`` to 0 to 1, without clipping."""

    name: ClassVar[str] = "scale"
    version: ClassVar[int] = 1
    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.high > self.low:
            raise DataError(f"high = {self.high}: it must be above low = {self.low}")

    def __call__(self, picture: Picture) -> Picture:
        """Return the scaled picture."""
        return replace(picture, pixels=(picture.pixels - self.low) / (self.high - self.low))


@dataclass(frozen=True)
class Relabel:
    """Mapping of the mask's ``values`` to 0, 1, 2, ... in the listed order, or to the values in ``to``."""

    name: ClassVar[str] = "relabel"
    version: ClassVar[int] = 1
    values: tuple[int, ...]
    to: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(set(self.values)) != len(self.values):
            raise DataError(f"values = {list(self.values)}: lists a value twice")
        if self.to and (len(self.to) != len(self.values) or min(self.to) < 0):
            raise DataError(f"to = {list(self.to)}: give one number from 0 for each of values = {list(self.values)}")

    def __call__(self, picture: Picture) -> Picture:
        """Return the picture with the new mask. A value that is not listed is refused."""
        if picture.mask is None:
            raise DataError('the step "relabel" is for masks, and there is none')
        truth = None if picture.truth is None else self._relabeled(picture.truth)
        return replace(picture, mask=self._relabeled(picture.mask), truth=truth)

    def _relabeled(self, mask: Tensor) -> Tensor:
        if unknown := sorted(set(mask.unique().tolist()) - {*self.values, IGNORED}):
            raise DataError(
                f"the mask contains {unknown[:5]}, which are not among the step's values = {list(self.values)}"
            )
        renamed = torch.where(mask == IGNORED, IGNORED, 0)
        for old, new in zip(self.values, self.to or range(len(self.values)), strict=True):
            renamed[mask == old] = new
        return renamed


@dataclass(frozen=True)
class Channels:
    """Conversion to ``count`` channels: colors to gray by their mean, gray to colors by repetition."""

    name: ClassVar[str] = "channels"
    version: ClassVar[int] = 1
    count: int = 1

    def __post_init__(self) -> None:
        require_positive("count", self.count)

    def __call__(self, picture: Picture) -> Picture:
        """Return the mean, or copies of it."""
        if picture.pixels.shape[0] == self.count:
            return picture
        gray = picture.pixels.mean(dim=0, keepdim=True)
        return replace(picture, pixels=gray.expand(self.count, *gray.shape[1:]).contiguous())
