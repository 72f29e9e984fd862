"""Data check that a hospital runs before it joins: all problems of a folder of data in one report, at the site.

``check_folder`` detects the kind of folder, inspects every example, and reports counts, classes, spacing, orientation,
intensities, damaged files (one line for each reason), patients in two splits, masks that are empty or contain unknown
labels,
suspected health information (by tag number and place, never by value), likely faces, and equal or nearly equal images.
It changes and sends nothing.
"""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from polyclinic.core.toml_text import inline
from polyclinic.data.deidentification.filename_screening import shown
from polyclinic.data.files import OPTIONS, ImageOptions
from polyclinic.data.formats.column_roles import SPLITS
from polyclinic.data.formats.dicom.series import dicom_files, find_series, selected
from polyclinic.data.formats.parsing import is_missing
from polyclinic.data.formats.safe_reading import Limits, Unreadable
from polyclinic.data.quality.findings import Finding, compare, headers, health_information, layout_problems
from polyclinic.data.quality.folder_layout import Item, Layout, detect
from polyclinic.data.quality.inspection import DICOM, Look, look_at
from polyclinic.data.quality.loading import Loaded, load
from polyclinic.data.quality.phi_screening import burned_in, tags_of
from polyclinic.data.quality.table_checks import check_table

__all__ = ["CheckReport", "Finding", "check_folder"]
KINDS = {
    "classes": "folders named by class",
    "nnunet": "images with masks (nnU-Net layout)",
    "bids": "BIDS",
    "manifest": "a manifest that lists files",
    "dicom": "DICOM",
    "npz": "NumPy archives",
    "table": "a table",
    "files": "loose images",
}


MOST_REASONS = 20


