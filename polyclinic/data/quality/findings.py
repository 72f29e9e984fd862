"""Findings of the data check, each with a level, a sentence, and the files concerned."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from polyclinic.data.deidentification.filename_screening import in_name, shown
from polyclinic.data.formats.mask_labels import label_problems
from polyclinic.data.formats.safe_reading import LIMITS, Limits
from polyclinic.data.formats.value_ranges import scale_problems
from polyclinic.data.quality.folder_layout import Layout
from polyclinic.data.quality.image_hashes import equal, nearly_equal
from polyclinic.data.quality.inspection import Look
from polyclinic.data.quality.phi_screening import in_sidecar, name_of_tag

Level = Literal["error", "warning", "note"]
FEW_PER_CLASS = 5
FEW_PATIENTS = 10


@dataclass(frozen=True)
class Finding:
    """Finding of the data check.

    Attributes:
        level: ``"error"`` must be corrected before training, ``"warning"`` should be inspected, ``"note"`` is
            information.
        code: Short name for programs, such as ``"unreadable"``.
        message: A sentence, never a value from a header.
        files: Files concerned, masked if a name looks like a person.
    """

    level: Level
    code: str
    message: str
    files: tuple[str, ...] = ()

    def line(self, most: int = 3) -> str:
        """Return one line with the first files."""
        if not self.files:
            return self.message
        named = ", ".join(_plain(name) for name in self.files[:most])
        more = f" and {len(self.files) - most} more" if len(self.files) > most else ""
        return f"{self.message}: {named}{more}" if self.code != "unreadable" else f"{named}{more}: {self.message}"


def _n(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _plain(name: str) -> str:
    """Return a file's name without characters that could forge a line."""
    return "".join(c if c.isprintable() else "?" for c in name)[:200]


def layout_problems(layout: Layout) -> list[Finding]:
    """Return problems of names, tables and folders."""
    return [Finding("error" if "mask" in text else "warning", "layout", text) for text in layout.problems]


def headers(
    tags: Mapping[int, Sequence[str]], drawn: Mapping[str, Sequence[str]], others: int, health: Level
) -> list[Finding]:
    """Return findings on DICOM headers with identifying tags, on pictures that may show text, and on other objects."""
    found = []
    if tags:
        listed = ", ".join(f"{name_of_tag(tag)} in {len(names)}" for tag, names in sorted(tags.items()))
        everywhere = tuple(sorted({name for names in tags.values() for name in names}))
        found.append(Finding(health, "health", f"headers may name patients or places: {listed} files", everywhere))
    for reason, names in drawn.items():
        level: Level = health if "burned" in reason else "warning"
        found.append(Finding(level, "burned-in", f"an image {reason} ({len(names)} files)", tuple(names)))
    if others:
        found.append(Finding("note", "not-images", f"{others} DICOM objects are not images (reports, plans...)"))
    return found


def health_information(layout: Layout, looks: Sequence[Look], health: Level, limits: Limits = LIMITS) -> list[Finding]:
    """Return findings on names of files and folders, metadata of pictures and NIfTI files, sidecars, and faces."""
    found: list[Finding] = []
    kinds: dict[str, list[str]] = defaultdict(list)
    for path in dict.fromkeys(path for item in layout.items for path in item.paths):
        try:
            parts = path.relative_to(layout.root).parts if layout.root.is_dir() else (path.name,)
        except ValueError:
            parts = (path.name,)
        if (what := in_name(parts)) is not None:
            kinds[what].append(shown("/".join(parts)))
    for what, names in kinds.items():
        found.append(Finding("warning", "names", f"{_n(len(names), 'file name')} like {what}", tuple(names)))
    fields: dict[str, dict[str, None]] = defaultdict(dict)  # in order; the parts of a file count once
    for look in looks:
        for name in look.hidden:
            fields[name][shown(_file_of(look))] = None
    for name, files in fields.items():
        level: Level = health if name in ("GPS", "a DICOM extension") else "warning"
        found.append(
            Finding(level, "metadata", f"{_n(len(files), 'file')} with {name}, which may name a person", tuple(files))
        )
    if layout.kind == "bids":
        keys: Counter[str] = Counter()
        for sidecar in sorted(layout.root.glob("sub-*/**/*.json"))[:10_000]:
            keys.update(in_sidecar(Path(sidecar), limits))
        if keys:
            listed = ", ".join(f"{key} in {count}" for key, count in keys.items())
            found.append(Finding(health, "health", f"sidecars (JSON) may name patients or places: {listed} files"))
    if faces := [shown(look.item.name) for look in looks if look.face]:
        text = f"{_n(len(faces), 'scan')} of a head may show a face: deface it before anything leaves the site"
        found.append(Finding("warning", "faces", text, tuple(faces)))
    return found


