"""A table that lists images: one row per image, with its label or mask, patient, site and split."""

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from polyclinic.data.collection import UNKNOWN_PATIENTS, Collection, Entry, FromFiles, described
from polyclinic.data.examples import DataError
from polyclinic.data.files import check_pattern, kind_of, opened, patients_in, placed
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
        images: For each channel the column that holds an image's file, or a path made of columns, such as
            ``"images/{image_id}.jpg"``. A folder is read as a DICOM series.
        label: The column of the class or number; several columns of 0 and 1 for several labels; empty with masks.
        mask: The mask's file, as in ``images``; used where no label is named.
        patient: The column that says whose an image is.
        patient_pattern: A regular expression with one group that finds the patient in it, such as ``"patient(\d+)/"``.
        site: The column that names the hospital or scanner.
        site_pattern: The same for the site.
        split: The column of the official split, if there is one.
        regression: Whether the label is a number rather than a class.
        classes: The classes in order; found and sorted where this is empty (for masks: the names of 0, 1, ...).
        separator: What stands between several labels in one column, as in ``"Mass|Nodule"``.
        nothing: The word for none of them.
        blank: What an empty cell stands for among several labels; refused if not given.
        uncertain: What -1 stands for among several labels; refused if not given.
        root: The folder to which images' paths are relative, if it is not the table's.
        steps: Preprocessing.
        unreadable: Whether a damaged file stops everything (``"refuse"``), or is left out and named (``"skip"``).
        about: What is known of the data; the catalog fills this in, and a study file cannot.
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
    root: str = ""
    steps: Steps = ()
    unreadable: Literal["refuse", "skip"] = "refuse"
    about: Info | None = field(default=None, metadata=HIDDEN)

    def __post_init__(self) -> None:
        problems = [*check_pattern("patient_pattern", self.patient_pattern)]
        if problems := [*problems, *check_pattern("site_pattern", self.site_pattern)]:
            raise DataError(problems)

    def collect(self) -> Collection:
        """Every row, with every problem of every row."""
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
        return Collection(described(self.about, found, notes), entries, sites, self.steps, self.unreadable)

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
        """One entry per row. Adds to ``problems`` what is wrong with files, names and patients."""
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
    """The path that a column holds, or that is made of columns."""
    return _FIELD.sub(lambda m: rows[m.group(1)][row], file) if "{" in file else rows[file][row]


def _missing(row: int, files: list[str], named: list[str], root: Path) -> list[str]:
    """What is wrong with the files that a row names."""
    found = []
    for file, name in zip(files, named, strict=True):
        if not name:
            found.append(f"row {row + 2} names no file in {file}")
        elif not (root / name).exists():
            found.append(f"row {row + 2} names {name}, which is not there")
        elif not (root / name).is_dir() and not kind_of(root / name):
            found.append(f"row {row + 2} names {name}, a kind we do not read")
    return found
