"""Comparison of voxel grids: whether a mask, or another channel, belongs to an image, voxel by voxel.

The loader and ``data check`` both decide with ``matched``. Axis orders and directions may differ between two files of
one grid: they are compared by the positions of the voxels in the patient, not by index.
"""

import itertools
import os
from dataclasses import replace

import torch
from torch import Tensor

from polyclinic.data.formats.safe_reading import Unreadable
from polyclinic.data.formats.volume import Volume, nearest_turn, turned


class GridMismatch(Unreadable):
    """A mask or channel that is on another grid than its image."""


RELATIVE_TOLERANCE = 0.01
"""Largest distance between corresponding voxels by default, as a share of the smallest voxel side."""


def largest_distance(a: Volume, b: Volume) -> float:
    """Return the largest distance in mm between voxels of the same index, infinite if the sizes differ."""
    if a.size != b.size:
        return float("inf")
    gaps = (a.affine - b.affine) @ _corners(a)
    return float(torch.linalg.vector_norm(gaps[:3], dim=0).max())


def tolerance_of(image: Volume, tolerance_mm: float | None = None) -> float:
    """Return the tolerance in mm: as declared, or 1 % of the smallest voxel side plus the rounding of float32."""
    if tolerance_mm is not None:
        return tolerance_mm
    sides = [side for side, count in zip(image.spacing_mm, image.size, strict=True) if count > 1] or image.spacing_mm
    rounding = float((image.affine @ _corners(image)).abs().max()) * 2.0**-22
    return RELATIVE_TOLERANCE * min(sides) + rounding


def same_grid(a: Volume, b: Volume, tolerance_mm: float | None = None) -> bool:
    """Return whether the voxels of equal index have the same position in the patient, within the tolerance."""
    return largest_distance(a, b) <= tolerance_of(a, tolerance_mm)


def matched(
    image: Volume, other: Volume, path: str | os.PathLike[str], what: str = "mask", tolerance_mm: float | None = None
) -> tuple[Volume, tuple[str, ...]]:
    """Return ``other`` with its voxels in the index order of ``image``, on the image's affine, and notes.

    A file with a position is compared by position, in any axis order. A file without one must have the same size, and
    takes the image's grid.

    Args:
        image: The image as it was read, in any orientation.
        other: Its mask, or another channel.
        path: File of ``other``, for errors.
        what: Description of ``other``, for messages.
        tolerance_mm: Largest distance between corresponding voxels; None for the default of ``tolerance_of``.

    Raises:
        GridMismatch: If the grids differ, or ``other`` has a position and the image has none.
    """
    if other.positioned and image.positioned:
        return _by_position(image, other, path, what, tolerance_mm)
    if other.positioned:
        raise GridMismatch(
            path,
            f"the {what} states a position in the patient ({_rows(other.affine)}) and its image states none "
            f"({_rows(image.affine)} is assumed): if their voxels correspond, copy the geometry of one to the other",
        )
    if other.size != image.size:
        swapped = sorted(other.size) == sorted(image.size)
        hint = "; its axes seem to be in another order: save it again with the geometry of its image"
        raise GridMismatch(
            path,
            f"the {what} of {_by(other.size)} voxels (z, y, x) has no position in the patient, and its image has "
            f"{_by(image.size)}{hint if swapped else ''}",
        )
    if other.measured and image.measured and other.spacing_mm != (1.0, 1.0, 1.0):
        pairs = zip(other.spacing_mm, image.spacing_mm, image.size, strict=True)
        if any(count > 1 and abs(a - b) > RELATIVE_TOLERANCE * b for a, b, count in pairs):
            raise GridMismatch(
                path,
                f"the {what} states voxels of {_by(other.spacing_mm)} mm (z, y, x) and no position, and its image has "
                f"{_by(image.spacing_mm)} mm: save it again with the geometry of its image",
            )
    notes = (f"the {what} states no position and takes the grid of its image",) if image.positioned else ()
    return replace(other, affine=image.affine), notes


def _by_position(
    image: Volume, other: Volume, path: str | os.PathLike[str], what: str, tolerance_mm: float | None
) -> tuple[Volume, tuple[str, ...]]:
    relative = torch.linalg.solve(_directions(image.affine), _directions(other.affine))
    stored, other = other.affine, turned(other, nearest_turn(tuple(map(tuple, relative.tolist()))))
    distance, usual = largest_distance(image, other), tolerance_of(image)
    if distance <= tolerance_of(image, tolerance_mm):
        notes = (f"the {what} is up to {distance:.2g} mm away from its image, within the declared tolerance",)
        return replace(other, affine=image.affine), notes if distance > usual else ()
    if other.size != image.size:
        difference = f"it has {_by(other.size)} voxels (z, y, x) and its image {_by(image.size)}"
    else:
        difference = f"corresponding voxels are up to {distance:.3g} mm apart"
    small = other.size == image.size and distance < min(image.spacing_mm) / 2
    raise GridMismatch(
        path,
        f"the {what} is on another grid than its image: {difference} (affine of the image {_rows(image.affine)}, of "
        f"the {what} {_rows(stored)}); resample it to its image, or save it with the affine of its image if the "
        "voxels correspond" + (f"; if this is rounding, set geometry_tolerance_mm = {distance * 1.2:.2g}" * small),
    )


def _directions(affine: Tensor) -> Tensor:
    columns: Tensor = affine[:3, :3] / torch.linalg.vector_norm(affine[:3, :3], dim=0)
    return columns


def _corners(volume: Volume) -> Tensor:
    """Return the indices (x, y, z, 1) of the eight corner voxels as columns [4, 8]."""
    ends = itertools.product(*((0, n - 1) for n in reversed(volume.size)))
    return torch.tensor([[*corner, 1] for corner in ends], dtype=torch.float64).T


def _by(numbers: tuple[float, ...]) -> str:
    return " x ".join(f"{n:.6g}" for n in numbers)


def _rows(affine: Tensor) -> str:
    """Return the first three rows of an affine in one line: ``[-1 0 0 30; 0 -1 0 40; 0 0 2 -20]``."""
    return "[" + "; ".join(" ".join(f"{float(n) + 0.0:.5g}" for n in row) for row in affine[:3]) + "]"
