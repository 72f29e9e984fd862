"""Collections of image files with their metadata, the common basis of all file-based sources."""

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from polyclinic.data.cache import cached
from polyclinic.data.examples import DataError, Examples
from polyclinic.data.files import OPTIONS, ImageOptions, content_of, picture_of, read_case, read_image
from polyclinic.data.formats.mask_labels import IGNORED, WHITE, black_and_white, label_problems, labels_in
from polyclinic.data.formats.safe_reading import Unreadable
from polyclinic.data.formats.value_ranges import ValueRange, scale_problems
from polyclinic.data.geometry import Geometry
from polyclinic.data.preprocessing.pipeline_config import apply, fingerprint
from polyclinic.data.preprocessing.sample import Picture, Step
from polyclinic.data.preprocessing.transforms import Percentiles, Relabel, Resample, Resize, ZScore
from polyclinic.data.source import Info, Table, digest

VERSION = 3
MASKS_VERSION = 2
"""Version of the resampling of masks: 1 by nearest neighbor, 2 by the largest share."""
GEOMETRY_VERSION = 1
"""Version of what is stored with masks for the evaluation on original grids."""
MOST_NOTES = 10
SINGLE_LINES = 3
UNKNOWN_PATIENTS = (
    "The data names no patients: each image counts as a patient of its own, so images of one patient may be in two "
    "splits."
)


@dataclass(frozen=True)
class Entry:
    """One example on disk.

    Attributes:
        id: Unique name in the collection.
        images: Its file, one file per channel, or the slices of a DICOM series.
        patient: Patient that it belongs to.
        label: Class number, several numbers, or None if a mask is the target.
        mask: File of its mask.
        columns: Further metadata, as text.
        slices: Whether ``images`` are the slices of one series.
    """

    id: str
    images: tuple[Path, ...]
    patient: str
    label: int | tuple[float, ...] | None = None
    mask: Path | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    slices: bool = False


