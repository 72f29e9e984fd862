"""Table that lists images: one row per image, with its label or mask, patient, site and split."""

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from polyclinic.data.collection import UNKNOWN_PATIENTS, Collection, Entry, FromFiles, described
from polyclinic.data.examples import DataError
from polyclinic.data.files import check_pattern, is_image, opened, patients_in, placed
from polyclinic.data.formats.column_roles import (
    NONE,
    column_of,
    detected,
    missing_at,
    named_column,
    no_column,
    same_patients,
    usual_columns,
)
from polyclinic.data.formats.parsing import clean, plain
from polyclinic.data.labels import MissingLabels, Reading, SurvivalReading, event_problems, survival_notes
from polyclinic.data.preprocessing.pipeline_config import Steps
from polyclinic.data.source import HIDDEN, Info, Task
from polyclinic.data.sources.tabular_files import read_rows

MOST = 20
ABSENT = "a file that does not exist"
_FIELD = re.compile(r"\{([^{}]+)\}")


@dataclass(frozen=True)
class Manifest(FromFiles):
    r"""Images listed in a CSV, Excel or Parquet table. Further columns are kept, and any of them can name sites.

    Options that name a column may be left out if its name is usual for the role (``column_roles.USUAL``), such as
    ``path``, ``label``, ``patient_id``, ``hospital`` and ``split``; a note lists the columns that were chosen.
    ``"none"`` says that no column has the role.

    Attributes:
        path: The table. Images' paths are relative to its folder (or to ``root``).
        images: For each channel the column with an image's file, or a path composed of columns, such as
            ``"images/{image_id}.jpg"``. ``*`` is any part of a folder's or file's name, as in ``"images_*/{name}"``;
            exactly one file must fit. A folder is read as a DICOM series.
        label: The column of the class or number; several columns of 0 and 1 for several labels; ``"none"`` with masks.
            With ``event``, the column of the time to an event.
        event: The column that says whether the event happened at that time, 1, or the patient was last seen then, 0
            (survival analysis).
        event_codes: Values of ``event`` that mean that it happened, instead of 1.
        censored_codes: Values of ``event`` that mean that it did not, instead of 0.
        mask: The mask's file, as in ``images``; used if there is no label.
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
        blank: Value of a missing cell among several labels; refused if not given.
        uncertain: Value of -1 among several labels; refused if not given.
        missing_labels: ``"refuse"`` raises an error for rows without a label (an empty cell, ``NA``, ``NaN``, ``#N/A``,
            ``NULL``, ...); ``"drop"`` leaves them out with a note.
        series: Selection of the series in a folder with several, such as ``{description = "T1*"}``.
        root: The folder to which images' paths are relative, if it is not the table's.
        sheet: The sheet of an Excel workbook, if several have content.
        steps: Preprocessing.
        unreadable: ``"refuse"`` raises an error for damaged files; ``"skip"`` leaves them out and lists them.
        about: Description from the catalog; not settable in a study file.
    """

    path: str
    images: tuple[str, ...] = ()
    label: tuple[str, ...] | str = ""
    event: str = ""
    event_codes: tuple[str, ...] = ()
    censored_codes: tuple[str, ...] = ()
    mask: str = ""
    patient: str = ""
    patient_pattern: str = ""
    site: str = ""
    site_pattern: str = ""
    split: str = ""
    regression: bool = False
    classes: tuple[str, ...] = ()
    separator: str = ""
    nothing: str = ""
    blank: float | None = None
    uncertain: float | None = None
    missing_labels: MissingLabels = "refuse"
    series: Mapping[str, str] = field(default_factory=dict)
    root: str = ""
    sheet: str = ""
    steps: Steps = ()
    unreadable: Literal["refuse", "skip"] = "refuse"
    about: Info | None = field(default=None, metadata=HIDDEN)

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = [*check_pattern("patient_pattern", self.patient_pattern)]
        codes = (*self.event_codes, *self.censored_codes)
        problems += event_problems(self.event, self.label, codes, self.regression)
        if problems := [*problems, *check_pattern("site_pattern", self.site_pattern)]:
            raise DataError(problems)

    def collect(self) -> Collection:
        """Collect every row, or report every problem of every row."""
        table = placed(self.path)
        rows = read_rows(table, sheet=self.sheet)
        problems: list[str] = []
        use = self._columns(rows, problems)
        if not use.images:
            problems.append(f"has no column of images: name it with images = [...]. There are {', '.join(rows)}")
        elif not use.labels and not use.mask and not problems:
            problems.append("has neither a column of labels nor one of masks: name it with label = ...")
        if problems:
            raise DataError([f"{table.name} {problem}" for problem in problems])
        task = self._task(use.labels, bool(use.mask))
        notes = [] if use.patient or self.patient_pattern else [UNKNOWN_PATIENTS]
        stated = {"patient": (self.patient, use.patient), "site": (self.site, use.site)}
        notes += detected(stated if self.label or use.mask else {**stated, "label": ("", use.labels[0])})
        patients: tuple[str, ...] = ()
        if use.patient:
            patients, more = same_patients(patients_in(rows[use.patient], self.patient_pattern))
            notes += more
        lines = [i + 2 for i in range(len(next(iter(rows.values()))))]
        targets: list[int] | list[tuple[float, ...]] | list[None]
        if use.mask:
            targets, classes = [None] * len(lines), self.classes
        else:
            reading = Reading(self.classes, self.separator, self.nothing, self.blank, self.uncertain)
            survival = SurvivalReading(self.event_codes, self.censored_codes)
            lost = set(survival.unlabeled(*(rows[c] for c in use.labels))) if self.event else set[int]()
            lost = lost if self.event else set(reading.unlabeled({c: rows[c] for c in use.labels}))
            if self.missing_labels == "drop" and lost:
                rows = {c: [v for i, v in enumerate(cells) if i not in lost] for c, cells in rows.items()}
                lines = [line for i, line in enumerate(lines) if i not in lost]
                patients = tuple(patient for i, patient in enumerate(patients) if i not in lost)
                notes.append(
                    f"{len(lost)} rows without {(' or ' if self.event else ' and ').join(use.labels)} are left out."
                )
            places = [f"row {line}" for line in lines]
            if self.event:
                time, event = ((c, rows[c]) for c in use.labels)
                pairs = survival.read(time, event, problems, places)
                notes += survival_notes(pairs, rows.get(use.site, [])) if not problems else []
                targets, classes = pairs, ()
            else:
                targets, classes = reading.read({c: rows[c] for c in use.labels}, task, problems, places)
        entries = self._entries(table, rows, use, targets, patients, lines, problems)
        if problems:
            more = [f"... and {len(problems) - MOST} more"] if len(problems) > MOST else []
            raise DataError([f"{table.name}: {p}" for p in [*problems[:MOST], *more]])
        found = Info(table.stem, table.stem, "not stated", "not stated", task, classes)
        return self.made(described(self.about, found, notes), entries, (use.site,) if use.site else ())

    def _columns(self, rows: Mapping[str, Sequence[str]], problems: list[str]) -> "_Columns":
        """Return the columns to use. Append to ``problems`` the names that no column has."""
        given = self.images or tuple(usual_columns(rows, "image")[:1])
        labels = [self.label] if isinstance(self.label, str) else list(self.label)
        labels = usual_columns(rows, "label")[:1] if labels == [""] else [] if labels == [NONE] else labels
        labels += [self.event] if self.event else []
        mask = "" if labels else self.mask if "{" in self.mask else column_of(rows, "mask", self.mask, problems)

        def known(name: str) -> str:
            column = named_column(rows, name)
            if column is None:
                problems.append(no_column(rows, name))
            return column or name

        def path(file: str) -> str:
            if "*" in file and "{" not in file:
                problems.append(f'has no field in braces in "{file}": every row would have the same file')
            return _FIELD.sub(lambda m: f"{{{known(m.group(1))}}}", file) if "{" in file else known(file)

        return _Columns(
            tuple(path(file) for file in given),
            path(mask) if mask else "",
            tuple(known(name) for name in labels),
            column_of(rows, "patient", self.patient, problems),
            column_of(rows, "site", self.site, problems),
            column_of(rows, "split", self.split, problems),
        )

    def _task(self, labels: tuple[str, ...], masked: bool) -> Task:
        if masked:
            return "segmentation"
        if self.event:
            return "survival"
        if self.regression:
            return "regression"
        return "multilabel" if len(labels) > 1 or self.separator else "classification"

    def _entries(
        self,
        table: Path,
        rows: Mapping[str, Sequence[str]],
        use: "_Columns",
        targets: list[int] | list[tuple[float, ...]] | list[None],
        patients: tuple[str, ...],
        lines: list[int],
        problems: list[str],
    ) -> tuple[Entry, ...]:
        """Return one entry per row. Append to ``problems`` what is wrong with files, names and patients."""
        root = opened(self.root) if self.root else table.parent
        files = [*use.images, *([use.mask] if use.mask else [])]
        named = [[_filled(f, rows, i) for f in files] for i in range(len(targets))]
        if any("*" in file for file in files):
            named, wrong = _found(lines, files, named, root)
            problems += wrong
        wrong = _missing(lines, files, named, root)
        if any(ABSENT in problem for problem in wrong):
            named, several = _spelled(lines, named, root)
            wrong = [*several, *_missing(lines, files, named, root)]
        problems += wrong
        ids = [row[0] for row in named]
        if self.frames and self.frames.column:
            if self.frames.column in rows:
                numbers = [plain(clean(cell)).zfill(7) for cell in rows[self.frames.column]]  # in order of display
                ids = [f"{name}#frame{number}" for name, number in zip(ids, numbers, strict=True)]
            else:
                problems.append(no_column(rows, self.frames.column, "frame"))
        if twice := {name: n for name, n in Counter(ids).items() if n > 1 and name}:
            some = ", ".join(f"{name} is listed {n} times" for name, n in list(twice.items())[:5])
            problems.append(f"{len(twice)} files are listed more than once: {some}")
        patients = patients if use.patient else patients_in(ids, self.patient_pattern)
        if use.patient and (empty := [lines[i] for i in missing_at(patients)]):
            problems.append(f"{len(empty)} rows name no patient (the first is row {empty[0]})")
        own = {*files, *use.labels, use.patient, use.site, use.split}
        columns = {c: v for c, v in rows.items() if c not in own}
        if use.site:
            columns[use.site] = list(patients_in(rows[use.site], self.site_pattern))
        if use.split:
            columns["split"] = rows[use.split]
        if problems:
            return ()
        images = slice(0, len(use.images))
        return tuple(
            Entry(
                name,
                tuple(root / f for f in named[i][images]),
                patients[i],
                targets[i],
                root / named[i][-1] if use.mask else None,
                {c: v[i] for c, v in columns.items()},
            )
            for i, name in enumerate(ids)
        )