def _file_of(look: Look) -> str:
    """Return the name of an example, or of the slide or video that it is a part of."""
    return look.item.name if look.item.part is None else look.item.name.removesuffix(f"#{look.item.part.name}")


def compare(looks: Sequence[Look], allowed: Mapping[int, str]) -> list[Finding]:
    """Return findings that require all examples."""
    return [*_masks(looks, allowed), *_people(looks), *_classes(looks), *_copies(looks), *_unlike(looks)]


def _names(looks: Sequence[Look]) -> tuple[str, ...]:
    return tuple(shown(look.item.name) for look in looks)


def _masks(looks: Sequence[Look], allowed: Mapping[int, str]) -> list[Finding]:
    found = []
    drawn = [look for look in looks if look.labels is not None]
    if empty := [look for look in drawn if set(look.labels or ()) <= {0}]:
        found.append(Finding("warning", "empty-mask", f"empty masks: {len(empty)} of {len(drawn)}", _names(empty)))
    labels = {look.item.name: look.labels or () for look in drawn}
    for text in label_problems(labels, allowed or None):
        odd = [look for look in drawn if not set(look.labels or ()) <= {0, *allowed}]
        found.append(Finding("error", "unknown-label", text, _names(odd)))
    astray: dict[str, list[Look]] = defaultdict(list)
    for look in looks:
        if look.astray:
            astray[look.astray].append(look)
    found += [Finding("error", "mask-astray", text, _names(members)) for text, members in astray.items()]
    return found


def _people(looks: Sequence[Look]) -> list[Finding]:
    found = []
    where: dict[str, set[str]] = defaultdict(set)
    for look in looks:
        if look.item.patient is not None and look.item.split is not None:
            where[look.item.patient].add(look.item.split)
    if both := {patient for patient, splits in where.items() if len(splits) > 1}:
        files = [look for look in looks if look.item.patient in both]
        found.append(
            Finding("error", "two-splits", f"{_n(len(both), 'patient')} in more than one split", _names(files))
        )
    places: dict[str, set[str]] = defaultdict(set)
    for look in looks:
        if look.item.patient is not None and look.item.site is not None:
            places[look.item.patient].add(look.item.site)
    if several := sum(len(sites) > 1 for sites in places.values()):
        text = (
            f"{_n(several, 'patient')} at several sites: a study keeps each at one of them. If the sites number their "
            "patients independently, make the ids unique, such as north-1"
        )
        found.append(Finding("warning", "several-sites", text))
    known = {look.item.patient for look in looks if look.item.patient is not None}
    if looks and not known:
        text = "the data do not state which images are of one patient; each counts as its own patient"
        found.append(Finding("warning", "patients-unknown", text))
    elif known and len(known) < FEW_PATIENTS:
        text = f"only {len(known)} patients: sites with fewer than {FEW_PATIENTS} are usually left out"
        found.append(Finding("warning", "few-patients", text))
    return found


def _classes(looks: Sequence[Look]) -> list[Finding]:
    counts = Counter(look.item.label for look in looks if look.item.label is not None)
    if not counts:
        return []
    if len(counts) == 1:
        return [Finding("error", "one-class", "all examples are of one class: nothing can be learned from it alone")]
    found = []
    if len(counts) > max(20, sum(counts.values()) / 4):
        text = (
            f"{len(counts)} classes for {sum(counts.values())} examples: are the folders patients rather than classes?"
        )
        return [Finding("warning", "many-classes", text)]
    if few := [label for label, count in counts.items() if count < FEW_PER_CLASS]:
        listed = ", ".join(f"{shown(label)} ({counts[label]})" for label in few[:5])
        found.append(Finding("warning", "few-examples", f"classes with fewer than {FEW_PER_CLASS} examples: {listed}"))
    missing = sum(look.item.label is None for look in looks)
    if missing:
        found.append(Finding("warning", "no-label", f"{_n(missing, 'example')} without a class"))
    return found


