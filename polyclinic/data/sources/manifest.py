"""Table that lists images: one row per image, with its label or mask, patient, site and split."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from polyclinic.data.collection import UNKNOWN_PATIENTS, Collection, Entry, FromFiles, described
from polyclinic.data.examples import DataError
from polyclinic.data.files import check_pattern, is_image, opened, patients_in, placed
from polyclinic.data.labels import Reading
from polyclinic.data.preprocessing.pipeline_config import Steps
from polyclinic.data.source import HIDDEN, Info, Task
from polyclinic.data.sources.tabular_files import read_rows

MOST = 20
_FIELD = re.compile(r"\{([^{}]+)\}")


@dataclass(frozen=True)
class Manifest(FromFiles):
    r"""Images listed in a CSV or Parquet table. Further columns are kept, and any of them can name sites.

    Attributes:
        path: The table. Images' paths are relative to its folder (or to ``root``).
        images: For each channel the column with an image's file, or a path composed of columns, such as
            ``"images/{image_id}.jpg"``. A folder is read as a DICOM series.
        label: The column of the class or number; several columns of 0 and 1 for several labels; empty with masks.
        mask: The mask's file, as in ``images``; used if no label is named.
        patient: The column that identifies the patient.
        patient_pattern: A regular expression with one group that matches the patient in it, such as
            ``"patient(\d+)/"``.
        site: The column that names the hospital or scanner.
        site_pattern: The same for the site.
        split: The column of the official split, if there is one.
        regression: Whether the label is a number rather than a class.
        classes: The classes in order; if empty, the sorted values (for masks: the names of 0, 1, ...).
        separator: Separator of several labels in one column, as in ``"Mass|Nodule"``.
        nothing: Word for the absence of all labels.
        blank: Value of an empty cell among several labels; refused if not given.
        uncertain: Value of -1 among several labels; refused if not given.
        series: Selection of the series in a folder with several, such as ``{description = "T1*"}``.
        root: The folder to which images' paths are relative, if it is not the table's.
        steps: Preprocessing.
        unreadable: ``"refuse"`` raises an error for damaged files; ``"skip"`` leaves them out and lists them.
        about: Description from the catalog; not settable in a study file.
    """

    path: str
    images: tuple[str, ...] = ("path",)
    label: tuple[str, ...] | str = ""
    mask: str = "mask"
    patient: str = "patient"
    patient_pattern: str = ""
    site: str = "site"
    site_pattern: str = ""
    split: str = "split"
    regression: bool = False
    classes: tuple[str, ...] = ()
    separator: str = ""
    nothing: str = ""
    blank: float | None = None
    uncertain: float | None = None
    series: Mapping[str, str] = field(default_factory=dict)
    root: str = ""
    steps: Steps = ()
    unreadable: Literal["refuse", "skip"] = "refuse"
    about: Info | None = field(default=None, metadata=HIDDEN)

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = [*check_pattern("patient_pattern", self.patient_pattern)]
        if problems := [*problems, *check_pattern("site_pattern", self.site_pattern)]:
            raise DataError(problems)

    def collect(self) -> Collection:
        """Collect every row, or report every problem of every row."""
        table = placed(self.path)
        rows = read_rows(table)
        labels = self._labels(rows)
        masked = not labels and (self.mask in rows or "{" in self.mask)
        files = [*self.images, *([self.mask] if masked else [])]
        wanted = [name for f in files for name in (_FIELD.findall(f) or [f])]
        problems = [f"has no column {c!r}. There are {', '.join(rows)}" for c in (*wanted, *labels) if c not in rows]
        if not labels and not masked:
            problems.append("has neither a column of labels nor one of masks: name it with label = ...")
        if problems:
            raise DataError([f"{table.name} {problem}" for problem in problems])
        task = self._task(labels, masked)
        targets, classes = (
            ([None] * len(rows[wanted[0]]), self.classes)
            if masked
            else Reading(self.classes, self.separator, self.nothing, self.blank, self.uncertain).read(
                {c: rows[c] for c in labels}, task, problems
            )
        )
        entries = self._entries(table, rows, files, masked, targets, labels, problems)
        if problems:
            more = [f"... and {len(problems) - MOST} more"] if len(problems) > MOST else []
            raise DataError([f"{table.name}: {p}" for p in [*problems[:MOST], *more]])
        notes = [] if self.patient in rows else [UNKNOWN_PATIENTS]
        found = Info(table.stem, table.stem, "not stated", "not stated", task, classes)
        sites = ("site",) if self.site in rows else ()
        return self.made(described(self.about, found, notes), entries, sites)

    def _labels(self, rows: dict[str, list[str]]) -> tuple[str, ...]:
        named = (self.label,) if isinstance(self.label, str) else self.label
        return (("label",) if "label" in rows else ()) if named == ("",) else named

    def _task(self, labels: tuple[str, ...], masked: bool) -> Task:
        if masked:
            return "segmentation"
        if self.regression:
            return "regression"
        return "multilabel" if len(labels) > 1 or self.separator else "classification"

    def _entries(
        self,
        table: Path,
        rows: dict[str, list[str]],
        files: list[str],
        masked: bool,
        targets: list[int] | list[tuple[float, ...]] | list[None],
        labels: tuple[str, ...],
        problems: list[str],
    ) -> tuple[Entry, ...]:
        """Return one entry per row. Append to ``problems`` what is wrong with files, names and patients."""
        root = opened(self.root) if self.root else table.parent
        named = [[_filled(f, rows, i) for f in files] for i in range(len(targets))]
        problems += [p for i, row in enumerate(named) for p in _missing(i, files, row, root)]
        ids = [row[0] for row in named]
        problems += [f"{name} is listed {n} times" for name, n in Counter(ids).items() if n > 1]
        patients = patients_in(rows.get(self.patient, ids), self.patient_pattern)
        if empty := [i + 2 for i, patient in enumerate(patients) if not patient]:
            problems.append(f"{len(empty)} rows name no patient (the first is row {empty[0]})")
        own = {*files, *labels, self.patient, self.site, self.split}
        columns = {c: v for c, v in rows.items() if c not in own and c not in ("site", "split")}
        if self.site in rows:
            columns["site"] = list(patients_in(rows[self.site], self.site_pattern))
        if self.split in rows:
            columns["split"] = rows[self.split]
        if problems:
            return ()
        images = slice(0, len(files) - masked)
        return tuple(
            Entry(
                name,
                tuple(root / f for f in named[i][images]),
                patients[i],
                targets[i],
                root / named[i][-1] if masked else None,
                {c: v[i] for c, v in columns.items()},
            )
            for i, name in enumerate(ids)
        )


def _filled(file: str, rows: dict[str, list[str]], row: int) -> str:
    """Return the path in a column, or composed of columns."""
    return _FIELD.sub(lambda m: rows[m.group(1)][row], file) if "{" in file else rows[file][row]


def _missing(row: int, files: list[str], named: list[str], root: Path) -> list[str]:
    """Return the problems of the files that a row names."""
    problems = []
    for file, name in zip(files, named, strict=True):
        if not name:
            problems.append(f"row {row + 2} names no file in {file}")
        elif not (root / name).exists():
            problems.append(f"row {row + 2} names {name}, which does not exist")
        elif not (root / name).is_dir() and not is_image(root / name):
            problems.append(f"row {row + 2} names {name}, a format that is not supported")
    return problems