@dataclass(frozen=True)
class _Columns:
    """The columns of each role; "" if there is none. Images and masks may be paths composed of columns."""

    images: tuple[str, ...]
    mask: str
    labels: tuple[str, ...]
    patient: str
    site: str
    split: str


def _filled(file: str, rows: Mapping[str, Sequence[str]], row: int) -> str:
    """Return the path in a column, or composed of columns."""
    return _FIELD.sub(lambda m: rows[m.group(1)][row], file) if "{" in file else rows[file][row]


def _found(lines: list[int], files: list[str], named: list[list[str]], root: Path) -> tuple[list[list[str]], list[str]]:
    """Return the names in which every ``*`` is replaced as in the only file that fits, and the problems."""
    by_name: dict[str, list[str]] = defaultdict(list)
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            by_name[name].append(Path(folder, name).relative_to(root).as_posix())
    everywhere = [path for paths in by_name.values() for path in paths]
    several: list[str] = []
    out = [[*row] for row in named]
    for line, row in zip(lines, out, strict=True):
        for i in (i for i, file in enumerate(files) if "*" in file):
            fits = re.compile("[^/]*".join(map(re.escape, row[i].split("*"))))
            last = row[i].rpartition("/")[2]
            fitting = [p for p in (everywhere if "*" in last else by_name.get(last, ())) if fits.fullmatch(p)]
            if len(fitting) > 1:
                several.append(f"row {line}: {fitting[0]} and {fitting[1]}")
            row[i] = fitting[0] if fitting else row[i]
    some = "; ".join(several[:5])
    return out, [f"{len(several)} row{'s' * (len(several) > 1)} fit several files ({some})"] * bool(several)


