"""nnU-Net's preprocessing steps: transpose, crop to nonzero voxels, scale intensities, then resample.

Isensee et al., Nature Methods 18:203, 2021, online methods, https://doi.org/10.1038/s41592-020-01008-z; the details are
those of nnU-Net 2.8 (``default_preprocessor.py``, ``default_resampling.py`` and ``default_normalization_schemes.py``
of https://github.com/MIC-DKFZ/nnUNet). Intensities are scaled before resampling, so that clipping of CT is exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from polyclinic.data.examples import DataError
from polyclinic.data.preprocessing.sample import Picture
from polyclinic.data.preprocessing.transforms import each_axis, require_positive, require_size
from polyclinic.learning.networks.unet_topology import ANISOTROPIC

SCHEMES = ("zscore", "ct", "range", "none")


@dataclass(frozen=True)
class Transpose:
    """Permutation of the spatial axes: the new axis k is the old axis ``axes[k]``; nnU-Net puts the coarsest first."""

    name: ClassVar[str] = "transpose"
    version: ClassVar[int] = 1
    axes: tuple[int, ...]

    def __post_init__(self) -> None:
        if sorted(self.axes) != list(range(len(self.axes))):
            raise DataError(f"axes = {list(self.axes)}: name each of {list(range(len(self.axes)))} once")

    def __call__(self, picture: Picture) -> Picture:
        """Return the picture with its axes in another order."""
        if len(self.axes) != len(picture.size):
            raise DataError(f"axes = {list(self.axes)}: the image has {len(picture.size)} axes")
        mask, spacing = picture.mask, picture.spacing_mm
        return replace(
            picture,
            pixels=picture.pixels.permute(0, *(axis + 1 for axis in self.axes)).contiguous(),
            mask=None if mask is None else mask.permute(*self.axes).contiguous(),
            spacing_mm=None if spacing is None else tuple(spacing[axis] for axis in self.axes),
            geometry=picture.geometry and picture.geometry.permuted(self.axes),
            truth=None if picture.truth is None else picture.truth.permute(*self.axes).contiguous(),
        )


@dataclass(frozen=True)
class CropNonzero:
    """Cropping to the box around all voxels that are not 0 in every channel."""

    name: ClassVar[str] = "crop_nonzero"
    version: ClassVar[int] = 1

    def __call__(self, picture: Picture) -> Picture:
        """Return the box, or the whole image if all of it is 0."""
        where = (picture.pixels != 0).any(dim=0).nonzero()
        if not len(where):
            return picture
        low, high = where.amin(0).tolist(), (where.amax(0) + 1).tolist()
        box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        pixels = picture.pixels[(slice(None), *box)].contiguous()
        mask = None if picture.mask is None else picture.mask[box].contiguous()
        geometry = picture.geometry and picture.geometry.cropped(low, pixels.shape[1:])
        return replace(picture, pixels=pixels, mask=mask, geometry=geometry)


@dataclass(frozen=True)
class Normalize:
    """Scaling of each channel in its own way. Lists have one entry for each channel.

    ``zscore`` gives an image the mean 0 and the deviation 1, ``ct`` clips to ``low`` and ``high`` and scales with the
    data set's ``mean`` and ``deviation``, ``range`` scales each image to 0 to 1, and ``none`` changes nothing.
    ``nonzero`` says whether ``zscore`` counts and changes only voxels within the nonzero region of an image.
    """

    name: ClassVar[str] = "normalize"
    version: ClassVar[int] = 1
    schemes: tuple[str, ...]
    nonzero: tuple[bool, ...] = ()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    mean: tuple[float, ...] = ()
    deviation: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if wrong := sorted(set(self.schemes) - set(SCHEMES)):
            raise DataError(f"schemes: {wrong[0]!r} is none of {', '.join(SCHEMES)}")
        count = len(self.schemes)
        if not count:
            raise DataError("schemes: name one for each channel")
        numbers = ("low", "high", "mean", "deviation") if "ct" in self.schemes else ()
        if missing := [key for key in numbers if len(getattr(self, key)) != count]:
            raise DataError(f'{missing[0]}: with the scheme "ct", give {count} numbers, one for each channel')
        if self.nonzero and len(self.nonzero) != count:
            raise DataError(f"nonzero: give {count} values, one for each channel")

    @property
    def by_image(self) -> bool:
        """Whether every channel is scaled by each image's own values, so that units may differ between images."""
        return all(scheme in ("zscore", "range") for scheme in self.schemes)

    def __call__(self, picture: Picture) -> Picture:
        """Return the picture with scaled channels."""
        if len(self.schemes) != picture.pixels.shape[0]:
            raise DataError(f"schemes: there are {len(self.schemes)}, and the image has {len(picture.pixels)} channels")
        inside = _filled(picture.pixels) if any(self.nonzero) else None
        channels = [self._scaled(i, channel.double(), inside) for i, channel in enumerate(picture.pixels)]
        return replace(picture, pixels=torch.stack(channels).float())

    def _scaled(self, i: int, channel: Tensor, inside: Tensor | None) -> Tensor:
        match self.schemes[i]:
            case "zscore":
                chosen = channel[inside] if inside is not None and self.nonzero[i] else channel.flatten()
                scaled = (channel - chosen.mean()) / max(float(chosen.std(correction=0)), 1e-8)
                return torch.where(inside, scaled, channel) if inside is not None and self.nonzero[i] else scaled
            case "ct":
                return (channel.clamp(self.low[i], self.high[i]) - self.mean[i]) / max(self.deviation[i], 1e-8)
            case "range":
                return (channel - channel.min()) / max(float(channel.max() - channel.min()), 1e-8)
        return channel


