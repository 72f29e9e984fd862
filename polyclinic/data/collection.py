"""Collections of image files with their metadata, the common basis of all file-based sources."""

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from polyclinic.data.cache import cached, remembered
from polyclinic.data.cases import case_building, case_file
from polyclinic.data.cases.case_file import CaseFile, Prepared
from polyclinic.data.cases.cases import Cases
from polyclinic.data.cases.frames import Frame, FrameSelection
from polyclinic.data.cases.tiles import Tile, Tiling, lazy_tiles
from polyclinic.data.examples import DataError, Dataset, Examples
from polyclinic.data.files import OPTIONS, ImageOptions, Part, content_of, picture_of, read_case, read_image
from polyclinic.data.formats.mask_labels import IGNORED, WHITE, black_and_white, label_problems, labels_in
from polyclinic.data.formats.parsing import clean, plain
from polyclinic.data.formats.safe_reading import LIMITS, Unreadable
from polyclinic.data.formats.value_ranges import ValueRange, scale_problems
from polyclinic.data.geometry import Geometry
from polyclinic.data.preprocessing.nnunet_steps import Normalize
from polyclinic.data.preprocessing.pipeline_config import apply, fingerprint, mask_channels
from polyclinic.data.preprocessing.sample import Picture, Step
from polyclinic.data.preprocessing.transforms import Percentiles, Relabel, Resample, Resize, ZScore
from polyclinic.data.source import Info, Table, digest