def _spelled(lines: list[int], named: list[list[str]], root: Path) -> tuple[list[list[str]], list[str]]:
    r"""Return the names as their files are spelled, and the problems.

    A name that does not exist may differ from the only file that fits in the separator of folders (``\``), in case,
    or in its Unicode form: tables are often written on another system than the one that reads them.
    """
    fits: dict[str, list[str]] = defaultdict(list)
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names + folders:
            path = Path(folder, name).relative_to(root).as_posix()
            fits[_spelling(path)].append(path)
    out, several = [[*row] for row in named], list[str]()
    for line, row in zip(lines, out, strict=True):
        for i, name in enumerate(row):
            if not name or (root / name).exists():
                continue
            found = fits.get(_spelling(name), [])
            if len(found) > 1:
                several.append(f"row {line}: {found[0]} and {found[1]}")
            row[i] = found[0] if len(found) == 1 else name
    some = "; ".join(several[:5])
    return out, [f"{len(several)} rows fit several files that differ in case or Unicode form only ({some})"] * bool(
        several
    )


def _spelling(name: str) -> str:
    return unicodedata.normalize("NFC", name.replace("\\", "/").removeprefix("./")).casefold()


def _missing(lines: list[int], files: list[str], named: list[list[str]], root: Path) -> list[str]:
    """Return the problems of the files that the rows name, grouped by kind."""
    groups: dict[str, list[str]] = defaultdict(list)
    for line, row in zip(lines, named, strict=True):
        for file, name in zip(files, row, strict=True):
            if not name:
                groups[f"no file in {file}"].append(f"row {line}")
            elif not (root / name).exists():
                groups[ABSENT].append(f"row {line}: {name}")
            elif not (root / name).is_dir() and not is_image(root / name):
                groups["a file of a format that is not supported"].append(f"row {line}: {name}")
    return [
        f"{len(rows)} row{'s name' if len(rows) > 1 else ' names'} {what} ({', '.join(rows[:5])}"
        f"{', ...' if len(rows) > 5 else ''})"
        for what, rows in groups.items()
    ]