def _filled(pixels: Tensor) -> Tensor:
    """Return where an image is not 0 in some channel, with the holes of this region."""
    from scipy.ndimage import binary_fill_holes

    region = (pixels != 0).any(dim=0)
    found = torch.from_numpy(binary_fill_holes(region.numpy()))
    return found if bool(found.any()) else torch.ones_like(region)


@dataclass(frozen=True)
class ResampleNnunet:
    """Resampling to ``mm`` millimeters per voxel, one number per axis: cubic splines for images, masks label by label.

    If one axis is coarse, with more than three times the spacing of the finest one, images and masks are resampled
    slice by slice within the other two, and along the coarse axis by nearest neighbor.
    """

    name: ClassVar[str] = "resample_cubic"
    version: ClassVar[int] = 1
    mm: float | tuple[float, ...]

    def __post_init__(self) -> None:
        require_positive("mm", self.mm)

    def __call__(self, picture: Picture) -> Picture:
        """Return the same field of view, to within half a voxel."""
        old = picture.spacing_mm
        if old is None:
            raise DataError(
                "the file does not state its voxel size, so it cannot be resampled to millimeters: leave the step "
                f'"{self.name}" out'
            )
        new = each_axis(self.mm, len(picture.size), "mm")
        size = [max(1, round(a / b * n)) for n, a, b in zip(picture.size, old, new, strict=True)]
        if tuple(size) == picture.size:
            return picture
        require_size(picture, size)
        axis = _coarse(old) if max(old) / min(old) > ANISOTROPIC else _coarse(new)
        pixels = np.stack([_resized(channel.numpy(), size, 3, axis) for channel in picture.pixels])
        spacing = tuple(mm * n / m for mm, n, m in zip(old, picture.size, size, strict=True))
        return replace(
            picture,
            pixels=torch.from_numpy(pixels.astype(np.float32)),
            mask=None if picture.mask is None else _labels(picture.mask, size, axis),
            spacing_mm=spacing,
            geometry=picture.geometry and picture.geometry.resized(size),
        )


def _coarse(spacing: Sequence[float]) -> int | None:
    """Return the axis that is resampled by nearest neighbor, if there is one."""
    if len(spacing) < 3 or max(spacing) / min(spacing) <= ANISOTROPIC:
        return None
    coarse = [axis for axis, mm in enumerate(spacing) if mm == max(spacing)]
    return coarse[0] if len(coarse) == 1 else None


def _resized(values: Any, size: Sequence[int], order: int, axis: int | None) -> Any:
    """Return an array on another grid over the same field of view; along ``axis``, if any, by nearest neighbor."""
    from scipy.ndimage import map_coordinates, zoom

    if axis is None:
        factors = [n / m for n, m in zip(size, values.shape, strict=True)]
        found = zoom(values.astype(np.float64), factors, order=order, mode="nearest", grid_mode=True)
        return found.clip(values.min(), values.max()) if order > 1 else found
    flat = [n for i, n in enumerate(size) if i != axis]
    slices = np.stack([_resized(one, flat, order, None) for one in np.moveaxis(values, axis, 0)], axis)
    if size[axis] == values.shape[axis]:
        return slices
    scale = values.shape[axis] / size[axis]
    at = scale * (np.arange(size[axis]) + 0.5) - 0.5
    line = map_coordinates(np.arange(values.shape[axis], dtype=np.float64), [at], order=0, mode="nearest")
    return np.take(slices, line.astype(int), axis)


def _labels(mask: Tensor, size: Sequence[int], axis: int | None) -> Tensor:
    """Return a mask on another grid: the label with the largest linearly resampled share of a voxel.

    Of equal shares, the label of the nearest voxel wins.
    """
    labels = mask.unique().tolist()
    found = torch.full(tuple(size), labels[0], dtype=mask.dtype)
    if len(labels) == 1:
        return found
    nearest, best = _resized(mask.numpy(), size, 0, axis), np.full(tuple(size), -1.0)
    for label in labels:
        share = _resized((mask == label).numpy(), size, 1, axis)
        wins = (share > best + 1e-9) | ((share > best - 1e-9) & (nearest == label))
        found[torch.from_numpy(wins)] = label
        best = np.maximum(best, share)
    return found
