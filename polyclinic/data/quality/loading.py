"""What a study's source reads of recognized data, without decoding images: the basis of the data check's counts."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from polyclinic.data.collection import UNKNOWN_PATIENTS, FromFiles
from polyclinic.data.config import source_of
from polyclinic.data.deidentification.filename_screening import shown
from polyclinic.data.files import ImageOptions
from polyclinic.data.formats.column_roles import ROUNDED, SPELLINGS, SPLITS
from polyclinic.data.formats.safe_reading import LIMITS, Limits, Unreadable
from polyclinic.data.labels import UNITS
from polyclinic.data.quality.findings import Finding
from polyclinic.data.quality.folder_layout import Item, Layout
from polyclinic.data.quality.recognition import Recognized, recognize
from polyclinic.data.source import Source, Table
from polyclinic.errors import DataError, MissingDependency


@dataclass(frozen=True, eq=False)
class Loaded:
    """Result of loading.

    Attributes:
        recognized: What was recognized; None if nothing was.
        table: The source's table of examples; None if it refuses the data.
        classes: The names of the classes.
        knows_patients: Whether the data names patients.
        items: The source's examples, for the inspection of images; empty if it has no files.
        problems: Why the source refuses the data.
        open: Why a study needs more than the data contains.
        notes: The source's notes.
        options: How the source reads files; None if it has none.
        labels: The mask values that files may have; None if nothing declares them.
        ignore: The mask value of voxels without annotation; None if there are none.
        masks: For DICOM, the mask of each series, by the series' files.
    """

    recognized: Recognized | None = None
    table: Table | None = None
    classes: tuple[str, ...] = ()
    knows_patients: bool = False
    items: tuple[Item, ...] = ()
    problems: tuple[str, ...] = ()
    open: str = ""
    notes: tuple[str, ...] = ()
    options: ImageOptions | None = None
    labels: tuple[int, ...] | None = None
    ignore: int | None = None
    masks: Mapping[tuple[Path, ...], Path] = field(default_factory=dict)

    def findings(self) -> list[Finding]:
        """Return what a study's source refuses, and what the data lacks for a study."""
        found = [Finding("error", "study", f"a study refuses this data: {_masked(text)}") for text in self.problems]
        if self.open:
            found.append(Finding("note", "study", _masked(self.open)))
        for note in self.notes:
            warned = note.startswith((UNITS, "No row has an event")) or SPELLINGS in note or ROUNDED in note
            found.append(Finding("warning" if warned else "note", "source", _masked(note.rstrip("."))))
        return found

    @property
    def data(self) -> dict[str, Any]:
        """The ``[data]`` table of a study; empty if no source can read the data."""
        return {} if self.recognized is None or self.problems else self.recognized.options

    @property
    def why(self) -> tuple[str, ...]:
        """How the table was recognized."""
        return () if self.recognized is None else tuple(_masked(reason) for reason in self.recognized.why)


def load(
    path: Path, layout: Layout, limits: Limits = LIMITS, given: Mapping[str, Any] = MappingProxyType({})
) -> Loaded:
    """Recognize the data and read its table as a study would, with the options of ``[data]`` in ``given``."""
    try:
        recognized = recognize(path, None, limits, layout, given)
    except (DataError, Unreadable) as refusal:
        return Loaded(open=f"for a study: {refusal}")
    try:
        source = built(recognized)
        table, info = source.table(), source_info(source)
    except MissingDependency as refusal:
        return Loaded(recognized, open=str(refusal))
    except ValidationError as error:
        return Loaded(recognized, problems=tuple(str(line["msg"]) for line in error.errors()))
    except DataError as error:
        return Loaded(recognized, problems=tuple(error.problems))
    known = not any(note in (UNKNOWN_PATIENTS, UNKNOWN_PATIENTS.replace("image", "row")) for note in info[1])
    told = ("Left out", "left out", "by their names", UNITS, "No row has an event", SPELLINGS, ROUNDED)
    notes = tuple(note for note in info[1] if any(words in note for words in told))
    if not isinstance(source, FromFiles):
        return Loaded(recognized, table, info[0], known, notes=notes)
    found = source.collection
    items = _items(source, layout, info[0], known) if layout.kind != "dicom" else ()
    masks = {entry.images: entry.mask for entry in found.entries if entry.mask} if layout.kind == "dicom" else {}
    how = (source.options, found.labels_in_files, found.ignore, masks)
    return Loaded(recognized, table, info[0], known, items, (), "", notes, *how)


def built(recognized: Recognized) -> Source:
    """Return the source that the ``[data]`` table names."""
    own = {key: value for key, value in recognized.options.items() if key not in ("path", "kind")}
    return source_of(None, str(recognized.options["path"]), str(recognized.options["kind"]), own)


def source_info(source: Source) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return a source's classes and notes, without decoding images."""
    info = source.collection.info if isinstance(source, FromFiles) else source.info
    return info.classes, info.notes


def _items(source: FromFiles, layout: Layout, classes: tuple[str, ...], known: bool) -> tuple[Item, ...]:
    found = source.collection
    site = found.sites[0] if found.sites else ""
    items = []
    for entry in found.entries:
        path = entry.images[0]
        inside = layout.root in path.parents and entry.part is None
        name = str(path.relative_to(layout.root)) if inside else entry.id
        label = classes[entry.label] if isinstance(entry.label, int) and entry.label < len(classes) else None
        split = entry.columns.get("split", "").lower()
        items.append(
            Item(
                name,
                entry.images,
                label,
                entry.patient if known else None,
                SPLITS.get(split, split or None),
                entry.columns.get(site) or None,
                entry.mask,
                part=entry.part,
            )
        )
    return tuple(items)


def _masked(text: str) -> str:
    """Return a sentence in which words that look like a person's name in a path are masked."""
    return re.sub(r"[^\s,;:()'\"]*[/_^.][^\s,;:()'\"]*", lambda match: shown(match.group()), text)
