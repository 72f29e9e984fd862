"""Volume: voxels with their position in the patient, in millimeters.

One convention for all formats:

* The array is [Z, Y, X], or [C, Z, Y, X] with channels; a single picture has Z = 1.
* ``affine`` maps the index (x, y, z, 1), the array's spatial axes in reverse, to millimeters in RAS (x increases to the
  patient's Right, y to Anterior, z to Superior), as in NIfTI. The readers convert the LPS of DICOM and most NRRD files.
"""

import functools
import itertools
import math
import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyclinic.data.formats.safe_reading import LIMITS, Limits, Unreadable

SPATIAL = 3
MAX_LABEL = 32_767
LABEL_ROUNDING = 1e-4
_TO_RAS = np.array([[-1.0], [-1.0], [1.0], [1.0]])
UNORIENTED = "no orientation is stated: left and right are a guess"


@dataclass(frozen=True)
class Volume:
    """Image or mask with the position of its voxels.

    Attributes:
        array: Voxels. Shape [Z, Y, X] or [C, Z, Y, X].
        affine: Index (x, y, z, 1) to RAS millimeters. Shape [4, 4], float64.
        modality: Such as ``"CT"``, ``"MR"``, ``"US"``, or ``""`` if the file does not state it.
        units: Units of the values: ``"HU"``, ``"label"``, ``"RGB"``, ``"Gy"``, or ``""`` (arbitrary).
        measured: Whether the file states a voxel size. If not, 1 mm is assumed, which is not reliable.
        positioned: Whether the file states the orientation and position of the voxels in the patient. If not, the
            affine's directions are an assumption.
        full_scale: For pictures, the stored value of full brightness; None if values have units.
        notes: Observations of the reader, each a sentence. Never quotes text from the file.
    """

    array: Tensor
    affine: Tensor
    modality: str = ""
    units: str = ""
    measured: bool = True
    notes: tuple[str, ...] = ()
    positioned: bool = True
    full_scale: float | None = None

    def __post_init__(self) -> None:
        if self.array.ndim not in (SPATIAL, SPATIAL + 1):
            raise ValueError(f"a volume is [Z, Y, X] or [C, Z, Y, X], not {tuple(self.array.shape)}")
        if tuple(self.affine.shape) != (4, 4) or self.affine.dtype != torch.float64:
            raise ValueError("an affine is a 4 x 4 tensor of float64")
        (a, b, c, x), (d, e, f, y), (g, h, i, z), last = self.affine.tolist()
        determinant = a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)
        finite, volume = all(map(math.isfinite, (determinant, x, y, z, *last))), math.prod(_lengths(self.affine))
        if not finite or abs(determinant) <= 1e-4 * volume:  # whatever the unit, as for voxels of 0.1 micrometers
            raise ValueError("the affine is singular or not finite: it does not place the voxels in space")

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between neighboring voxels along the array's axes (z, y, x), in millimeters."""
        x, y, z = _lengths(self.affine)
        return z, y, x

    @property
    def size(self) -> tuple[int, int, int]:
        """Voxels along (z, y, x)."""
        z, y, x = self.array.shape[-SPATIAL:]
        return z, y, x

    @property
    def orientation(self) -> str:
        """Directions of x, y and z, to the nearest of Left/Right, Anterior/Posterior, Superior/Inferior: ``"RAS"``."""
        axes, signs = nearest_axes(self.affine)
        letters = {0: "LR", 1: "PA", 2: "IS"}
        return "".join(letters[world][int(signs[axis] > 0)] for axis, world in enumerate(axes))


Turn = tuple[tuple[int, int, int], tuple[int, ...]]
"""For each index axis x, y, z: the axis that it becomes, and whether it keeps (+1) or reverses (-1) its direction."""


def _lengths(affine: Tensor) -> tuple[float, float, float]:
    """Return the distance between neighboring voxels along the index axes x, y, z, in millimeters."""
    x, y, z = zip(*affine[:3, :3].tolist(), strict=True)
    return math.hypot(*x), math.hypot(*y), math.hypot(*z)


def nearest_axes(affine: Tensor) -> Turn:
    """Return for each index axis x, y, z the nearest world axis, and whether it increases (+1) or decreases (-1)."""
    lengths = _lengths(affine)
    rows = affine[:3, :3].tolist()
    return nearest_turn(tuple(tuple(v / mm for v, mm in zip(row, lengths, strict=True)) for row in rows))