VERSION = 3
MASKS_VERSION = 2
"""Version of the resampling of masks: 1 by nearest neighbor, 2 by the largest share."""
GEOMETRY_VERSION = 1
"""Version of what is stored with masks for the evaluation on original grids."""
PATCHED = replace(LIMITS, decoded_bytes=2 * LIMITS.decoded_bytes)
"""Limits on a file whose image remains on disk, where CT takes two bytes per voxel instead of four."""
LARGEST_PATCH = 2**27
"""Largest number of pixels of a patch, 512 MiB per channel: a study between hospitals sets the patch at each site."""
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
        part: The part of the file that is the example: a tile of a slide, or a frame of a video.
    """

    id: str
    images: tuple[Path, ...]
    patient: str
    label: int | tuple[float, ...] | None = None
    mask: Path | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    slices: bool = False
    part: Part | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of the image and of its mask."""
        return (*self.images, *([self.mask] if self.mask else []))


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
        patch: Shape of a view of one image. With it, images may differ in shape, and remain on disk, one file each
            (``polyclinic.data.cases``). Without it, all are in memory.
    """

    info: Info
    entries: tuple[Entry, ...]
    sites: tuple[str, ...] = ()
    steps: tuple[Step, ...] = ()
    unreadable: Literal["refuse", "skip"] = "refuse"
    options: ImageOptions = OPTIONS
    ignore: int | None = None
    labels: tuple[int, ...] | None = None
    patch: tuple[int, ...] = ()

    @cached_property
    def contents(self) -> tuple[str, ...]:
        """The hash of each entry's files."""
        files = list(dict.fromkeys(path for e in self.entries for path in e.files))
        large = self.patch or any(e.part for e in self.entries)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            hashed = (lambda path: remembered(path, content_of)) if large else content_of
            found = dict(zip(files, pool.map(hashed, files), strict=True))
        return tuple(digest(*(found[p] for p in e.files), *([repr(e.part)] if e.part else [])) for e in self.entries)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of files, labels, patients, columns and steps, independent of the location of the files."""
        known = [(e.id, e.label, e.patient, sorted(e.columns.items())) for e in self.entries]
        how = (fingerprint(self.steps), self.options.key, self.ignore)
        views = [("patch", self.patch)] if self.patch else []
        return digest("files", VERSION, self.contents, known, *how, self.unreadable, *self._masks, *views)

    def table(self) -> Table:
        """Return one row per readable entry."""
        if not self.entries:
            raise DataError(f"{self.info.name} contains no readable images")
        skipped = {i for i, *_ in self._facts["bad"]} if self.unreadable == "skip" else set()
        kept = [e for i, e in enumerate(self.entries) if i not in skipped]
        labels = None
        if self.info.task != "segmentation":
            kind = np.int64 if self.info.task == "classification" else np.float32
            labels = np.array([e.label for e in kept], dtype=kind)
        names = dict.fromkeys(name for e in kept for name in e.columns)
        columns = {name: tuple(e.columns.get(name, "") for e in kept) for name in names}
        survival = self.info.task == "survival"
        return Table(tuple(e.id for e in kept), tuple(e.patient for e in kept), labels, columns, self.sites, survival)

    def examples(self, ids: Sequence[str]) -> Dataset:
        """Return the named entries, decoded and preprocessed; with a ``patch``, as cases on disk."""
        if (bad := self._facts["bad"]) and self.unreadable == "refuse":
            raise DataError(_by_reason(bad))
        if self.patch:
            return self._cases(ids)
        decoded, entry = self._decoded, self._entry
        rows = [self._row[name] for name in ids]
        geometries, truths = None, None
        targets = self._labels([entry[name] for name in ids])
        if targets is None:
            targets = decoded["masks"][rows]
            geometries = tuple(self._geometries[k] for k in rows)
            truths = tuple(self._truth(k) for k in rows) if "truths" in decoded else None
        patients = tuple(entry[name].patient for name in ids)
        return Examples(decoded["images"][rows], targets, patients, tuple(ids), geometries=geometries, truths=truths)

    @cached_property
    def _entry(self) -> Mapping[str, Entry]:
        """The entries by id."""
        return {entry.id: entry for entry in self.entries}

    @cached_property
    def _row(self) -> Mapping[str, int]:
        """The position of each readable entry in ``_decoded``, by id."""
        skipped = {i for i, *_ in self._decoded["bad"]}
        return {e.id: k for k, e in enumerate(e for i, e in enumerate(self.entries) if i not in skipped)}

    @cached_property
    def _geometries(self) -> Sequence[Geometry]:
        return [Geometry.of_table(table) for table in self._decoded["geometries"]]

    @cached_property
    def _ends(self) -> Sequence[int]:
        """The end of each image's mask in the stored masks."""
        return list(accumulate(math.prod(geometry.original) for geometry in self._geometries))

    def _truth(self, k: int) -> torch.Tensor:
        """Return the mask of image ``k`` on the grid of its file, a view of the stored ones."""
        shape, end = self._geometries[k].original, self._ends[k]
        part: torch.Tensor = self._decoded["truths"][end - math.prod(shape) : end]
        return part.view(shape)

    def _labels(self, entries: Sequence[Entry]) -> torch.Tensor | None:
        """Return the class, labels or number of each entry; None if masks are the targets."""
        if self.info.task == "segmentation":
            return None
        kind = torch.int64 if self.info.task == "classification" else torch.float32
        return torch.tensor([entry.label for entry in entries], dtype=kind)

    def _cases(self, ids: Sequence[str]) -> Cases:
        """Return the named entries as cases on disk."""
        at = {entry.id: i for i, entry in enumerate(self.entries)}
        entries = [self.entries[at[name]] for name in ids]
        files = [file for name in ids if isinstance(file := self._stored[at[name]], CaseFile)]
        return Cases(
            tuple(files),
            self.patch,
            next(file.channels for file in self._stored if isinstance(file, CaseFile)),
            tuple(entry.patient for entry in entries),
            tuple(ids),
            self._labels(entries),
            white=self._facts["white"],
            mask_channels=mask_channels(self.steps),
        )

    def pictures(self) -> Iterator[Picture | None]:
        """Yield each entry without preprocessing, or None if it cannot be read."""
        for entry in self.entries:
            try:
                picture = read_image(entry.images, entry.mask, self.options, slices=entry.slices, part=entry.part)
                yield self._annotated(picture)
            except Unreadable:
                yield None

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about files that were left out, and observations of the readers with their number of images."""
        bad = self._facts["bad"] if self.unreadable == "skip" else []
        counts = sorted(self._facts["notes"], key=lambda item: (-item[1], item[0]))
        seen = [f"{n} image{'s' if n > 1 else ''}: {note}." for note, n in counts[:MOST_NOTES]]
        if not bad:
            return tuple(seen)
        reasons = _by_reason(bad)
        shown = "; ".join(reasons[:5]) + (" ..." if len(reasons) > 5 else "")
        return (f"{len(bad)} files were left out because they cannot be read: {shown}.", *seen)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes; unnamed mask values are numbered."""
        if self.info.classes or self.info.task != "segmentation" or "labels" not in self._facts:
            return self.info.classes
        if self.options.segments:
            return ("background", *self.options.segments)
        return ("background", *(f"label {i}" for i in range(1, max(self._facts["labels"], default=0) + 1)))

    @cached_property
    def _decoded(self) -> dict[str, Any]:
        how = (fingerprint(self.steps), self.options.key, self.ignore, self._declared)
        native = (GEOMETRY_VERSION,) if self.info.task == "segmentation" else ()
        key = digest("decoded", VERSION, self.contents, *how, [e.id for e in self.entries], *self._masks, *native)
        return cached("images", key, self._decode)

    @cached_property
    def _stored(self) -> "list[CaseFile | _Refused]":
        """The stored case of each entry, or why it cannot be read. Built on first use.

        Tiles of slides are not stored: they are read at each access.
        """
        if tiles := [e.part for e in self.entries if isinstance(e.part, Tile)]:
            names, slides = [e.id for e in self.entries], [e.images[0] for e in self.entries]
            return [*lazy_tiles(names, slides, tiles, self.contents, self.steps)]
        how = (fingerprint(self.steps), self.options.key, self.ignore)
        keys = [digest("case", VERSION, case_file.VERSION, content, *how, *self._masks) for content in self.contents]
        on_disk = [sum(path.stat().st_size for path in entry.images if path.is_file()) for entry in self.entries]
        ids = [entry.id for entry in self.entries]
        return case_building.stored(self.info.name, keys, ids, on_disk, lambda i: self._one(self.entries[i]))

    @cached_property
    def _facts(self) -> dict[str, Any]:
        """What is known about all images together: those that cannot be read, notes, and the labels of masks.

        Raises:
            DataError: If the images do not go together.
        """
        if not self.patch:
            return self._decoded
        bad = [[i, f.text, f.reason] for i, f in enumerate(self._stored) if isinstance(f, _Refused)]
        files = [(e.id, f) for e, f in zip(self.entries, self._stored, strict=True) if isinstance(f, CaseFile)]
        if not files:
            raise DataError(_by_reason(bad))
        labels = {name: file.labels for name, file in files}
        self._require_comparable([file.values for _, file in files], labels)
        axes, channels = {len(file.size) for _, file in files}, {file.channels for _, file in files}
        if axes != {len(self.patch)}:
            kinds = " and ".join(f"{n} axes" for n in sorted(axes))
            says = "leave one kind out" if len(axes) > 1 else "give one number for each"
            raise DataError(f"patch = {list(self.patch)}: the images of {self.info.name} have {kinds}: {says}")
        if len(channels) > 1:
            counts = " and ".join(map(str, sorted(channels)))
            raise DataError(f'{self.info.name}: images have {counts} channels: add {{step = "channels", count = 1}}')
        notes = Counter(note for _, file in files for note in file.notes)
        facts: dict[str, Any] = {"bad": bad, "notes": [[note, count] for note, count in notes.items()], "white": False}
        if self.info.task == "segmentation":
            facts["white"] = black_and_white(labels, self._declared)
            used = sorted({label for _, file in files for label in file.labels} - {IGNORED})
            facts["labels"] = [0, 1] if facts["white"] else used
        return facts

    def _require_comparable(self, values: Sequence[ValueRange], labels: Mapping[str, tuple[int, ...]]) -> None:
        """Require that values of different images mean the same, and that labels are declared.

        Raises:
            DataError: With every problem.
        """
        scaled = any(
            isinstance(step, ZScore | Percentiles) or (isinstance(step, Normalize) and step.by_image)
            for step in self.steps
        )
        problems = [] if scaled else scale_problems(values)
        if problems := [*problems, *label_problems(labels, self._declared)]:
            raise DataError([f"{self.info.name}: {problem}" for problem in problems])

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
        read = [f for f in found if isinstance(f, Prepared)]
        bad = [[i, f.text, f.reason] for i, f in enumerate(found) if isinstance(f, _Refused)]
        if not read:
            raise DataError(_by_reason(bad))
        good = [f.picture for f in read]
        labels = {f.values.id: f.labels for f in read}
        self._require_comparable([f.values for f in read], labels)
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
            elif len({shape[0] for shape in shapes}) == 1:
                remedy += (
                    f"; or leave them as they are, and train on patches of them, with patch = {usual_patch(shapes)}"
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
        if self.options.segments and not relabel:
            return tuple(range(len(self.options.segments) + 1))
        return tuple(sorted({*(relabel[-1].to or range(len(relabel[-1].values)))})) if relabel else None

    @property
    def labels_in_files(self) -> tuple[int, ...] | None:
        """The mask values that files may have, before preprocessing; None if nothing declares them."""
        relabel = [step for step in self.steps if isinstance(step, Relabel)]
        declared = relabel[0].values if relabel else self._declared
        return declared if declared is None or self.ignore is None else (*declared, self.ignore)

    def _annotated(self, picture: Picture) -> Picture:
        """Return the picture with the voxels that are not annotated marked as ``IGNORED``."""
        if picture.mask is None or self.ignore is None:
            return picture
        return replace(picture, mask=torch.where(picture.mask == self.ignore, IGNORED, picture.mask))

    def _one(self, entry: Entry) -> "Prepared | _Refused":
        try:
            case = read_case(entry.images, entry.mask, self.options, slices=entry.slices, part=entry.part)
            picture = self._annotated(picture_of(case, as_bytes=not self.steps))
            prepared = apply(self.steps, replace(picture, truth=picture.mask))
        except (Unreadable, DataError) as error:
            return _Refused(f"{entry.id}: {error}", error.reason if isinstance(error, Unreadable) else str(error))
        labels = () if prepared.truth is None else labels_in(prepared.truth)
        notes = (*case.notes, *prepared.notes)
        return Prepared(prepared, ValueRange.of(entry.id, case.image), labels, notes)


@dataclass(frozen=True)
class _Refused:
    """One example that cannot be read: the reason with its names, and without."""

    text: str
    reason: str


def usual_patch(shapes: Sequence[tuple[int, ...]]) -> list[int]:
    """Return a patch that most images cover: the smaller quartile of their sides, in multiples of 8."""
    sides = [sorted(axis) for axis in zip(*(shape[1:] for shape in shapes), strict=True)]
    return [max(8, side[len(side) // 4] // 8 * 8) for side in sides]


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
        segments: For masks in DICOM segmentations (SEG) and structure sets (RTSTRUCT): the names of the segments that
            become labels 1, 2, ..., such as ``["Liver", "Tumor*"]``; later ones are painted over earlier ones.
        ignore: Mask value of pixels without annotation, which loss and metrics leave out.
        bits: Significant bits of 16-bit pictures, such as 12; 0 if all are used.
        patch: Shape of the part of an image that the network sees, one number per axis. With it, images may differ in
            shape and stay on disk: for segmentation, training draws patches and tests the complete images by
            overlapping patches; for other tasks, each picture is resized to cover the patch and cropped to its center.
        tiles: Division of whole-slide images into tiles, which are the examples, such as ``{size = 256, mpp = 0.5}``
            (``cases.tiles.Tiling``). All have the label, the patient and the site of their slide.
        frames: Frames of videos that are the examples, such as ``{every = 25}`` (``cases.frames.FrameSelection``).
    """

    fill: float | None = None
    geometry_tolerance_mm: float | None = None
    regions: tuple[int, ...] = ()
    segments: tuple[str, ...] = ()
    ignore: int | None = None
    bits: int = 0
    patch: tuple[int, ...] = ()
    tiles: Tiling | None = None
    frames: FrameSelection | None = None

    def __post_init__(self) -> None:
        self.options  # noqa: B018 - checks the fields
        if self.tiles is not None and (self.frames is not None or self.patch):
            other = "patch" if self.patch else "frames"
            raise DataError(f"tiles = {{...}}: says what an example is, and so does {other}: leave one of them out")
        if self.patch and (len(self.patch) not in (2, 3) or not all(1 <= n <= LIMITS.side for n in self.patch)):
            raise DataError(f"patch = {list(self.patch)}: give 2 or 3 whole numbers of pixels, such as [96, 96, 96]")
        if math.prod(self.patch) > LARGEST_PATCH:
            raise DataError(f"patch = {list(self.patch)}: has more than {LARGEST_PATCH:,} pixels; choose a smaller one")

    @property
    def options(self) -> ImageOptions:
        """How files are read."""
        series: Mapping[str, str] = getattr(self, "series", {})
        limits = PATCHED if self.patch else LIMITS
        how = (self.fill, self.geometry_tolerance_mm, self.regions, self.bits, series, limits)
        return ImageOptions(*how, segments=self.segments)

    def made(
        self,
        info: Info,
        entries: Sequence[Entry],
        sites: tuple[str, ...] = (),
        ignore: int | None = None,
        labels: tuple[int, ...] | None = None,
    ) -> Collection:
        """Return the collection of ``entries``, read and prepared as this source's fields say.

        Raises:
            DataError: If slides or videos cannot be divided.
        """
        steps: tuple[Step, ...] = getattr(self, "steps", ())
        unreadable: Literal["refuse", "skip"] = getattr(self, "unreadable", "refuse")
        known, patch = self.ignore if self.ignore is not None else ignore, self.patch
        if self.tiles is not None or self.frames is not None:
            entries, notes = self._parts(info, entries, unreadable)
            info = replace(info, notes=(*info.notes, *notes))
            patch = (self.tiles.size,) * 2 if self.tiles is not None else patch
        if mask_channels(steps) and (not patch or info.task != "segmentation"):
            raise DataError("the step previous_stage is for the segmentation of cases on disk: set patch = [...]")
        return Collection(info, tuple(entries), sites, steps, unreadable, self.options, known, labels, patch)

    def _parts(
        self, info: Info, entries: Sequence[Entry], unreadable: Literal["refuse", "skip"]
    ) -> tuple[list[Entry], list[str]]:
        """Return one entry for each tile or frame, and notes."""
        what = "tiles" if self.tiles is not None else "frames"
        if any(entry.slices or len(entry.images) != 1 for entry in entries):
            raise DataError(f"{what} = {{...}}: each example is one file; leave out other channels and series")
        if info.task == "segmentation" and not (self.frames and self.frames.column):
            raise DataError(f"{what} = {{...}}: needs a label for each file, and masks are not divided")

        def divided(entry: Entry) -> "list[Entry] | Unreadable":
            try:
                return self._divided(entry)
            except Unreadable as refusal:
                return refusal

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = list(pool.map(divided, entries))
        refused = [f for f in found if isinstance(f, Unreadable)]
        parts = [part for f in found if not isinstance(f, Unreadable) for part in f]
        reasons = _by_reason([[0, f"{refusal}", refusal.reason] for refusal in refused])
        if refused and (unreadable == "refuse" or not parts):
            raise DataError(reasons)
        notes = [f"{len(entries) - len(refused)} files are divided into {len(parts)} {what}."]
        if refused:
            notes.append(f"{len(refused)} files were left out because they cannot be read: {'; '.join(reasons[:5])}.")
        return parts, notes

    def _divided(self, entry: Entry) -> list[Entry]:
        """Return the entries of the parts of one file."""
        path, limits = entry.images[0], self.options.limits
        columns = {**entry.columns, ("slide" if self.tiles is not None else "video"): entry.id}
        parts: Sequence[Part]
        if self.tiles is not None:
            parts = self.tiles.tiles(path, limits)
        elif self.frames is not None and self.frames.every:
            parts = self.frames.frames(path, limits)
        else:
            assert self.frames is not None
            number = plain(clean(entry.columns.get(self.frames.column, "")))
            if not number.isdecimal():
                raise Unreadable(path, f"{self.frames.column} states no number of a frame, from 0")
            return [replace(entry, part=Frame(int(number)), columns=columns)]
        return [replace(entry, id=f"{entry.id}#{p.name}", part=p, columns={**columns, **p.columns}) for p in parts]

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

    def examples(self, ids: Sequence[str]) -> Dataset:
        """Return the named images, decoded and preprocessed."""
        return self._collection.examples(ids)
