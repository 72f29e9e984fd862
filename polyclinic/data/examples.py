"""Examples in memory, the data of one role at one site."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from polyclinic.core.serialization import bytes_of
from polyclinic.data.geometry import Geometry, best_class
from polyclinic.data.texts import joined, taken
from polyclinic.errors import DataError as DataError

Item = TypeVar("Item")
WITHHELD = -1
"""Class number of a withheld label. A regression's withheld target is NaN."""


@dataclass(frozen=True, eq=False)
class Case:
    """One image as evaluation reads it (``learning.tasks.segmentation.ScoredCase``).

    Attributes:
        inputs: The preprocessed image, float32. Shape [C, *grid].
        truth: The mask on the original grid, -1 for pixels without annotation.
        truth_on_grid: The preprocessed mask.
        geometry: The way back to the original grid.
    """

    inputs: Tensor
    truth: Tensor
    truth_on_grid: Tensor
    geometry: Geometry

    @property
    def spacing_mm(self) -> tuple[float, ...] | None:
        """Millimeters between voxels of the original grid, or None if the file does not state them."""
        return self.geometry.original_mm

    @property
    def grid_spacing_mm(self) -> tuple[float, ...] | None:
        """Millimeters between voxels of the preprocessed image."""
        return self.geometry.spacing_mm

    def labels(self, scores: Tensor, decide: Callable[[Tensor], Tensor] = best_class) -> Tensor:
        """Return the label of each voxel of the original grid, given class scores [C, *grid]."""
        return self.geometry.labels(scores, decide)