@functools.lru_cache(maxsize=64)  # files of one scanner have the same
def nearest_turn(cosines: tuple[tuple[float, ...], ...]) -> Turn:
    """Return the permutation and signs nearest to the rows of a 3 x 3 matrix of direction cosines."""
    orders = [(a, b, c) for a, b, c in itertools.permutations(range(3))]
    best = max(orders, key=lambda order: sum(abs(cosines[order[axis]][axis]) for axis in range(3)))
    return best, tuple(1 if cosines[best[axis]][axis] >= 0 else -1 for axis in range(3))


def turned(volume: Volume, turn: Turn) -> Volume:
    """Return the same voxels with index axes permuted and reversed. No voxel moves: the affine is adjusted."""
    axes, signs = turn
    array, affine = volume.array, volume.affine.numpy().copy()
    lead = array.ndim - SPATIAL
    flips = []
    for axis, sign in enumerate(signs):
        if sign < 0:  # index i becomes n - 1 - i
            along = lead + SPATIAL - 1 - axis
            flips.append(along)
            affine[:3, 3] += affine[:3, axis] * (array.shape[along] - 1)
            affine[:3, axis] *= -1
    array = array.flip(flips) if flips else array
    source = [axes.index(new) for new in range(3)]  # the old index axis of each new one
    array = array.permute(*range(lead), *(lead + SPATIAL - 1 - source[new] for new in (2, 1, 0))).contiguous()
    affine[:3, :3] = affine[:3, source]
    return replace(volume, array=array, affine=torch.from_numpy(affine))


def canonical(volume: Volume) -> Volume:
    """Return the same voxels with axes permuted and flipped so that x, y, z point nearest to Right, Anterior, Superior.

    No value is interpolated, and no voxel moves in the patient: the affine is adjusted.
    """
    return turned(volume, nearest_axes(volume.affine))


def resample(
    volume: Volume, spacing_mm: tuple[float, float, float], mode: str | None = None, limits: Limits = LIMITS
) -> Volume:
    """Return the volume on a grid of ``spacing_mm`` (z, y, x) along its own axes, with the same center.

    The new grid covers the old field of view to within half a new voxel. Values between voxels are interpolated
    linearly (without prior smoothing, as in nnU-Net), or by nearest neighbor for labels; outside, the border is
    replicated.

    Args:
        mode: ``"linear"`` or ``"nearest"``; None takes nearest for labels and linear otherwise.
        limits: Limits on the result.
    """
    mode = mode or ("nearest" if volume.units == "label" else "linear")
    if mode not in ("linear", "nearest"):
        raise ValueError(f"mode is 'linear' or 'nearest', not {mode!r}")
    if len(spacing_mm) != SPATIAL or not all(math.isfinite(s) and s > 0 for s in spacing_mm):
        raise ValueError(f"spacing_mm is three positive lengths (z, y, x), not {spacing_mm}")
    old = volume.spacing_mm
    counts = [max(1, round(n * o / s)) for n, o, s in zip(volume.size, old, spacing_mm, strict=True)]
    channels = volume.array.shape[0] if volume.array.ndim > SPATIAL else 1
    if math.prod(counts) * channels * 4 > limits.decoded_bytes:
        raise ValueError(f"{spacing_mm} mm makes {counts} voxels, more than {limits.decoded_bytes} bytes")
    array, affine = volume.array, volume.affine.clone()
    lead = array.ndim - SPATIAL
    first = torch.zeros(3, dtype=torch.float64)
    for axis in range(SPATIAL):
        n, ratio = volume.size[axis], spacing_mm[axis] / old[axis]
        where = (torch.arange(counts[axis], dtype=torch.float64) - (counts[axis] - 1) / 2) * ratio + (n - 1) / 2
        array = _take(array, lead + axis, where, mode)
        first[SPATIAL - 1 - axis] = where[0]
    affine[:3, 3] = volume.affine[:3, :3] @ first + volume.affine[:3, 3]
    for axis in range(SPATIAL):
        affine[:3, SPATIAL - 1 - axis] *= spacing_mm[axis] / old[axis]
    return replace(volume, array=array, affine=affine)


