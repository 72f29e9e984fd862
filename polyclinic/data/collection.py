"""Image files with what is known of each: what every source of files is made of."""

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
        id: Its name, unique in the collection.
        images: Its file, or one file per channel.
        patient: Whose it is.
        label: A class's number, numbers, or None where a mask is the target.
        mask: The file of its mask.
        columns: What else is known of it, as text.
    """

    id: str
    images: tuple[Path, ...]
    patient: str
    label: int | tuple[float, ...] | None = None
    mask: Path | None = None
    columns: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Collection:
    """Entries, decoded on first use and kept in the cache: the source that folders, manifests and pairs turn into.

    Attributes:
        info: What it is.
        entries: What is there, in a fixed order.
        sites: The columns that could name a site.
        steps: Preprocessing. After it all images must have one size.
        unreadable: Whether a damaged file stops everything, or is left out and named.
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
        """A hash of files, labels, patients, columns and steps; not of where the files are."""
        known = [(e.id, e.label, e.patient, sorted(e.columns.items())) for e in self.entries]
        return digest("files", VERSION, self.contents, known, fingerprint(self.steps), self.unreadable)

    def table(self) -> Table:
        """One row per entry that can be read."""
        if not self.entries:
            raise DataError(f"{self.info.name} holds no images that we read")
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
        """The named entries, decoded and preprocessed."""
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
        """Each entry as its files hold it, before any step; None where it cannot be read."""
        for entry in self.entries:
            try:
                yield read_image(entry.images, entry.mask)
            except Unreadable:
                yield None

    @property
    def notes(self) -> tuple[str, ...]:
        """What to say of files that were left out."""
        bad = self._decoded["bad"] if self.unreadable == "skip" else []
        if not bad:
            return ()
        shown = "; ".join(reason for _, reason in bad[:5]) + (" ..." if len(bad) > 5 else "")
        return (f"{len(bad)} files were left out because they cannot be read: {shown}.",)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes; where nobody named a mask's, as many numbers as masks hold."""
        if self.info.classes or self.info.task != "segmentation" or "masks" not in self._decoded:
            return self.info.classes
        return ("background", *(f"label {i}" for i in range(1, int(self._decoded["masks"].max()) + 1)))

    @cached_property
    def _decoded(self) -> dict[str, Any]:
        key = digest("decoded", VERSION, self.contents, fingerprint(self.steps), [e.id for e in self.entries])
        return cached("images", key, self._decode)

    def _decode(self) -> dict[str, Any]:
        """All images (and masks) in one tensor each; and which files could not be read, and why."""
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
        if len({f.pixels.dtype for f in good}) > 1:  # pictures of 8 bits among deeper ones
            good = [replace(f, pixels=f.pixels.float() / 255) if f.pixels.dtype == torch.uint8 else f for f in good]
        out: dict[str, Any] = {"images": torch.stack([f.pixels for f in good]), "bad": bad}
        if self.info.task == "segmentation":
            masks = torch.stack([f.mask for f in good if f.mask is not None])
            if set(masks.unique().tolist()) == {0, 255}:
                masks //= 255  # black and white, in all masks, are 0 and 1
            out["masks"] = masks.to(torch.uint8) if int(masks.max()) < 256 else masks
        return out

    def _one(self, entry: Entry) -> Picture | str:
        try:
            return apply(self.steps, read_image(entry.images, entry.mask, as_bytes=not self.steps))
        except (Unreadable, DataError) as error:
            return f"{entry.id}: {error}"


def described(about: Info | None, found: Info, notes: Sequence[str]) -> Info:
    """What is known of the data beforehand, completed by what was found in its files."""
    known = about or found
    return replace(known, task=found.task, classes=known.classes or found.classes, notes=(*known.notes, *notes))


@dataclass(frozen=True)
class FromFiles:
    """A source whose fields say how to find entries; ``collect`` finds them."""

    def collect(self) -> Collection:
        """What there is. Raises ``DataError`` with every problem."""
        raise NotImplementedError

    @cached_property
    def _collection(self) -> Collection:
        return self.collect()

    @property
    def collection(self) -> Collection:
        """What ``collect`` found, once."""
        return self._collection

    @property
    def info(self) -> Info:
        """What it is, and which files were left out."""
        found = self._collection
        return replace(found.info, classes=found.classes, notes=(*found.info.notes, *found.notes))

    @property
    def fingerprint(self) -> str:
        """A hash of the files' content and of the options that change what is read."""
        return self._collection.fingerprint

    def table(self) -> Table:
        """One row per image."""
        return self._collection.table()

    def examples(self, ids: Sequence[str]) -> Examples:
        """The named images, decoded and preprocessed."""
        return self._collection.examples(ids)
