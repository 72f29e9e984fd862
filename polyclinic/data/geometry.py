"""Geometry of an image: how its stored grid lies in the file's own grid, and the way back.

Preprocessing resamples, crops, pads and reorients. Each of these maps index ``s`` of the stored grid to index ``p`` of
the original grid separately for each axis, ``p = scale * s + offset``, so that their composition is again two numbers
an axis. Predictions are brought back by interpolating class scores on the original grid, and taking the best class
there, as nnU-Net does (Isensee et al., Nature Methods 18:203, 2021; ``export_prediction.py``): linearly, but by nearest
neighbor along a single axis whose spacing is more than three times that of the others.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from polyclinic.errors import DataError

ANISOTROPIC = 3.0
"""Ratio of spacings above which the coarsest axis is interpolated by nearest neighbor."""


def best_class(scores: Tensor) -> Tensor:
    """Return the class with the largest score: int64 [...] for scores [C, ...]."""
    return scores.argmax(0)


@dataclass(frozen=True)
class Geometry:
    """Position of a stored grid in the grid of its file.

    The *original* grid has the file's voxels in the axes of the picture: (z, y, x) of RAS, or (y, x) for a single
    slice. The *stored* grid is that of the preprocessed image.

    Attributes:
        affine: Index (x, y, z, 1) of the file to RAS millimeters, row by row: 16 numbers.
        shape: Voxels of the file along its axes (z, y, x).
        axes: For each axis of the picture, the axis of the file.
        flips: For each axis of the picture, whether its direction is reversed.
        original_mm: Millimeters between voxels of the original grid, or None if the file does not state them.
        scale: Voxels of the original grid per stored voxel, along each axis.
        offset: Index in the original grid of the first stored voxel, along each axis.
        stored: Voxels of the stored grid along each axis.
    """

    affine: tuple[float, ...]
    shape: tuple[int, int, int]
    axes: tuple[int, ...]
    flips: tuple[bool, ...]
    original_mm: tuple[float, ...] | None
    scale: tuple[float, ...]
    offset: tuple[float, ...]
    stored: tuple[int, ...]

    @classmethod
    def of_file(
        cls,
        affine: Tensor,
        shape: Sequence[int],
        axes: Sequence[int],
        flips: Sequence[bool],
        original_mm: Sequence[float] | None,
    ) -> "Geometry":
        """Return the geometry of a picture on the file's own grid. The arguments are the attributes."""
        z, y, x = shape
        return cls(
            tuple(affine.flatten().tolist()),
            (z, y, x),
            tuple(axes),
            tuple(flips),
            None if original_mm is None else tuple(original_mm),
            (1.0,) * len(axes),
            (0.0,) * len(axes),
            tuple(shape[axis] for axis in axes),
        )

    @classmethod
    def of_table(cls, table: Mapping[str, Any]) -> "Geometry":
        """Return the geometry that ``table`` describes, as JSON or a cache returns it.

        Raises:
            DataError: If it is not one.
        """
        try:
            values = {key: tuple(item) if isinstance(item, list | tuple) else item for key, item in table.items()}
            made = cls(**values)
            lengths = {len(part) for part in (made.axes, made.flips, made.scale, made.offset, made.stored)}
            sound = len(made.affine) == 16 and len(made.shape) == 3 and len(lengths) == 1
        except TypeError:
            sound = False
        if not sound:
            raise DataError("this is not the geometry of an image")
        return made

    @property
    def table(self) -> dict[str, Any]:
        """The geometry as plain values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    @property
    def matrix(self) -> Tensor:
        """Index (x, y, z, 1) of the file to RAS millimeters. Shape [4, 4], float64."""
        return torch.tensor(self.affine, dtype=torch.float64).reshape(4, 4)

    @property
    def original(self) -> tuple[int, ...]:
        """Voxels of the original grid along each axis of the picture."""
        return tuple(self.shape[axis] for axis in self.axes)

    @property
    def spacing_mm(self) -> tuple[float, ...] | None:
        """Millimeters between stored voxels along each axis, or None if the file does not state them."""
        return self.original_mm and tuple(mm * s for mm, s in zip(self.original_mm, self.scale, strict=True))

    @property
    def same_grid(self) -> bool:
        """Whether the stored grid is the original one."""
        exact = all(s == 1 and o == 0 for s, o in zip(self.scale, self.offset, strict=True))
        return exact and self.stored == self.original

    def resized(self, size: Sequence[int]) -> "Geometry":
        """Return the geometry after resampling to ``size`` voxels over the same field of view."""
        ratios = [old / new for old, new in zip(self.stored, size, strict=True)]
        # The outer edges of the first voxels coincide: s_old = ratio * (s_new + 1/2) - 1/2.
        offset = tuple(o + s * (r - 1) / 2 for o, s, r in zip(self.offset, self.scale, ratios, strict=True))
        scale = tuple(s * r for s, r in zip(self.scale, ratios, strict=True))
        return replace(self, scale=scale, offset=offset, stored=tuple(size))

    def cropped(self, low: Sequence[int], size: Sequence[int]) -> "Geometry":
        """Return the geometry of the ``size`` voxels from index ``low`` on. Both may lie outside (padding)."""
        offset = tuple(o + s * at for o, s, at in zip(self.offset, self.scale, low, strict=True))
        return replace(self, offset=offset, stored=tuple(size))

    def permuted(self, order: Sequence[int]) -> "Geometry":
        """Return the geometry after a permutation of the picture's axes: new axis k is the old axis ``order[k]``."""

        def pick(values: Sequence[Any]) -> tuple[Any, ...]:
            return tuple(values[axis] for axis in order)

        return replace(
            self,
            axes=pick(self.axes),
            flips=pick(self.flips),
            original_mm=self.original_mm and pick(self.original_mm),
            scale=pick(self.scale),
            offset=pick(self.offset),
            stored=pick(self.stored),
        )

    def on_grid_of(self, other: "Geometry") -> "Geometry":
        """Return the position of this stored grid in that of ``other``, of the same file, instead of the file's own.

        Raises:
            DataError: If their axes differ.
        """
        if (self.affine, self.shape, self.axes, self.flips) != (other.affine, other.shape, other.axes, other.flips):
            raise DataError("the steps of both stages need the same order of axes")
        pairs = list(zip(self.scale, self.offset, other.scale, other.offset, strict=True))
        z, y, x = (1,) * (3 - len(other.stored)) + other.stored
        return replace(
            self,
            shape=(z, y, x),
            axes=tuple(range(3 - len(other.stored), 3)),
            flips=(False,) * len(other.stored),
            original_mm=other.spacing_mm,
            scale=tuple(s / t for s, _, t, _ in pairs),
            offset=tuple((o - p) / t for _, o, t, p in pairs),
        )

    def labels(self, scores: Tensor, decide: Callable[[Tensor], Tensor] = best_class) -> Tensor:
        """Return the label of each voxel of the original grid, 0 outside of the stored grid.

        The first axis is processed in slabs, so that the scores of all voxels are never in memory at once.

        Args:
            scores: Class scores (logits) on the stored grid. Shape [C, *stored].
            decide: Returns the labels [...] of interpolated scores [C, ...]; at most 255 with up to 255 classes.

        Returns:
            Shape [*original], uint8 (int16 with more than 255 classes).
        """
        self._require(scores)
        kind = torch.uint8 if len(scores) <= 255 else torch.int16
        if self.same_grid:
            return decide(scores).to(kind)
        out = torch.zeros(self.original, dtype=kind, device=scores.device)
        for low, slab in self._slabs(scores):
            part = decide(slab).to(kind)
            out[(slice(low[0], low[0] + part.shape[0]), *self._inner(low, part))] = part
        return out

    def to_original(self, scores: Tensor, outside: Tensor) -> Tensor:
        """Return the values of ``scores`` [C, *stored] on the original grid, ``outside`` [C] beyond the stored one.

        Shape [C, *original].
        """
        self._require(scores)
        if self.same_grid:
            return scores
        axes = len(self.original)
        out = outside.to(scores.dtype).reshape(-1, *[1] * axes).expand(-1, *self.original).clone()
        for low, slab in self._slabs(scores):
            part = slab[0]
            out[(slice(None), slice(low[0], low[0] + part.shape[0]), *self._inner(low, part))] = slab
        return out

    def in_file(self, picture: Tensor) -> Tensor:
        """Return a picture [*original] in the axes of its file. Shape ``shape``."""
        if tuple(picture.shape) != self.original:
            raise DataError(f"{tuple(picture.shape)} is not the original grid {self.original}")
        dropped = [axis for axis in range(3) if axis not in self.axes]
        order = [*self.axes, *dropped]
        full = picture.reshape(*picture.shape, *[1] * len(dropped))
        full = full.permute(*(order.index(axis) for axis in range(3)))
        flipped = [axis for axis, flip in zip(self.axes, self.flips, strict=True) if flip]
        return (full.flip(flipped) if flipped else full).contiguous()

    def _require(self, scores: Tensor) -> None:
        if tuple(scores.shape[1:]) != self.stored:
            raise DataError(f"scores of shape {tuple(scores.shape[1:])} are not on the stored grid {self.stored}")

    @property
    def _nearest(self) -> int | None:
        """The axis that is interpolated by nearest neighbor, if there is one."""
        for spacing in (self.spacing_mm, self.original_mm):
            if spacing is None or max(spacing) / min(spacing) <= ANISOTROPIC:
                continue
            coarse = [axis for axis, mm in enumerate(spacing) if mm == max(spacing)]
            return coarse[0] if len(coarse) == 1 and len(spacing) > 2 else None
        return None

    def _inside(self, axis: int) -> tuple[int, int]:
        """Return the first voxel of the original grid within the stored field of view, and the one after the last."""
        scale, offset = self.scale[axis], self.offset[axis]
        low = math.ceil(offset - scale / 2 - 1e-6)
        high = math.floor(offset + scale * (self.stored[axis] - 0.5) + 1e-6) + 1
        return max(low, 0), min(high, self.original[axis])

    def _inner(self, low: Sequence[int], part: Tensor) -> tuple[slice, ...]:
        return tuple(slice(at, at + size) for at, size in zip(low[1:], part.shape[1:], strict=True))

    def _slabs(self, scores: Tensor) -> Any:
        """Yield the first index of each slab on the original grid, and its scores [C, rows, ...]."""
        bounds = [self._inside(axis) for axis in range(len(self.original))]
        if any(high <= low for low, high in bounds):
            return
        rest = math.prod(high - low for low, high in bounds[1:]) * len(scores)
        rows = max(1, SLAB // rest)
        for start in range(bounds[0][0], bounds[0][1], rows):
            end = min(start + rows, bounds[0][1])
            slab = self._along(scores, 0, start, end)
            for axis, (low, high) in enumerate(bounds[1:], 1):
                slab = self._along(slab, axis, low, high)
            yield [start, *(low for low, _ in bounds[1:])], slab

    def _along(self, values: Tensor, axis: int, low: int, high: int) -> Tensor:
        """Return ``values`` [C, ...] at the original indices ``low`` to ``high`` along one axis."""
        last = self.stored[axis] - 1
        at = torch.arange(low, high, dtype=torch.float64)
        at = ((at - self.offset[axis]) / self.scale[axis]).clamp(0, last)
        if axis == self._nearest:
            return values.index_select(axis + 1, (at + 0.5).floor().long().clamp(max=last).to(values.device))
        below = at.floor().long().clamp(max=max(last - 1, 0))
        above = (below + 1).clamp(max=last)
        share = (at - below).to(values.dtype).reshape([-1 if d == axis + 1 else 1 for d in range(values.ndim)])
        below, above, share = (part.to(values.device) for part in (below, above, share))
        return torch.lerp(values.index_select(axis + 1, below), values.index_select(axis + 1, above), share)


SLAB = 2**24
"""Largest number of scores of one slab."""