@dataclass(frozen=True)
class CheckReport:
    """Result of the check. File names that look like a person are masked; identifiers and values of tags are excluded.

    Attributes:
        root: The checked folder or file.
        kind: A key of ``KINDS``.
        examples: Number of inspected examples.
        patients: Number of patients; None if unknown.
        classes: Examples by class.
        splits: Examples by split.
        sites: Examples by site.
        modalities: Examples by modality.
        orientations: Examples by orientation.
        mask_labels: Masks by the labels they contain.
        spacing_mm: Smallest, median and largest voxel size, as (z, y, x); None if no file states one.
        sizes: Smallest, median and largest size in voxels, as (z, y, x).
        intensity: 33 quantiles of the values, averaged over examples, by units (``"HU"``, ``"RGB"``, ``""``).
        findings: Problems and notes, errors first.
        data: The ``[data]`` table of a study that reads what was found; empty if no source can.
        why: How the table was recognized.
        pictures: Captions and thumbnails (uint8) of some examples.
    """

    root: Path
    kind: str
    examples: int
    patients: int | None = None
    classes: Counter[str] = field(default_factory=Counter)
    splits: Counter[str] = field(default_factory=Counter)
    sites: Counter[str] = field(default_factory=Counter)
    modalities: Counter[str] = field(default_factory=Counter)
    orientations: Counter[str] = field(default_factory=Counter)
    mask_labels: Counter[int] = field(default_factory=Counter)
    spacing_mm: tuple[tuple[float, ...], ...] | None = None
    sizes: tuple[tuple[int, ...], ...] | None = None
    intensity: dict[str, Any] = field(default_factory=dict, repr=False)
    findings: tuple[Finding, ...] = ()
    pictures: tuple[tuple[str, Any], ...] = field(default=(), repr=False)
    data: dict[str, Any] = field(default_factory=dict, repr=False)
    why: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether there is no error."""
        return not any(finding.level == "error" for finding in self.findings)

    def lines(self) -> list[str]:
        """Return the report for the screen."""
        who = "patients unknown" if self.patients is None else f"{self.patients} patients"
        out = [f"{KINDS[self.kind]}: {self.examples} examples, {who}"]
        for name, counts in (
            ("classes", self.classes),
            ("splits", self.splits),
            ("sites", self.sites),
            ("modalities", self.modalities),
            ("orientations", self.orientations),
            ("mask labels", self.mask_labels),
        ):
            if counts:
                listed = ", ".join(f"{key} {count}" for key, count in counts.most_common(10))
                out.append(f"  {name:13}{listed}{', ...' if len(counts) > 10 else ''}")
        if self.sizes:
            out.append(
                "  {:13}{} to {} voxels, median {}".format("size", *map(_by, (self.sizes[0], *self.sizes[:0:-1])))
            )
        if self.spacing_mm:
            out.append(
                "  {:13}{} to {} mm, median {}".format(
                    "spacing", *map(_by, (self.spacing_mm[0], *self.spacing_mm[:0:-1]))
                )
            )
        for units, values in self.intensity.items():
            low, middle, high = (float(values[i]) for i in (0, len(values) // 2, -1))
            out.append(f"  {'values':13}{low:.4g} to {high:.4g}, median {middle:.4g} {units}".rstrip())
        marks = {"error": "x", "warning": "!", "note": "-"}
        damaged: dict[str, list[str]] = {}
        for finding in self.findings:
            if finding.code == "unreadable":
                damaged.setdefault(finding.message, []).extend(finding.files)
        for reason, names in list(damaged.items())[:MOST_REASONS]:
            out.append("x " + Finding("error", "unreadable", reason, tuple(names)).line())
        if rest := sum(map(len, list(damaged.values())[MOST_REASONS:])):
            out.append(f"x {rest} more files cannot be read, for {len(damaged) - MOST_REASONS} other reasons")
        out += [f"{marks[f.level]} {f.line()}" for f in self.findings if f.code != "unreadable"]
        if self.data:
            out += [f"recognized: {reason}" for reason in self.why]
            out += ["in a study file this is", "", "[data]"]
            out += [f"{key} = {inline(value)}" for key, value in self.data.items()]
            out += ["", "`polyclinic new --data PATH` writes a study with it"]
        errors = sum(f.level == "error" for f in self.findings)
        out.append("no errors found" if self.ok else f"{errors} error{'s' * (errors > 1)} to correct first")
        return out


def _by(numbers: tuple[float, ...]) -> str:
    return " x ".join(f"{n:.4g}" for n in numbers)


def check_folder(
    root: str | os.PathLike[str],
    labels: tuple[int, ...] = (),
    health: Literal["error", "warning"] = "error",
    thumbs: int = 24,
    options: ImageOptions = OPTIONS,
    given: Mapping[str, Any] = MappingProxyType({}),
) -> CheckReport:
    """Check a folder (or one file) of medical data.

    Args:
        root: A hospital's folder in any of the layouts of ``folder_layout``.
        labels: The allowed mask values, if no ``dataset.json`` states them.
        health: Level of suspected health information.
        thumbs: Number of thumbnails to keep for the page.
        options: How files are read, with the limits on one file.
        given: Options of ``[data]`` with which a study would read the data, such as ``{"fill": 0}``.

    Raises:
        Unreadable: If ``root`` contains nothing that could be data.
    """
    root, limits = Path(root), options.limits
    layout = detect(root, limits, str(given.get("sheet", "")))
    found: list[Finding] = []
    loaded = load(root, layout, limits, given)
    found += loaded.findings()
    if layout.kind == "table" and layout.table is not None:
        return _as_loaded(_table(layout, limits, health), loaded, found)
    if loaded.items:
        layout = replace(layout, items=loaded.items)
    hints = ""
    if given or loaded.masks:
        options = _reading(options, loaded, given)
    if layout.kind == DICOM:
        layout, hints = _dicom(layout, found, health, options)
        if loaded.masks:
            items = (replace(item, mask=loaded.masks.get(item.paths)) for item in layout.items)
            layout = replace(layout, items=tuple(item for item in items if item.mask is not None))
    looks: list[Look] = []
    refused: list[tuple[str, str]] = []
    for seen in look_at(layout, thumbs, options, hints):
        if isinstance(seen, Look):
            looks.append(_annotated(seen, loaded.ignore))
        else:
            refused.append((_within(layout.root, seen[1].path, seen[0].name), seen[1].reason))
    found += [Finding("error", "unreadable", reason, (shown(name),)) for name, reason in refused]
    found += layout_problems(layout)
    if links := sum(Path(f, n).is_symlink() for f, names, _ in os.walk(root) for n in names):
        found.append(Finding("warning", "links", f"{links} links to folders are not followed"))
    found += health_information(layout, looks, health, limits)
    found += compare(looks, dict.fromkeys(labels or loaded.labels or layout.labels, ""))
    return _as_loaded(_report(layout, looks, found), loaded, [])


def _reading(options: ImageOptions, loaded: Loaded, given: Mapping[str, Any]) -> ImageOptions:
    """Return how files are read: as the source of the study does, or else as ``given`` says."""
    if loaded.options is not None:
        return replace(loaded.options, limits=options.limits)
    own = {f.name: given[f.name] for f in fields(ImageOptions) if f.name in given and f.name != "limits"}
    return replace(options, **own)


def _annotated(seen: Look, ignore: int | None) -> Look:
    """Return the summary without the mask value of voxels that are not annotated."""
    labels = None if seen.labels is None else tuple(label for label in seen.labels if label != ignore)
    return replace(seen, labels=labels)


def _dicom(
    layout: Layout, found: list[Finding], health: Literal["error", "warning"], options: ImageOptions
) -> tuple[Layout, str]:
    """Return series as items and the body parts; findings on the headers are appended to ``found``."""
    tags: dict[int, list[str]] = {}
    drawn: dict[str, list[str]] = {}
    parts: set[str] = set()
    root = layout.root if layout.root.is_dir() else layout.root.parent

    def inspect(path: Path, dataset: Any) -> None:
        name = shown(str(path.relative_to(root)))
        for tag in tags_of(dataset):
            tags.setdefault(tag, []).append(name)
        if reason := burned_in(dataset):
            drawn.setdefault(reason, []).append(name)
        parts.add(str(dataset.get("BodyPartExamined") or ""))

    files = dicom_files(layout.root) if layout.root.is_dir() else [layout.root]
    series = find_series(files, options.limits, inspect)
    found += [
        Finding("error", "unreadable", p.reason, (shown(str(p.path.relative_to(root))),)) for p in series.problems
    ]
    found += headers(tags, drawn, series.not_images, health)
    chosen = [s for s in series.series if selected(s, options.series)]
    if rest := len(series.series) - len(chosen):
        found.append(Finding("note", "series", f"{rest} series do not have the values of series and are left out"))
    scouts = [s for s in chosen if s.localizer]
    if scouts:
        names = tuple(shown(str(s.paths[0].relative_to(root))) for s in scouts)
        found.append(Finding("note", "localizers", f"{len(scouts)} localizers are left out", names))
    items = tuple(
        Item(str(s.paths[0].relative_to(root)), s.paths, patient=s.patient or None, key=DICOM)
        for s in chosen
        if not s.localizer
    )
    return Layout(DICOM, layout.root, items), " ".join(parts)


def _as_loaded(report: CheckReport, loaded: Loaded, more: list[Finding]) -> CheckReport:
    """Return the report with the patients, classes, splits and sites that a study reads, and its ``[data]`` table."""
    order = {"error": 0, "warning": 1, "note": 2}
    findings = tuple(sorted([*report.findings, *more], key=lambda finding: order[finding.level]))
    report = replace(report, findings=findings, data=loaded.data, why=loaded.why)
    table = loaded.table
    if table is None:
        return report
    site = table.columns.get(table.sites[0], ()) if table.sites else ()
    classes = report.classes
    if table.labels is not None and table.labels.ndim == 1:
        classes = Counter(shown(loaded.classes[number]) for number in table.labels.tolist())
    elif table.survival and table.labels is not None:
        classes = Counter("event" if event else "censored" for _, event in table.labels.tolist())
    return replace(
        report,
        patients=len(set(table.patients)) if loaded.knows_patients else None,
        classes=classes,
        splits=Counter(SPLITS.get(value.lower(), value) for value in table.columns.get("split", ()) if value),
        sites=Counter(shown(value) for value in site if not is_missing(value)),
    )


def _within(root: Path, path: Path, name: str) -> str:
    """Return the refused file's path within the folder, or the example's name if it is outside."""
    return str(path.relative_to(root)) if root in path.parents else name


def _report(layout: Layout, looks: list[Look], found: list[Finding]) -> CheckReport:
    known = {look.item.patient for look in looks} - {None}
    spacing = [look.spacing_mm for look in looks if look.spacing_mm is not None]
    intensity = {}
    for units in sorted({look.units for look in looks}):
        intensity[units] = np.mean([look.quantiles for look in looks if look.units == units], axis=0)
        intensity[units][0] = min(look.quantiles[0] for look in looks if look.units == units)
        intensity[units][-1] = max(look.quantiles[-1] for look in looks if look.units == units)
    order = {"error": 0, "warning": 1, "note": 2}
    return CheckReport(
        layout.root,
        layout.kind,
        len(looks),
        len(known) if known else None,
        Counter(shown(look.item.label) for look in looks if look.item.label is not None),
        Counter(look.item.split for look in looks if look.item.split is not None),
        Counter(shown(look.item.site) for look in looks if look.item.site is not None),
        Counter(look.modality for look in looks if look.modality),
        Counter(look.orientation for look in looks if look.orientation),
        Counter(label for look in looks for label in look.labels or ()),
        _spread(spacing) if spacing else None,
        tuple(tuple(int(n) for n in row) for row in _spread([look.size for look in looks])) if looks else None,
        intensity,
        tuple(sorted(found, key=lambda finding: order[finding.level])),
        tuple((shown(look.item.name), look.thumb) for look in looks if look.thumb is not None),
    )


def _spread(rows: Any) -> tuple[tuple[float, ...], ...]:
    """Return minimum, median and maximum, column by column."""
    table = np.array(rows, dtype=np.float64)
    return tuple(tuple(float(v) for v in row) for row in (table.min(0), np.median(table, axis=0), table.max(0)))


def _table(layout: Layout, limits: Limits, health: Literal["error", "warning"]) -> CheckReport:
    assert layout.table is not None
    try:
        rows, patients, classes, splits, sites, found = check_table(layout.table, limits, health, layout.sheet)
    except Unreadable as refusal:
        found = [Finding("error", "unreadable", refusal.reason, (shown(layout.table.name),))]
        return CheckReport(layout.root, "table", 0, findings=tuple(found))
    order = {"error": 0, "warning": 1, "note": 2}
    return CheckReport(
        layout.root,
        "table",
        rows,
        patients,
        classes,
        splits,
        sites,
        findings=tuple(sorted(found, key=lambda f: order[f.level])),
    )
