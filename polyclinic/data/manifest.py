"""A table that lists images: one row per image, with its label or mask, patient, site and split."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from polyclinic.data.collection import UNKNOWN_PATIENTS, Collection, Entry, FromFiles, described
from polyclinic.data.examples import DataError
from polyclinic.data.files import kind_of, opened, placed
from polyclinic.data.preprocess import Steps
from polyclinic.data.rows import read_rows
from polyclinic.data.source import Info, Task

MOST = 20


@dataclass(frozen=True)
class Manifest(FromFiles):
    """Images listed in a CSV or Parquet table. Further columns are kept, and any of them can name sites.

    Attributes:
        path: The table. Images' paths are relative to its folder (or to ``root``).
        images: The columns that hold an image's file, one per channel; a folder is read as a DICOM series.
        label: The column of the class or number; several columns of 0 and 1 for several labels; empty with masks.
        mask: The column of the mask's file; used where no label is named.
        patient: The column that says whose an image is.
        site: The column that names the hospital or scanner.
        split: The column of the official split, if there is one.
        regression: Whether the label is a number rather than a class.
        classes: The classes in order; found and sorted where this is empty (for masks: the names of 0, 1, ...).
        root: The folder to which images' paths are relative, if it is not the table's.
        steps: Preprocessing.
        unreadable: Whether a damaged file stops everything (``"refuse"``), or is left out and named (``"skip"``).
        about: What is known of the data; the catalogue fills this in.
    """

    path: str
    images: tuple[str, ...] = ("path",)
    label: tuple[str, ...] | str = ""
    mask: str = "mask"
    patient: str = "patient"
    site: str = "site"
    split: str = "split"
    regression: bool = False
    classes: tuple[str, ...] = ()
    root: str = ""
    steps: Steps = ()
    unreadable: Literal["refuse", "skip"] = "refuse"
    about: Info | None = None

    def collect(self) -> Collection:
        """Every row, with every problem of every row."""
        table = placed(self.path)
        rows = read_rows(table)
        labels = (self.label,) if isinstance(self.label, str) else self.label
        if labels == ("",):
            labels = ("label",) if "label" in rows else ()
        masked = not labels and self.mask in rows
        problems = [f"{table.name} has no column {c!r}. There are {', '.join(rows)}"
                    for c in (*self.images, *labels) if c not in rows]  # fmt: skip
        if not labels and not masked:
            problems.append(f"{table.name} has neither a column of labels nor one of masks: name it with label = ...")
        if problems:
            raise DataError(problems)
        root = opened(self.root) if self.root else table.parent
        count = len(rows[self.images[0]])
        task: Task = "segmentation" if masked else "regression" if self.regression else "classification"
        task = "multilabel" if len(labels) > 1 else task
        targets, classes = self._targets(rows, labels, task, problems)
        entries = []
        for i in range(count):
            files = [root / rows[c][i] for c in self.images]
            mask = root / rows[self.mask][i] if masked else None
            for column, file in [*zip(self.images, files, strict=True), *([(self.mask, mask)] if mask else [])]:
                problems += _file(table.name, i, column, rows[column][i], file)
            entries.append(Entry(
                rows[self.images[0]][i], tuple(files), rows[self.patient][i] if self.patient in rows else
                rows[self.images[0]][i], targets[i], mask, {c: v[i] for c, v in self._columns(rows, labels).items()},
            ))  # fmt: skip
        problems += [f"{table.name}: {name} is listed {n} times" for name, n in
                     Counter(e.id for e in entries).items() if n > 1]  # fmt: skip
        if self.patient in rows and (empty := [i + 2 for i, p in enumerate(rows[self.patient]) if not p]):
            problems.append(f"{table.name}: {len(empty)} rows name no patient (the first is row {empty[0]})")
        if problems:
            more = [f"... and {len(problems) - MOST} more"] if len(problems) > MOST else []
            raise DataError([*problems[:MOST], *more])
        notes = [] if self.patient in rows else [UNKNOWN_PATIENTS]
        found = Info(table.stem, table.stem, "not stated", "not stated", task, classes)
        sites = (self.site,) if self.site in rows else ()
        return Collection(described(self.about, found, notes), tuple(entries), sites, self.steps, self.unreadable)

    def _columns(self, rows: dict[str, list[str]], labels: tuple[str, ...]) -> dict[str, list[str]]:
        """What else is known, the official split under the name ``split``."""
        own = {*self.images, *labels, self.mask, self.patient}
        return {"split" if c == self.split else c: v for c, v in rows.items() if c not in own}

    def _targets(
        self, rows: dict[str, list[str]], labels: tuple[str, ...], task: Task, problems: list[str]
    ) -> tuple[list[int] | list[tuple[float, ...]] | list[None], tuple[str, ...]]:
        """Each row's target, and the classes."""
        count, name = len(rows[self.images[0]]), Path(self.path).name
        if task == "segmentation":
            return [None] * count, self.classes
        if task == "classification":
            words = rows[labels[0]]
            classes = self.classes or tuple(sorted(set(words) - {""}, key=_order))
            bad = [i for i, word in enumerate(words) if word not in classes]
            if bad:
                problems.append(f"{name}: {len(bad)} rows have a {labels[0]} that is empty or not among classes (the "
                                f"first is row {bad[0] + 2}: {words[bad[0]]!r})")  # fmt: skip
            return [classes.index(w) if w in classes else -1 for w in words], classes
        numbers: list[tuple[float, ...]] = []
        for i in range(count):
            try:
                numbers.append(tuple(float(rows[c][i]) for c in labels))
            except ValueError:
                problems.append(f"{name}: row {i + 2} has no number in {' or '.join(labels)}")
                numbers.append(())
        return numbers, self.classes or (labels if task == "multilabel" else ())


def _order(word: str) -> tuple[float, str]:
    """Numbers by value, words after them by letter."""
    try:
        return float(word), word
    except ValueError:
        return float("inf"), word


def _file(table: str, row: int, column: str, name: str, file: Path) -> list[str]:
    """What is wrong with one file that a row names."""
    if not name:
        return [f"{table}: row {row + 2} names no file in {column}"]
    if not file.exists():
        return [f"{table}: row {row + 2} names {name}, which is not there"]
    return [] if file.is_dir() or kind_of(file) else [f"{table}: row {row + 2} names {name}, a kind we do not read"]