def _take(array: Tensor, axis: int, where: Tensor, mode: str) -> Tensor:
    """Return values at the fractional positions ``where`` along one axis."""
    where = where.clamp(0, array.shape[axis] - 1)
    if mode == "nearest" or bool((where == where.round()).all()):
        return array.index_select(axis, (where + 0.5).floor().long().clamp(max=array.shape[axis] - 1))
    low = where.floor().long().clamp(max=max(array.shape[axis] - 2, 0))
    high = (low + 1).clamp(max=array.shape[axis] - 1)
    values = array if array.is_floating_point() else array.float()
    share = (where - low).to(values.dtype).reshape([-1 if d == axis else 1 for d in range(array.ndim)])
    return torch.lerp(values.index_select(axis, low), values.index_select(axis, high), share)


def as_image(
    path: str | os.PathLike[str],
    stored: np.ndarray[Any, Any],
    fill: float | None,
    slope: float = 1.0,
    inter: float = 0.0,
) -> tuple[Tensor, tuple[str, ...]]:
    """Return ``slope · stored + inter`` as float32, and a note if ``fill`` replaced voxels that are not finite numbers.

    Without ``fill`` (None) a file with such voxels is refused.
    """
    bounded = (
        stored.dtype.kind in ("b", "u", "i") and stored.dtype.itemsize <= 2 and abs(slope) < 1e30 and abs(inter) < 1e30
    )
    scaled = stored
    if (slope, inter) != (1.0, 0.0):  # 32-bit integers lose digits in float32 before scaling
        wide = np.float64 if stored.dtype.itemsize > 2 else np.float32
        if slope == 1:
            scaled = np.add(stored, inter, dtype=wide)
        else:
            scaled = np.multiply(stored, slope, dtype=wide)
            if inter:
                scaled += inter
    values = torch.from_numpy(scaled.astype(np.float32, copy=scaled is stored))
    if bounded:
        return values, ()
    finite = torch.isfinite(values)
    if bool(finite.all()):
        return values, ()
    wrong = f"{int((~finite).sum())} of {values.numel()} voxels"
    if fill is None:
        raise Unreadable(
            path, f"{wrong} are not finite numbers (NaN or infinite); if they are background, set fill = 0"
        )
    return torch.where(finite, values, torch.tensor(float(fill))), (f"{wrong} were not finite and are now {fill:g}",)


def as_mask(path: str | os.PathLike[str], stored: np.ndarray[Any, Any]) -> Tensor:
    """Return labels as int16 if ``stored`` contains integers from 0 to 32767; otherwise refuse the file as a mask.

    Numbers that a slope made from integers may be off by its rounding.
    """
    if stored.dtype.kind == "f":
        whole = np.rint(stored)
        if not (np.isfinite(stored).all() and np.abs(stored - whole).max() <= LABEL_ROUNDING):
            raise Unreadable(path, "is not a mask: its values are not whole numbers")
        stored = whole
    low, high = int(stored.min()), int(stored.max())
    if low < 0 or high > MAX_LABEL:
        raise Unreadable(path, f"is not a mask: its labels go from {low} to {high}, not from 0 to {MAX_LABEL} at most")
    return torch.from_numpy(stored.astype(np.int16))


def voxels_of(
    path: str | os.PathLike[str], stored: np.ndarray[Any, Any], mask: bool, fill: float | None
) -> tuple[Tensor, str, tuple[str, ...]]:
    """Return a file's voxels with their units and notes: labels if ``mask``, otherwise values in arbitrary units."""
    if mask:
        return as_mask(path, stored), "label", ()
    values, notes = as_image(path, stored, fill)
    return values, "", notes


def spans_space(columns: np.ndarray[Any, Any]) -> bool:
    """Return whether steps along x, y, z (as columns [3, 3], in mm) are finite, not 0, and not nearly in one plane."""
    lengths = np.linalg.norm(columns, axis=0)
    sound = bool(np.isfinite(columns).all() and (lengths >= 1e-6).all())
    return sound and bool(abs(np.linalg.det(columns / lengths)) >= 1e-3)


def affine_from(columns: np.ndarray[Any, Any], origin: np.ndarray[Any, Any]) -> Tensor:
    """Return a 4 x 4 affine from the steps along x, y, z (as columns [3, 3]) and the position of the first voxel, in
    mm.
    """
    matrix = np.zeros((4, 4))
    matrix[:3, :3], matrix[:3, 3], matrix[3, 3] = columns, origin, 1
    return torch.from_numpy(matrix)


def lps_to_ras(affine: Tensor) -> Tensor:
    """Convert an affine from LPS (DICOM) to RAS: the signs of the patient's x and y change."""
    return torch.from_numpy(affine.numpy() * _TO_RAS + 0.0)  # no negative zeros
