"""Cases of unequal shapes on disk, seen as examples of one shape.

For segmentation an example is a patch. Training draws patches at random, as nnU-Net does (Isensee et al., Nature
Methods 18:203, 2021; ``data_loader.py`` of MIC-DKFZ/nnUNet): a patch that is forced to show the foreground is centered
on a stored voxel of a class that is drawn among those of the case; any other one begins at a place drawn uniformly
among those at which it covers the image, or, where it is larger than the view, overhangs the image by at most half of
the difference. For other tasks an example is the picture, resized so that it covers the view, and cropped to its
center.

Nothing is kept in memory but the headers of the files. Reading is pure and may be done by several threads.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from polyclinic.data.cases.case_file import CaseFile, as_stored
from polyclinic.data.examples import WITHHELD, Case
from polyclinic.data.formats.mask_labels import WHITE
from polyclinic.data.preprocessing.previous_stage import SEEN
from polyclinic.data.source import digest
from polyclinic.errors import DataError
from polyclinic.learning.batch import Batch

Targets = Literal["given", "boxes", "withheld"]


@dataclass(frozen=True, eq=False)
class Cases:
    """Cases on disk, with the face of ``Examples``; ``cases[index]`` are their central views.

    Attributes:
        files: The stored cases.
        patch: Shape of a view, [*spatial].
        channels: Number of channels of every case.
        patients: Patient of each case.
        ids: Name of each case.
        labels: Class, labels or number of each case, as in ``Examples.targets``; None if the targets are masks.
        positions: As in ``Examples``.
        videos: As in ``Examples``.
        targets_as: Whether masks are shown as they are, as boxes around their foreground, or not at all.
        white: Whether the masks mark the foreground with 255, which becomes 1.
        mask_channels: How many of the last channels are labels of a mask, 0 or 1 (of a cascade's previous stage).
    """

    files: tuple[CaseFile, ...]
    patch: tuple[int, ...]
    channels: int
    patients: tuple[str, ...]
    ids: tuple[str, ...]
    labels: Tensor | None = None
    positions: Tensor | None = None
    videos: Tensor | None = None
    targets_as: Targets = "given"
    white: bool = False
    mask_channels: int = 0

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Tensor) -> Batch:
        """Return the central views of the cases at ``index``: inputs float32 [n, C, *patch], and their targets."""
        views = [self._view(i, self._center(i, self.patch), self.patch) for i in index.tolist()]
        if not views:
            shape = self.patch if self.labels is None else self.labels.shape[1:]
            kind = torch.int64 if self.labels is None else self.labels.dtype
            return torch.zeros(0, *self.shape), torch.zeros(0, *shape, dtype=kind)
        return torch.stack([x for x, _ in views]), torch.stack([y for _, y in views])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one view: (C, *patch)."""
        return (self.channels, *self.patch)

    def draw(self, i: int, rng: torch.Generator, forced: bool, size: tuple[int, ...]) -> Batch:
        """Return a view of case ``i``: float32 [C, *size], and its target.

        The result depends only on the case, the state of ``rng`` and the arguments. A picture with a class or a number
        is resized as for the central view, of which ``size`` shows more or less, with 0 outside of the picture; ``rng``
        is then not used.

        Args:
            i: The case.
            rng: Source of every random number.
            forced: Whether the center is a voxel of the foreground, if the case has one that may be known.
            size: Shape of the view, at least ``patch``; larger for an augmentation that rotates it.
        """
        if self.labels is not None:
            return self._view(i, (), size)
        file = self.files[i]
        spare = [max(n - p, n - side, 0) for n, p, side in zip(size, self.patch, file.size, strict=True)]
        lowest = [-(s // 2) for s in spare]
        highest = [side + s - s // 2 - n for side, s, n in zip(file.size, spare, size, strict=True)]
        classes = sorted(file.places) if forced and self.targets_as == "given" else []
        if forced and self.targets_as == "boxes" and file.box:
            voxel = tuple(a + _below(b - a + 1, rng) for a, b in file.box)
            low = [max(at - n // 2, least) for at, n, least in zip(voxel, size, lowest, strict=True)]
        elif classes:
            label = classes[_below(len(classes), rng)]
            voxel = file.place(label, _below(file.places[label].shape[0], rng))
            low = [max(at - n // 2, least) for at, n, least in zip(voxel, size, lowest, strict=True)]
        else:
            low = [a + _below(b - a + 1, rng) for a, b in zip(lowest, highest, strict=True)]
        return self._view(i, low, size)

    def image(self, i: int) -> Tensor:
        """Return the complete image of case ``i``: float32 [C, *spatial]."""
        file = self.files[i]
        return file.image((0,) * len(file.size), file.size)

    def whole(self, i: int) -> Batch:
        """Return case ``i`` as it is stored: the image, float32 [C, *spatial], and its target."""
        size = self.files[i].size
        return self.image(i), self._target(i, (0,) * len(size), size)

    @property
    def seen_before(self) -> tuple[str, ...]:
        """The names of the cases that a cascade's previous stage was trained on, as far as is known."""
        return tuple(name for name, file in zip(self.ids, self.files, strict=True) if SEEN in file.notes)

    @property
    def measured(self) -> bool | None:
        """Whether all files state their pixel size; None if the targets are not masks."""
        if self.labels is not None or self.targets_as != "given":
            return None
        return all(file.geometry is not None and file.geometry.original_mm is not None for file in self.files)

    def case(self, i: int) -> Case:
        """Return image ``i`` with its mask on the original grid, for evaluation. Its geometry must be known."""
        geometry = self.files[i].geometry
        if geometry is None:
            raise DataError(f"{self.ids[i]}: the position of the image in its file is not known")
        image, mask = self.whole(i)
        truth = self._classes(self.files[i].original_mask()) if self.files[i].truth else mask
        return Case(image, truth, mask, geometry)

    def each(self) -> Iterator[Batch]:
        """Yield every case as it is stored, one after the other."""
        return (self.whole(i) for i in range(len(self)))

    def subset(self, index: Tensor) -> "Cases":
        """Return the cases at the positions ``index``, or where the mask ``index`` is true."""
        where = index.nonzero().flatten() if index.dtype == torch.bool else index
        pick = where.tolist()
        return replace(
            self,
            files=tuple(self.files[i] for i in pick),
            patients=tuple(self.patients[i] for i in pick),
            ids=tuple(self.ids[i] for i in pick),
            labels=None if self.labels is None else self.labels[where],
            positions=None if self.positions is None else self.positions[where],
            videos=None if self.videos is None else self.videos[where],
        )

    def unlabeled(self) -> "Cases":
        """Return the same images with every target withheld: ``WITHHELD`` for classes and masks, NaN for numbers."""
        labels = self.labels
        if labels is not None:
            labels = torch.full_like(labels, float("nan") if labels.is_floating_point() else WITHHELD)
        return replace(self, labels=labels, targets_as="withheld")

    def boxed(self) -> "Cases":
        """Return the same images, with a box around the foreground of each mask, filled with its largest class."""
        return replace(self, targets_as="boxes")

    def joined(self, others: Sequence["Cases"]) -> "Cases":
        """Return these cases and then those of ``others``. Positions and videos are left out.

        Raises:
            DataError: If they differ in channels, view or kind of target.
        """
        parts = (self, *others)
        kinds = {(p.shape, p.targets_as, None if p.labels is None else tuple(p.labels.shape[1:])) for p in parts}
        if len(kinds) > 1:
            listed = " and ".join(sorted(str(shape) for shape, *_ in kinds))
            raise DataError(f"cases cannot be concatenated because their views or targets differ: {listed}")
        return replace(
            self,
            files=tuple(file for p in parts for file in p.files),
            patients=tuple(patient for p in parts for patient in p.patients),
            ids=tuple(name for p in parts for name in p.ids),
            labels=None if self.labels is None else torch.cat([p.labels for p in parts if p.labels is not None]),
            positions=None,
            videos=None,
        )

    @property
    def targets(self) -> Tensor:
        """The labels, under the name that data in memory have for them. Cases with masks have no such attribute."""
        if self.labels is None:
            raise AttributeError("the targets are masks on disk")
        return self.labels

    @property
    def highest(self) -> int:
        """The largest class of any target."""
        if self.labels is not None:
            return int(self.labels.max())
        return max((1 if self.white and label == WHITE else label for f in self.files for label in f.labels), default=0)

    @property
    def width(self) -> int:
        """The number of labels or numbers of a target."""
        if self.labels is None:
            raise DataError("masks have no number of values")
        return int(self.labels.shape[1])

    def input_hashes(self) -> list[bytes]:
        """Return a hash of each stored image."""
        return [bytes.fromhex(file.hashes[0]) for file in self.files]

    def target_hashes(self) -> list[bytes]:
        """Return a hash of each target."""
        if self.labels is not None:
            return [bytes.fromhex(digest(row.tolist())) for row in self.labels]
        return [bytes.fromhex(file.hashes[1]) for file in self.files]

    def _center(self, i: int, size: Sequence[int]) -> tuple[int, ...]:
        return tuple((side - n) // 2 for side, n in zip(self.files[i].size, size, strict=True))

    def _view(self, i: int, low: Sequence[int], size: Sequence[int]) -> Batch:
        file = self.files[i]
        if self.labels is None:
            return file.image(low, size), self._target(i, low, size)
        return resized(self.image(i), self.patch, size), self.labels[i]

    def _classes(self, mask: Tensor) -> Tensor:
        """Return the classes that stored labels mean."""
        return torch.where(mask == WHITE, 1, mask) if self.white else mask

    def _target(self, i: int, low: Sequence[int], size: Sequence[int]) -> Tensor:
        if self.labels is not None:
            return self.labels[i]
        if self.targets_as == "withheld":
            return torch.full(tuple(size), WITHHELD)
        file = self.files[i]
        if self.targets_as == "given":
            return self._classes(file.labels_at(low, size))
        box = torch.zeros(tuple(size), dtype=torch.int64)
        if file.box:
            parts = [slice(max(a - o, 0), max(b + 1 - o, 0)) for (a, b), o in zip(file.box, low, strict=True)]
            box[tuple(parts)] = 1 if self.white else max(file.labels)
        return box


def seen(pixels: Tensor, patch: Sequence[int], masks: bool) -> Tensor:
    """Return a prepared image [C, *spatial] as a network that was trained on cases sees it, float32.

    Args:
        pixels: The image after the steps.
        patch: Shape of a view.
        masks: Whether masks are predicted, for the complete image; if not, the result has the shape of a view.
    """
    values = as_stored(pixels)
    return values if masks else resized(values, patch)


def resized(picture: Tensor, view: Sequence[int], size: Sequence[int] | None = None) -> Tensor:
    """Return the center of a picture [C, *spatial] that is scaled so that it just covers ``view``.

    The aspect ratio is kept. Pictures that shrink by more than half are averaged over areas first, as by the step
    ``resize``.

    Args:
        picture: The picture.
        view: What it covers.
        size: Shape of the result, ``view`` by default; 0 outside of the picture.
    """
    sides = picture.shape[1:]
    factor = max(n / side for n, side in zip(view, sides, strict=True))
    fitted = [max(n, round(side * factor)) for n, side in zip(view, sides, strict=True)]
    values = picture[None]
    if list(sides) != fitted:
        if factor < 1 / 2:
            average: Any = functional.adaptive_avg_pool2d if len(view) == 2 else functional.adaptive_avg_pool3d
            values = average(values, fitted)
        else:
            values = functional.interpolate(values, fitted, mode="bilinear" if len(view) == 2 else "trilinear")
    pads: list[int] = []
    for side, n in reversed(list(zip(fitted, size or view, strict=True))):
        before = (n - side) // 2 if n > side else -((side - n) // 2)  # negative pads crop
        pads += [before, n - side - before]
    return functional.pad(values[0], pads).contiguous()


def _below(count: int, rng: torch.Generator) -> int:
    """Draw a whole number from 0 to ``count`` - 1."""
    return int(torch.randint(count, (), generator=rng)) if count > 1 else 0