def _copies(looks: Sequence[Look]) -> list[Finding]:
    found = []
    groups = [[looks[i] for i in members] for members in equal([look.digest for look in looks])]
    groups = [members for members in groups if len({*map(_file_of, members)}) > 1]  # a scene that does not move
    single = [look for look in looks if look.item.part is None]  # tiles and frames resemble each other
    alike = nearly_equal([look.picture for look in single], [look.digest for look in single])
    pairs = [[single[i], single[j]] for i, j in alike]
    for same, code, sets in (("equal", "duplicates", groups), ("nearly equal", "near-duplicates", pairs)):
        if not sets:
            continue
        names = tuple(name for members in sets for name in _names(members))
        what = "group" if code == "duplicates" else "pair"
        found.append(Finding("warning", code, f"{_n(len(sets), what)} of {same} images", names))
        if crossing := [m for m in sets if len({look.item.split for look in m}) > 1]:
            level: Level = "error" if code == "duplicates" else "warning"
            names = tuple(name for members in crossing for name in _names(members))
            text = f"{_n(len(crossing), what)} of {same} images in two splits: test results would be too good"
            found.append(Finding(level, f"{code}-across-splits", text, names))
        if torn := [m for m in sets if len({look.item.label for look in m}) > 1]:
            names = tuple(name for members in torn for name in _names(members))
            level = "error" if code == "duplicates" else "warning"
            found.append(
                Finding(
                    level,
                    f"{code}-two-classes",
                    f"{_n(len(torn), what)} of {same} images with different classes",
                    names,
                )
            )
    return found


def _unlike(looks: Sequence[Look]) -> list[Finding]:
    """Return examples that differ from the rest: constant, other spacing, orientation, modality, channels or
    intensities.
    """
    found = []
    if flat := [look for look in looks if look.quantiles[0] == look.quantiles[-1]]:
        found.append(Finding("warning", "constant", f"{_n(len(flat), 'image')} of one value only", _names(flat)))
    single = [look for look in looks if 1 in look.size]
    if single and len(single) < len(looks):
        text = (
            f"{_n(len(single), 'single slice')} among volumes: if they are localizers, leave them out with slices = 2 "
            "or choose with series = {...}"
        )
        found.append(Finding("warning", "single-slices", text, _names(single)))
    for name, values in (
        ("orientations", [look.orientation for look in looks]),
        ("modalities", [look.modality for look in looks]),
        ("numbers of channels", [look.channels for look in looks]),
        ("units", [look.units for look in looks]),
    ):
        counts = Counter(values)
        if len(counts) > 1:
            usual = counts.most_common(1)[0][0]
            rare = [look for look, value in zip(looks, values, strict=True) if value != usual]
            listed = ", ".join(f"{value or 'not stated'} ({count})" for value, count in counts.most_common(6))
            level: Level = "note" if name == "orientations" else "warning"
            found.append(Finding(level, "mixed", f"different {name}: {listed}", _names(rare)))
    measured = [look for look in looks if look.spacing_mm is not None]
    if measured:
        table = np.array([look.spacing_mm for look in measured])
        ratio = np.exp(np.abs(np.log(table / np.median(table, axis=0))).max(1))
        if far := [look for look, r in zip(measured, ratio, strict=True) if r > 3]:
            found.append(
                Finding(
                    "warning", "spacing", f"{_n(len(far), 'image')} over 3 times from the median spacing", _names(far)
                )
            )
        elif ratio.max() > 1.01:
            found.append(Finding("note", "spacing", "spacing differs between images: resample them in millimeters"))
        if len(measured) < len(looks):
            rest = [look for look in looks if look.spacing_mm is None]
            found.append(Finding("warning", "spacing", f"{_n(len(rest), 'image')} without a voxel size", _names(rest)))
    if len(looks) >= 8:
        spread = np.array([look.quantiles[-2] - look.quantiles[1] for look in looks], dtype=np.float64)
        middle = np.median(spread)
        odd = [look for look, s in zip(looks, spread, strict=True) if middle > 0 and not middle / 20 < s < middle * 20]
        if odd:
            text = f"{_n(len(odd), 'image')} with a range of values 20 times wider or narrower than usual"
            found.append(Finding("warning", "intensity", text, _names(odd)))
    found += [
        Finding("error", "scale", text) for text in scale_problems([look.values for look in looks if look.values])
    ]
    notes: dict[str, list[Look]] = defaultdict(list)
    for look in looks:
        for note in look.notes:
            notes[note].append(look)
    found += [
        Finding("note", "reader", f"{_n(len(about), 'image')}: {note}", _names(about)) for note, about in notes.items()
    ]
    return found