@dataclass(frozen=True, eq=False)
class Collection:
    """Entries that are decoded on first use and cached.

    Attributes:
        info: Description of the data set.
        entries: The examples, in a fixed order.
        sites: The columns that can name a site.
        steps: Preprocessing, after which all images must have the same size.
        unreadable: ``"refuse"`` raises an error for damaged files; ``"skip"`` leaves them out and lists them.
        options: How files are read.
        ignore: Mask value of voxels without annotation, which become ``IGNORED``; None if there are none.
        labels: Allowed mask values; None for the numbers of ``info.classes``, if there are any.
    """

    info: Info
    entries: tuple[Entry, ...]
    sites: tuple[str, ...] = ()
    steps: tuple[Step, ...] = ()
    unreadable: Literal["refuse", "skip"] = "refuse"
    options: ImageOptions = OPTIONS
    ignore: int | None = None
    labels: tuple[int, ...] | None = None

    @cached_property
    def contents(self) -> tuple[str, ...]:
        """The hash of each entry's files."""
        files = [path for e in self.entries for path in (*e.images, *([e.mask] if e.mask else []))]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = dict(zip(files, pool.map(content_of, files), strict=True))
        return tuple(digest(*(found[p] for p in (*e.images, *([e.mask] if e.mask else [])))) for e in self.entries)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of files, labels, patients, columns and steps, independent of the location of the files."""
        known = [(e.id, e.label, e.patient, sorted(e.columns.items())) for e in self.entries]
        how = (fingerprint(self.steps), self.options.key, self.ignore)
        return digest("files", VERSION, self.contents, known, *how, self.unreadable, *self._masks)

    def table(self) -> Table:
        """Return one row per readable entry."""
        if not self.entries:
            raise DataError(f"{self.info.name} contains no readable images")
        skipped = {i for i, *_ in self._decoded["bad"]} if self.unreadable == "skip" else set()
        kept = [e for i, e in enumerate(self.entries) if i not in skipped]
        labels = None
        if self.info.task != "segmentation":
            kind = np.int64 if self.info.task == "classification" else np.float32
            labels = np.array([e.label for e in kept], dtype=kind)
        names = dict.fromkeys(name for e in kept for name in e.columns)
        columns = {name: tuple(e.columns.get(name, "") for e in kept) for name in names}
        return Table(tuple(e.id for e in kept), tuple(e.patient for e in kept), labels, columns, self.sites)

    def examples(self, ids: Sequence[str]) -> Examples:
        """Return the named entries, decoded and preprocessed."""
        decoded = self._decoded
        if (bad := decoded["bad"]) and self.unreadable == "refuse":
            raise DataError(_by_reason(bad))
        skipped = {i for i, *_ in bad}
        row = {e.id: k for k, e in enumerate(e for i, e in enumerate(self.entries) if i not in skipped)}
        entry = {e.id: e for e in self.entries}
        rows = [row[name] for name in ids]
        geometries, truths = None, None
        if self.info.task == "segmentation":
            targets = decoded["masks"][rows]
            geometries = tuple(Geometry.of_table(decoded["geometries"][k]) for k in rows)
            truths = tuple(_truth(decoded, k) for k in rows) if "truths" in decoded else None
        else:
            kind = torch.int64 if self.info.task == "classification" else torch.float32
            targets = torch.tensor([entry[name].label for name in ids], dtype=kind)
        patients = tuple(entry[name].patient for name in ids)
        return Examples(decoded["images"][rows], targets, patients, tuple(ids), geometries=geometries, truths=truths)

    def pictures(self) -> Iterator[Picture | None]:
        """Yield each entry without preprocessing, or None if it cannot be read."""
        for entry in self.entries:
            try:
                picture = read_image(entry.images, entry.mask, self.options, slices=entry.slices)
                yield self._annotated(picture)
            except Unreadable:
                yield None

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about files that were left out, and observations of the readers with their number of images."""
        bad = self._decoded["bad"] if self.unreadable == "skip" else []
        counts = sorted(self._decoded["notes"], key=lambda item: (-item[1], item[0]))
        seen = [f"{n} image{'s' if n > 1 else ''}: {note}." for note, n in counts[:MOST_NOTES]]
        if not bad:
            return tuple(seen)
        reasons = _by_reason(bad)
        shown = "; ".join(reasons[:5]) + (" ..." if len(reasons) > 5 else "")
        return (f"{len(bad)} files were left out because they cannot be read: {shown}.", *seen)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes; unnamed mask values are numbered."""
        if self.info.classes or self.info.task != "segmentation" or "masks" not in self._decoded:
            return self.info.classes
        return ("background", *(f"label {i}" for i in range(1, max(self._decoded["labels"], default=0) + 1)))

    @cached_property
    def _decoded(self) -> dict[str, Any]:
        how = (fingerprint(self.steps), self.options.key, self.ignore, self._declared)
        native = (GEOMETRY_VERSION,) if self.info.task == "segmentation" else ()
        key = digest("decoded", VERSION, self.contents, *how, [e.id for e in self.entries], *self._masks, *native)
        return cached("images", key, self._decode)

    def _decode(self) -> dict[str, Any]:
        """Return all images (and masks) as one tensor each, and the unreadable files with the reasons."""
        from rich.console import Console
        from rich.progress import track

        console = Console(stderr=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoders release Python's lock
            found = list(
                track(
                    pool.map(self._one, self.entries),
                    f"Reading {self.info.name} (once)",
                    len(self.entries),
                    console=console,
                    disable=not console.is_terminal,
                    transient=True,
                )
            )
        read = [f for f in found if isinstance(f, _Read)]
        bad = [[i, f.text, f.reason] for i, f in enumerate(found) if isinstance(f, _Refused)]
        if not read:
            raise DataError(_by_reason(bad))
        good = [f.picture for f in read]
        labels = {f.values.id: f.labels for f in read}
        scaled = any(isinstance(step, ZScore | Percentiles) for step in self.steps)
        problems = [] if scaled else scale_problems([f.values for f in read])
        if problems := [*problems, *label_problems(labels, self._declared)]:
            raise DataError([f"{self.info.name}: {problem}" for problem in problems])
        shapes = sorted({tuple(f.pixels.shape) for f in good})
        if len(shapes) > 1:
            some = " and ".join(" x ".join(map(str, shape)) for shape in shapes[:3])
            remedy = (
                'add steps that make them alike, such as {step = "resize", size = 128}, '
                '{step = "crop_pad", size = 128} or {step = "channels"}'
            )
            if len({len(shape) for shape in shapes}) > 1:
                remedy = (
                    "some are single slices and some are volumes: leave one kind out; of DICOM, choose with "
                    "series = {...}, or leave out localizers with slices = 2"
                )
            raise DataError(f"{self.info.name}: images have {len(shapes)} different shapes ({some}, ...): {remedy}")
        if len({f.pixels.dtype for f in good}) > 1:  # 8-bit pictures mixed with deeper ones
            good = [replace(f, pixels=f.pixels.float() / 255) if f.pixels.dtype == torch.uint8 else f for f in good]
        notes = Counter(note for f in read for note in f.notes)
        out: dict[str, Any] = {"images": torch.stack([f.pixels for f in good]), "bad": bad}
        out["notes"] = [[note, count] for note, count in notes.items()]
        if self.info.task == "segmentation":
            masks = torch.stack([f.mask for f in good if f.mask is not None])
            white = black_and_white(labels, self._declared)
            truths = [f.truth for f in good if f.truth is not None and f.geometry is not None]
            if white:
                masks = torch.where(masks == WHITE, 1, masks)
                truths = [torch.where(truth == WHITE, 1, truth) for truth in truths]
            used = sorted({label for f in read for label in f.labels} - {IGNORED})
            out["labels"] = [0, 1] if white else used
            out["masks"] = masks.to(torch.uint8) if int(masks.min()) >= 0 and int(masks.max()) < 256 else masks
            geometries = [f.geometry for f in good if f.geometry is not None]
            out["geometries"] = [geometry.table for geometry in geometries]
            if any(not geometry.same_grid for geometry in geometries):
                flat = torch.cat([truth.flatten() for truth in truths])
                out["truths"] = flat.to(torch.uint8 if int(flat.min()) >= 0 and int(flat.max()) <= 255 else torch.int16)
        return out

    @property
    def _masks(self) -> tuple[int, ...]:
        """The version of the resampling of masks, if it affects what is read."""
        resampled = any(isinstance(step, Resample | Resize) for step in self.steps)
        return (MASKS_VERSION,) if resampled and self.info.task == "segmentation" else ()

    @property
    def _declared(self) -> tuple[int, ...] | None:
        """The mask values that classes, or a step ``relabel``, declare; None if nothing does."""
        if self.info.task != "segmentation":
            return None
        if self.labels is not None:
            return self.labels
        if self.info.classes:
            return tuple(range(len(self.info.classes)))
        relabel = [step for step in self.steps if isinstance(step, Relabel)]
        return tuple(sorted({*(relabel[-1].to or range(len(relabel[-1].values)))})) if relabel else None

    def _annotated(self, picture: Picture) -> Picture:
        """Return the picture with the voxels that are not annotated marked as ``IGNORED``."""
        if picture.mask is None or self.ignore is None:
            return picture
        return replace(picture, mask=torch.where(picture.mask == self.ignore, IGNORED, picture.mask))

    def _one(self, entry: Entry) -> "_Read | _Refused":
        try:
            case = read_case(entry.images, entry.mask, self.options, slices=entry.slices)
            picture = self._annotated(picture_of(case, as_bytes=not self.steps))
            prepared = apply(self.steps, replace(picture, truth=picture.mask))
        except (Unreadable, DataError) as error:
            return _Refused(f"{entry.id}: {error}", error.reason if isinstance(error, Unreadable) else str(error))
        labels = () if prepared.truth is None else labels_in(prepared.truth)
        return _Read(prepared, case.notes, ValueRange.of(entry.id, case.image), labels)


def _truth(decoded: Mapping[str, Any], k: int) -> torch.Tensor:
    """Return the mask of image ``k`` on the grid of its file, a view of the stored ones."""
    shapes = [Geometry.of_table(table).original for table in decoded["geometries"][: k + 1]]
    end = sum(math.prod(shape) for shape in shapes)
    part: torch.Tensor = decoded["truths"][end - math.prod(shapes[-1]) : end]
    return part.view(shapes[-1])


@dataclass(frozen=True)
class _Read:
    """One example after its steps, with what must be compared between examples: stored values and mask labels."""

    picture: Picture
    notes: tuple[str, ...]
    values: ValueRange
    labels: tuple[int, ...]


@dataclass(frozen=True)
class _Refused:
    """One example that cannot be read: the reason with its names, and without."""

    text: str
    reason: str


def _by_reason(bad: Sequence[Sequence[Any]]) -> list[str]:
    """Return one line for each refused example, or for each reason that more than three examples share."""
    groups: dict[str, list[str]] = {}
    for _, text, reason in bad:
        groups.setdefault(reason, []).append(text)
    lines = []
    for reason, texts in groups.items():
        if len(texts) <= SINGLE_LINES:
            lines += texts
        else:
            names = ", ".join(text.partition(": ")[0] for text in texts[:SINGLE_LINES])
            lines.append(f"{len(texts)} files: {reason} ({names}, ...)")
    return lines


def described(about: Info | None, found: Info, notes: Sequence[str]) -> Info:
    """Return the ``about`` description, if given, completed by what was read from the files."""
    known = about or found
    return replace(known, task=found.task, classes=known.classes or found.classes, notes=(*known.notes, *notes))


@dataclass(frozen=True, kw_only=True)
class FromFiles:
    """Source whose fields specify how ``collect`` finds entries.

    Attributes:
        fill: Value for pixels without a measurement (NaN, infinite, DICOM padding), such as 0; files with NaN are
            refused if it is not given.
        geometry_tolerance_mm: Largest distance between corresponding voxels of an image and its mask or channels, and
            of DICOM slices from even steps; 1 % of the voxel size if not given.
        regions: For masks of several channels (one-hot, or overlapping regions): the label of each channel, in the
            order in which they are painted.
        ignore: Mask value of pixels without annotation, which loss and metrics leave out.
        bits: Significant bits of 16-bit pictures, such as 12; 0 if all are used.
    """

    fill: float | None = None
    geometry_tolerance_mm: float | None = None
    regions: tuple[int, ...] = ()
    ignore: int | None = None
    bits: int = 0

    def __post_init__(self) -> None:
        self.options  # noqa: B018 - checks the fields

    @property
    def options(self) -> ImageOptions:
        """How files are read."""
        series: Mapping[str, str] = getattr(self, "series", {})
        return ImageOptions(self.fill, self.geometry_tolerance_mm, self.regions, self.bits, series)

    def made(
        self,
        info: Info,
        entries: Sequence[Entry],
        sites: tuple[str, ...] = (),
        ignore: int | None = None,
        labels: tuple[int, ...] | None = None,
    ) -> Collection:
        """Return the collection of ``entries``, read and prepared as this source's fields say."""
        steps: tuple[Step, ...] = getattr(self, "steps", ())
        unreadable: Literal["refuse", "skip"] = getattr(self, "unreadable", "refuse")
        known = self.ignore if self.ignore is not None else ignore
        return Collection(info, tuple(entries), sites, steps, unreadable, self.options, known, labels)

    def collect(self) -> Collection:
        """Return the collection.

        Raises:
            DataError: With every problem.
        """
        raise NotImplementedError

    @cached_property
    def _collection(self) -> Collection:
        return self.collect()

    @property
    def collection(self) -> Collection:
        """The result of ``collect``, computed once."""
        return self._collection

    @property
    def info(self) -> Info:
        """Description of the data set, including the files that were left out."""
        found = self._collection
        return replace(found.info, classes=found.classes, notes=(*found.info.notes, *found.notes))

    @property
    def fingerprint(self) -> str:
        """Hash of the files' content and of the options that affect what is read."""
        return self._collection.fingerprint

    def table(self) -> Table:
        """Return one row per image."""
        return self._collection.table()

    def examples(self, ids: Sequence[str]) -> Examples:
        """Return the named images, decoded and preprocessed."""
        return self._collection.examples(ids)