@dataclass(frozen=True, eq=False)
class Examples:
    """Inputs with their targets and patients.

    Images may be stored as bytes (uint8), a quarter of the memory, and are scaled to float32 in [0, 1] on access.

    Attributes:
        inputs: Shape [n, C, *spatial] for images, uint8 or float32, or [n, F] for tables, float32.
        targets: int64 [n] (classes), float32 [n, L] (several labels, or a number with L = 1), or int64 [n, *spatial]
            (masks; may be stored as uint8).
        patients: Patient of each example. A patient is never in two roles.
        ids: Name of each example, unique within its source.
        positions: Relative height of each slice in its volume, from 0 to 1: float32 [n], if known.
        videos: Number of each frame's video, int64 [n], if known; frames are in temporal order.
        geometries: Position of each image in its file, if it comes from one.
        truths: The mask of each image on the grid of its file, if preprocessing changed the grid of any.
    """

    inputs: Tensor
    targets: Tensor
    patients: Sequence[str]
    ids: Sequence[str]
    positions: Tensor | None = None
    videos: Tensor | None = None
    geometries: tuple[Geometry, ...] | None = None
    truths: tuple[Tensor, ...] | None = None

    def __post_init__(self) -> None:
        sizes = {len(self.inputs), len(self.targets), len(self.patients), len(self.ids)}
        if len(sizes) != 1:
            raise DataError(
                f"{len(self.inputs)} inputs, {len(self.targets)} targets, {len(self.patients)} patients and "
                f"{len(self.ids)} ids do not match: give one of each per example"
            )
        if self.inputs.dtype not in (torch.uint8, torch.float32):
            raise DataError(f"inputs are {self.inputs.dtype}: make them float32, or uint8 for images")
        if self.inputs.ndim < 2:
            raise DataError(
                f"inputs have shape {tuple(self.inputs.shape)}: the first axis counts examples and the "
                "second channels or features"
            )
        if self.targets.dtype not in (torch.int64, torch.uint8, torch.float32):
            raise DataError(f"targets are {self.targets.dtype}: make them int64 (classes, masks) or float32 (numbers)")
        if bad := _not_finite(self.inputs):
            raise DataError(
                f"{len(bad)} of {len(self)} inputs contain NaN or infinite values ({_some(self.ids, bad)}): repair or "
                "leave out those examples, or specify how missing values are filled"
            )

        if bad := _no_target(self.targets):
            raise DataError(
                f"{len(bad)} of {len(self)} targets are NaN or infinite ({_some(self.ids, bad)}): correct or leave out "
                "those examples. Only all targets together can be withheld"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the examples at ``index``: inputs as float32, targets as int64 or float32."""
        x, y = self.inputs[index], self.targets[index]
        if x.dtype == torch.uint8:
            x = x.float().div_(255)
        return x, y.long() if y.dtype == torch.uint8 else y

    @property
    def measured(self) -> bool | None:
        """Whether all files state their pixel size; None if the images come from no files."""
        return None if self.geometries is None else all(g.original_mm is not None for g in self.geometries)

    def case(self, i: int) -> Case:
        """Return image ``i`` with its mask on the original grid. ``geometries`` must be known."""
        assert self.geometries is not None
        x, y = self[torch.tensor([i])]
        return Case(x[0], y[0] if self.truths is None else self.truths[i].long(), y[0], self.geometries[i])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one input: (C, *spatial) or (F,)."""
        return tuple(self.inputs.shape[1:])

    @property
    def labels(self) -> Tensor | None:
        """The class, labels or number of each example; None if the targets are masks or images."""
        return self.targets if self.targets.ndim < 3 else None

    @property
    def highest(self) -> int:
        """The largest class of any target."""
        return int(self.targets.max())

    @property
    def width(self) -> int:
        """The number of labels, numbers or channels of a target."""
        return int(self.targets.shape[1])

    def image(self, i: int) -> Tensor:
        """Return the input of example ``i`` as float32."""
        return self[torch.tensor([i])][0][0]

    def input_hashes(self) -> list[bytes]:
        """Return a hash of each input's bytes."""
        flat: Any = np.frombuffer(bytes_of(self.inputs), np.uint8).reshape(len(self), self.inputs[:1].nbytes)
        return [hashlib.blake2b(row, digest_size=16).digest() for row in flat]

    def subset(self, index: Tensor) -> "Examples":
        """Return the examples at the positions ``index``, or where the mask ``index`` is true."""
        where = index.nonzero().flatten() if index.dtype == torch.bool else index
        pick = where.tolist()
        return Examples(
            self.inputs[where],
            self.targets[where],
            taken(self.patients, pick),
            taken(self.ids, pick),
            None if self.positions is None else self.positions[where],
            None if self.videos is None else self.videos[where],
            None if self.geometries is None else tuple(self.geometries[i] for i in pick),
            None if self.truths is None else tuple(self.truths[i] for i in pick),
        )

    def joined(self, others: Sequence["Examples"]) -> "Examples":
        """Return these examples and then those of ``others``. Positions and videos are left out."""
        return _concatenated([self, *others])

    def unlabeled(self) -> "Examples":
        """Return the same inputs with every target withheld: ``WITHHELD`` for classes and masks, NaN for numbers."""
        masks = self.targets.long() if self.targets.dtype == torch.uint8 else self.targets
        value = float("nan") if masks.dtype == torch.float32 else WITHHELD
        return replace(self, targets=torch.full_like(masks, value), truths=None, geometries=None)


class Dataset(Protocol):
    """Examples of one role at one site: in memory (``Examples``), or on disk (``polyclinic.data.cases``)."""

    @property
    def patients(self) -> Sequence[str]:
        """Patient of each example."""

    @property
    def ids(self) -> Sequence[str]:
        """Name of each example."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one input."""

    @property
    def labels(self) -> Tensor | None:
        """The class, labels or number of each example; None if the targets are masks or images."""

    @property
    def highest(self) -> int:
        """The largest class of any target."""

    @property
    def width(self) -> int:
        """The number of labels, numbers or channels of a target."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Tensor) -> tuple[Tensor, Tensor]: ...

    def image(self, i: int) -> Tensor:
        """Return the complete image of example ``i`` as float32."""

    def input_hashes(self) -> list[bytes]:
        """Return a hash of each complete input."""

    def subset(self, index: Tensor) -> Self:
        """Return the examples at the positions ``index``, or where the mask ``index`` is true."""

    def unlabeled(self) -> Self:
        """Return the same inputs with every target withheld."""

    def joined(self, others: Sequence[Self]) -> Self:
        """Return these examples and then those of ``others``."""


Data = TypeVar("Data", bound=Dataset)


def in_memory(data: Dataset, what: str) -> Examples:
    """Return ``data`` as ``Examples``, for what works on all inputs at once.

    Args:
        data: The examples.
        what: What needs them, as the subject of a sentence.

    Raises:
        DataError: If they are on disk.
    """
    if isinstance(data, Examples):
        return data
    raise DataError(
        f"{what} needs all images in memory in one shape, and patch = ... leaves them on disk: leave patch out, with "
        'steps that make the images alike, such as {step = "resize", size = 128}'
    )


def concat(parts: Sequence[Data]) -> Data:
    """Concatenate the examples of all ``parts``, in order.

    Raises:
        DataError: If there are no parts, or inputs or targets differ in shape or type.
    """
    if not parts:
        raise DataError("there are no examples to concatenate: every part is missing")
    return parts[0].joined(parts[1:])


def _concatenated(parts: Sequence[Examples]) -> Examples:
    for what, tensors in (("inputs", [p.inputs for p in parts]), ("targets", [p.targets for p in parts])):
        kinds = {(tuple(t.shape[1:]), str(t.dtype).removeprefix("torch.")) for t in tensors}
        if len(kinds) > 1:
            listed = " and ".join(sorted(f"{shape} {dtype}" for shape, dtype in kinds))
            raise DataError(f"examples cannot be concatenated because their {what} differ: {listed}")
    return Examples(
        torch.cat([p.inputs for p in parts]),
        torch.cat([p.targets for p in parts]),
        joined([p.patients for p in parts]),
        joined([p.ids for p in parts]),
        geometries=_joined([p.geometries for p in parts]),
        truths=_joined(_truths(parts)),
    )


def _joined(parts: Sequence[tuple[Item, ...] | None]) -> tuple[Item, ...] | None:
    """Return the items of all parts, or None if a part has none."""
    known = [part for part in parts if part is not None]
    return tuple(item for part in known for item in part) if len(known) == len(parts) else None


def _truths(parts: Sequence[Examples]) -> list[tuple[Tensor, ...] | None]:
    """Return the masks on the original grids. Where one part has them, the targets of the others are theirs."""
    if all(part.truths is None for part in parts):
        return [None]
    return [tuple(part.targets) if part.truths is None else part.truths for part in parts]


def _not_finite(inputs: Tensor) -> list[int]:
    """Return the positions of inputs that contain NaN or infinite values."""
    if inputs.dtype == torch.uint8 or len(inputs) == 0 or bool(torch.isfinite(inputs.sum())):
        return []  # a sum is finite only if every term is
    return (~torch.isfinite(inputs).flatten(1).all(1)).nonzero().flatten().tolist()


def _no_target(targets: Tensor) -> list[int]:
    """Return the positions of targets that contain NaN or infinite values, unless all are withheld (NaN)."""
    if targets.dtype != torch.float32 or bool(torch.isfinite(targets).all()) or bool(torch.isnan(targets).all()):
        return []
    return (~torch.isfinite(targets).flatten(1).all(1)).nonzero().flatten().tolist()


def _some(ids: Sequence[str], where: Sequence[int], most: int = 3) -> str:
    more = ", ..." if len(where) > most else ""
    return ", ".join(ids[i] for i in where[:most]) + more
