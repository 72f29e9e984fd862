"""Collections of image files with their metadata, the common basis of all file-based sources."""

import os
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
from polyclinic.data.files import content_of, read_image
from polyclinic.data.formats.safe_reading import Unreadable
from polyclinic.data.preprocessing.pipeline_config import apply, fingerprint
from polyclinic.data.preprocessing.sample import Picture, Step
from polyclinic.data.source import Info, Table, digest

VERSION = 1
UNKNOWN_PATIENTS = (
    "The data names no patients: each image counts as a patient of its own, so images of one patient may be in two "
    "splits."
)


@dataclass(frozen=True)
class Entry:
    """One example on disk.

    Attributes:
        id: Unique name in the collection.
        images: Its file, or one file per channel.
        patient: Patient that it belongs to.
        label: Class number, several numbers, or None if a mask is the target.
        mask: File of its mask.
        columns: Further metadata, as text.
    """

    id: str
    images: tuple[Path, ...]
    patient: str
    label: int | tuple[float, ...] | None = None
    mask: Path | None = None
    columns: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Collection:
    """Entries that are decoded on first use and cached.

    Attributes:
        info: Description of the data set.
        entries: The examples, in a fixed order.
        sites: The columns that can name a site.
        steps: Preprocessing, after which all images must have the same size.
        unreadable: ``"refuse"`` raises an error for damaged files; ``"skip"`` leaves them out and lists them.
    """

    info: Info
    entries: tuple[Entry, ...]
    sites: tuple[str, ...] = ()
    steps: tuple[Step, ...] = ()
    unreadable: Literal["refuse", "skip"] = "refuse"

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
        return digest("files", VERSION, self.contents, known, fingerprint(self.steps), self.unreadable)

    def table(self) -> Table:
        """Return one row per readable entry."""
        if not self.entries:
            raise DataError(f"{self.info.name} contains no readable images")
        skipped = {i for i, _ in self._decoded["bad"]} if self.unreadable == "skip" else set()
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
            raise DataError([reason for _, reason in bad])
        skipped = {i for i, _ in bad}
        row = {e.id: k for k, e in enumerate(e for i, e in enumerate(self.entries) if i not in skipped)}
        entry = {e.id: e for e in self.entries}
        rows = [row[name] for name in ids]
        if self.info.task == "segmentation":
            targets = decoded["masks"][rows]
        else:
            kind = torch.int64 if self.info.task == "classification" else torch.float32
            targets = torch.tensor([entry[name].label for name in ids], dtype=kind)
        return Examples(decoded["images"][rows], targets, tuple(entry[name].patient for name in ids), tuple(ids))

    def pictures(self) -> Iterator[Picture | None]:
        """Yield each entry without preprocessing, or None if it cannot be read."""
        for entry in self.entries:
            try:
                yield read_image(entry.images, entry.mask)
            except Unreadable:
                yield None

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about files that were left out."""
        bad = self._decoded["bad"] if self.unreadable == "skip" else []
        if not bad:
            return ()
        shown = "; ".join(reason for _, reason in bad[:5]) + (" ..." if len(bad) > 5 else "")
        return (f"{len(bad)} files were left out because they cannot be read: {shown}.",)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes; unnamed mask values are numbered."""
        if self.info.classes or self.info.task != "segmentation" or "masks" not in self._decoded:
            return self.info.classes
        return ("background", *(f"label {i}" for i in range(1, int(self._decoded["masks"].max()) + 1)))

    @cached_property
    def _decoded(self) -> dict[str, Any]:
        key = digest("decoded", VERSION, self.contents, fingerprint(self.steps), [e.id for e in self.entries])
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
        good = [f for f in found if isinstance(f, Picture)]
        bad = [(i, f) for i, f in enumerate(found) if isinstance(f, str)]
        if not good:
            raise DataError([reason for _, reason in bad])
        shapes = sorted({tuple(f.pixels.shape) for f in good})
        if len(shapes) > 1:
            some = " and ".join(" x ".join(map(str, shape)) for shape in shapes[:3])
            raise DataError(
                f"{self.info.name}: images have {len(shapes)} different shapes ({some}, ...): add steps that make them "
                'alike, such as {step = "resize", size = 128}, {step = "crop_pad", size = 128} or {step = "channels"}'
            )
        if len({f.pixels.dtype for f in good}) > 1:  # 8-bit pictures mixed with deeper ones
            good = [replace(f, pixels=f.pixels.float() / 255) if f.pixels.dtype == torch.uint8 else f for f in good]
        out: dict[str, Any] = {"images": torch.stack([f.pixels for f in good]), "bad": bad}
        if self.info.task == "segmentation":
            masks = torch.stack([f.mask for f in good if f.mask is not None])
            if set(masks.unique().tolist()) == {0, 255}:
                masks //= 255  # black and white masks become 0 and 1
            out["masks"] = masks.to(torch.uint8) if int(masks.max()) < 256 else masks
        return out

    def _one(self, entry: Entry) -> Picture | str:
        try:
            return apply(self.steps, read_image(entry.images, entry.mask, as_bytes=not self.steps))
        except (Unreadable, DataError) as error:
            return f"{entry.id}: {error}"


def described(about: Info | None, found: Info, notes: Sequence[str]) -> Info:
    """Return the ``about`` description, if given, completed by what was read from the files."""
    known = about or found
    return replace(known, task=found.task, classes=known.classes or found.classes, notes=(*known.notes, *notes))


@dataclass(frozen=True)
class FromFiles:
    """Source whose fields specify how ``collect`` finds entries."""

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
