"""Tables of features: one row per patient or visit, as in registries and region-of-interest studies of the brain.

Missing values are filled and features are scaled with statistics over *training rows only*, in one of three ways:

* ``"federation"``: means and deviations over the training rows of all training sites. They follow from each site's Σx,
  Σx² and counts, so a real federation computes them by secure summation, and external sites use them unchanged.
* ``"site"``: each site's own. An external site then uses its own rows' features, never their labels.
* ``"declared"``: from a file. A real hospital sees only its own rows, so common statistics must be provided.

Indicators, one for each feature that is missing anywhere, tell the model which values were missing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from polyclinic.data.collection import UNKNOWN_PATIENTS, described
from polyclinic.data.examples import DataError, Examples
from polyclinic.data.files import content_of, placed
from polyclinic.data.formats.column_roles import (
    column_of,
    detected,
    identifying,
    missing_at,
    named_column,
    no_column,
    same_patients,
)
from polyclinic.data.formats.parsing import is_missing, is_number, numbers_of, plain
from polyclinic.data.labels import MissingLabels, Reading, SurvivalReading, comma_hint, survival_notes
from polyclinic.data.preprocessing.table_statistics import Statistics
from polyclinic.data.source import HIDDEN, Info, Table, Task, digest
from polyclinic.data.sources.tabular_files import read_rows
from polyclinic.data.texts import Texts, taken

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class FeatureTable:
    """CSV (also gzipped), Excel or Parquet table.

    Attributes:
        path: The file.
        label: The column to predict; a list of columns of 0 and 1 for several labels; with ``event``, the time to an
            event.
        event: The column that says whether the event happened at that time, 1, or the patient was last seen then, 0
            (survival analysis).
        event_codes: Values of ``event`` that mean that it happened, instead of 1.
        censored_codes: Values of ``event`` that mean that it did not, instead of 0.
        features: The columns to predict from; if empty, every other column whose name is not usual for a patient, a
            site or a split.
        leave_out: Columns that are not features.
        categories: Columns whose values are codes or words, not quantities; each value becomes a feature of 0 and 1.
        site: The column that names the hospital; if empty, the first with a usual name (``site``, ``hospital``,
            ``center``, ``scanner``, ...); ``"none"`` for no column.
        patient: The column that identifies the patient, found likewise (``patient_id``, ``subject``, ``case_id``,
            ``id``, ...); ``"none"`` if each row is its own patient.
        threshold: A label above it is class 1, otherwise class 0; None if labels are classes.
        regression: Whether the label is a number to predict.
        classes: The names of the classes, in order.
        missing: Values that mean missing, in addition to empty cells, ``NA``, ``NaN``, ``#N/A``, ``NULL``, ``?`` and
            similar. Numbers are compared as numbers: ``"-9"`` is also ``-9.0``.
        missing_labels: ``"refuse"`` raises an error for rows without a label; ``"drop"`` leaves them out with a note.
        zero_is_missing: Columns in which 0 means missing.
        fill: Replacement of a missing value: the mean, the median (with each site's own statistics only), or 0.
        scale: Whether features are scaled to mean 0 and deviation 1.
        indicators: Whether features of 0 and 1 indicate missing values.
        statistics: Rows from which mean and deviation are computed; or ``"declared"``: from the file ``declared``.
        declared: A file that ``Statistics.text`` wrote, for a hospital that sees its own rows only.
        sheet: The sheet of an Excel workbook, if several have content.
        about: Description from the catalog; not settable in a study file.
    """

    path: str
    label: tuple[str, ...] | str
    event: str = ""
    event_codes: tuple[str, ...] = ()
    censored_codes: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    leave_out: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    site: str = ""
    patient: str = ""
    threshold: float | None = None
    regression: bool = False
    classes: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    missing_labels: MissingLabels = "refuse"
    zero_is_missing: tuple[str, ...] = ()
    fill: Literal["mean", "median", "zero"] = "mean"
    scale: bool = True
    indicators: bool = True
    statistics: Literal["federation", "site", "declared"] = "federation"
    declared: str = ""
    sheet: str = ""
    about: Info | None = field(default=None, metadata=HIDDEN)

    def __post_init__(self) -> None:
        problems = []
        if self.fill == "median" and self.statistics == "federation":
            problems.append(
                'fill = "median": a median cannot be computed from sums, so sites would have to reveal their '
                'values; use fill = "mean", or statistics = "site"'
            )
        if self.regression and self.threshold is not None:
            problems.append("threshold = is for classes: leave it out, or set regression = false")
        if self._several and (self.regression or self.threshold is not None):
            key = "regression" if self.regression else "threshold"
            problems.append(f"label lists columns of 0 and 1, and {key} is for one column: leave one of them out")
        if self.event and (self._several or self.regression or self.threshold is not None):
            problems.append("event = is for survival analysis: name one label, and leave regression and threshold out")
        if not self.event and (self.event_codes or self.censored_codes):
            problems.append("event_codes and censored_codes need event = the column that they are values of")
        if (self.statistics == "declared") != bool(self.declared):
            problems.append(
                "declared = the file that lists inputs and their statistics; give it with statistics = "
                '"declared", and only then'
            )
        if problems:
            raise DataError(problems)

    @property
    def _several(self) -> bool:
        return not isinstance(self.label, str)

    @cached_property
    def info(self) -> Info:
        """Description of the data set, including how it was processed."""
        whose = {
            "federation": "over the training rows of all training sites",
            "site": "over each site's training rows",
            "declared": f"from {Path(self.declared).name}",
        }[self.statistics]
        notes = [f"Features are {'scaled and ' if self.scale else ''}filled with statistics {whose}."]
        if unlabeled := len(self._raw[self._use.labels[0]]) - len(self._kept):
            notes.append(f"{unlabeled} rows without {self._named} are left out.")
        if self.event:
            sites = self._words(self._use.site) if self._use.site else []
            notes += survival_notes(self._targets[0].tolist(), sites)
        notes += detected({"patient": (self.patient, self._use.patient), "site": (self.site, self._use.site)})
        if idle := sorted(self._apart - set(self._features) - {*self._use.columns, *self.leave_out, "split"}):
            notes.append(f"Not used as features, by their names: {', '.join(idle)}; list them in features to use them.")
        if self._use.patient:
            notes += self._patients[1]
        if not self._use.patient:
            notes.append(UNKNOWN_PATIENTS.replace("image", "row"))
        stem = Path(self.path).name.partition(".")[0]
        return described(self.about, Info(stem, stem, "table", "not stated", self._task, self._targets[1]), notes)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the file's bytes and of the options."""
        options = sorted(
            (k, v)
            for k, v in vars(self).items()
            if k in self.__dataclass_fields__ and k not in ("path", "about", "declared")
            if v or k not in ("sheet", "event", "event_codes", "censored_codes")
        )
        return digest("table", 1, content_of(placed(self.path)), options, self._declared and self._declared.text())

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the inputs, in order."""
        return self.inputs[1]

    def table(self) -> Table:
        """Return one row per row with a known label. Columns other than features and label are kept as text, also sex
        and age.
        """
        return self._table

    @cached_property
    def _table(self) -> Table:
        raw, ids, use = self._raw, self._ids, self._use
        patients = self._patients[0] if use.patient else ids
        if use.patient and (lost := [ids[i] for i in missing_at(patients)]):
            raise DataError(f"{Path(self.path).name}: {len(lost)} rows have no {use.patient} ({', '.join(lost[:5])})")
        apart = {c for c in self._features if c.lower() not in ("sex", "age")} | {
            *self._use.labels,
            use.patient,
            use.event,
        }
        others = [c for c in raw if c not in apart]
        columns = {c: self._words(c) for c in others}
        return Table(ids, patients, self._targets[0], columns, (use.site,) if use.site else (), bool(use.event))

    def examples(self, ids: Sequence[str]) -> Examples:
        """Return the named rows as in the file, neither filled nor scaled; refused if a value is missing."""
        return self._examples(ids, lambda values: values)

    def release(self) -> None:
        """Free what was read. The description remains; ``table`` and ``examples`` read the file again."""
        _ = self.info
        for name in ("_raw", "_kept", "_ids", "_patients", "_targets", "_table", "inputs", "fingerprint"):
            vars(self).pop(name, None)  # how a cached property is cleared

    def fitted(self, rows: Mapping[str, Sequence[str]], external: Sequence[str] = ()) -> Mapping[str, "FittedTable"]:
        """Return for each site the same table filled and scaled.

        Args:
            rows: The training rows of each site; for an external site, its own rows.
            external: The sites that are excluded from statistics of the federation.
        """
        if self._declared is not None:
            return {site: FittedTable(self, self._declared) for site in rows}
        values, names, amounts = self.inputs
        own = {site: values[self._table.rows(ids)] for site, ids in rows.items()}
        pooled = np.concatenate([own[site] for site in sorted(own) if site not in external])
        used = {site: pooled if self.statistics == "federation" else mine for site, mine in own.items()}
        return {
            site: FittedTable(self, Statistics.of(names, seen, amounts, self.fill, self.scale))
            for site, seen in used.items()
        }

    def unlabeled_rows(self, path: Path, names: Sequence[str]) -> list[tuple[str, Array | str]]:
        """Return the inputs of the rows of another table with these columns, which needs no label.

        Args:
            path: The table.
            names: The names of the inputs, as in training.

        Returns:
            For each row its name, and its values [F], NaN if missing and neither filled nor scaled, or the reason why
            it has none.

        Raises:
            DataError: If the table cannot be read, or lacks columns.
        """
        raw = read_rows(path)
        columns = list(dict.fromkeys(self._column_of(name) for name in names))
        if lacking := [column for column in columns if column not in raw]:
            raise DataError([f"{path.name} {no_column(raw, column)}" for column in lacking])
        count = len(next(iter(raw.values())))
        patient = column_of(raw, "patient", self.patient if self.patient in raw else "", [])
        ids = raw[patient] if patient and len(set(raw[patient])) == count else [f"row {i + 2}" for i in range(count)]
        return [(name, self._row(raw, i, columns, names)) for i, name in enumerate(ids)]

    def _column_of(self, name: str) -> str:
        """Return the column that an input comes from."""
        category = (column for column in self.categories if name.startswith((f"{column} = ", f"{column} is missing")))
        return next(category, name.removesuffix(" is missing"))

    def _row(
        self, raw: Mapping[str, Sequence[str]], i: int, columns: Sequence[str], names: Sequence[str]
    ) -> Array | str:
        """Return the inputs of one row, or why it has none."""
        values = dict.fromkeys(names, 0.0)
        for column in columns:
            word = raw[column][i]
            gone = self._is_missing(word) or (column in self.zero_is_missing and is_number(word) and float(word) == 0)
            if gone:
                values |= {column: np.nan} if column in values else {}
                values |= {known: 1.0} if (known := f"{column} is missing") in values else {}
            elif column in self.categories:
                if (known := f"{column} = {plain(word)}") not in values:
                    return f"row {i + 2} has {word!r} in {column}, which did not occur in training"
                values[known] = 1.0
            elif not is_number(word):
                return f"row {i + 2} has {word!r} in {column}, which is not a number"
            else:
                values[column] = float(word)
        return np.array([values[name] for name in names])

    def texts(self, ids: Sequence[str]) -> list[tuple[str, str]]:
        """Return the features and the labels of each named row as text, independent of other rows."""

        def text(column: str, row: int) -> str:
            word = self._raw[column][row]
            return "" if self._is_missing(word) else repr(float(word)) if is_number(word) else plain(word)

        rows = self._kept[self._table.rows(ids)].tolist()
        labels = (*self._use.labels, *([self._use.event] if self._use.event else []))
        return [
            (repr([text(c, row) for c in self._features]), ", ".join(text(label, row) for label in labels))
            for row in rows
        ]

    def _examples(self, ids: Sequence[str], fitted: Callable[[Array], Array]) -> Examples:
        """Return the named rows, whose inputs [n, F] ``fitted`` fills and scales."""
        table, rows = self._table, self._table.rows(ids)
        assert table.labels is not None
        x = torch.from_numpy(fitted(self.inputs[0][rows]).astype(np.float32))
        return Examples(x, torch.from_numpy(table.labels[rows]), taken(table.patients, rows), Texts(ids))

    @cached_property
    def _raw(self) -> dict[str, Sequence[str]]:
        path = placed(self.path)
        columns = read_rows(path, sheet=self.sheet)
        problems: list[str] = []
        labels = self._labels
        problems += [no_column(columns, label, "label") for label in labels if named_column(columns, label) is None]
        if self.event and named_column(columns, self.event) is None:
            problems.append(no_column(columns, self.event, "event"))
        if not labels:
            problems.append("needs a label: name the column to predict")
        wanted = [*self.features, *self.leave_out, *self.categories, *self.zero_is_missing]
        problems += [no_column(columns, c) for c in dict.fromkeys(wanted) if c not in columns]
        for role, given in (("patient", self.patient), ("site", self.site)):
            column_of(columns, role, given, problems)  # type: ignore[arg-type]
        if problems:
            raise DataError([f"{path.name} {problem}" for problem in problems])
        return columns

    @cached_property
    def _use(self) -> "_Columns":
        raw = self._raw
        labels = tuple(named_column(raw, label) or label for label in self._labels)
        event = (named_column(raw, self.event) or self.event) if self.event else ""
        rest = {name: cells for name, cells in raw.items() if name not in (*labels, event)}
        patient = column_of(rest if not self.patient else raw, "patient", self.patient, [])
        return _Columns(labels, patient, column_of(rest if not self.site else raw, "site", self.site, []), event)

    @cached_property
    def _apart(self) -> set[str]:
        """The columns that are no features unless the study lists them."""
        return {*self._use.columns, "split", *self.leave_out, *identifying(self._raw)}

    @cached_property
    def _features(self) -> tuple[str, ...]:
        return self.features or tuple(c for c in self._raw if c not in self._apart or c in self.categories)

    @cached_property
    def _kept(self) -> "np.ndarray[Any, np.dtype[np.int64]]":
        """The row numbers of the file that are kept."""
        columns = {label: self._raw[label] for label in self._use.labels}
        rows = len(self._raw[self._use.labels[0]])
        if self.event:
            lost = set(self._survival.unlabeled(next(iter(columns.values())), self._raw[self._use.event]))
        else:
            lost = set(self._reading.unlabeled(columns))
        if len(lost) == rows:
            raise DataError(f"{Path(self.path).name}: {self._named} is missing in every row")
        if self.missing_labels == "refuse" or not lost:
            return np.arange(rows)
        return np.delete(np.arange(rows), sorted(lost))

    @cached_property
    def _ids(self) -> Texts:
        """The names of the rows that are kept."""
        return Texts(f"row {i + 2}" for i in self._kept)

    @cached_property
    def _patients(self) -> tuple[Texts, list[str]]:
        """The patient of each row, under one spelling, and notes."""
        patients, notes = same_patients(self._words(self._use.patient))
        return Texts(patients), notes

    def _words(self, column: str) -> Sequence[str]:
        """Return the cells of a column in the rows that are kept."""
        cells = self._raw[column]
        return cells if len(self._kept) == len(cells) else taken(cells, self._kept)

    @property
    def _named(self) -> str:
        """The columns of labels in words."""
        return " or ".join([*self._use.labels, self._use.event]) if self.event else " and ".join(self._use.labels)

    @property
    def _labels(self) -> tuple[str, ...]:
        """The columns of labels, as given."""
        return (self.label,) if isinstance(self.label, str) else self.label

    @property
    def _task(self) -> Task:
        if self.event:
            return "survival"
        return "multilabel" if self._several else "regression" if self.regression else "classification"

    @property
    def _reading(self) -> Reading:
        return Reading(() if self.threshold is not None else self.classes, missing=self.missing, renamed=True)

    @property
    def _survival(self) -> SurvivalReading:
        return SurvivalReading(self.event_codes, self.censored_codes, self.missing)

    @cached_property
    def _targets(self) -> tuple[Array, tuple[str, ...]]:
        """The label of each retained row (float32 [n, L] of several), and the classes."""
        columns = {label: self._words(label) for label in self._use.labels}
        label, words = next(iter(columns.items()))
        places, problems = self._ids, list[str]()
        if self.event:
            events = self._words(self._use.event)
            pairs = self._survival.read((label, words), (self._use.event, events), problems, places)
            if problems:
                raise DataError([f"{Path(self.path).name}: {problem}" for problem in problems])
            return np.array(pairs, dtype=np.float32), ()
        numeric = self.regression or self.threshold is not None
        targets, classes = self._reading.read(columns, "regression" if numeric else self._task, problems, places)
        if problems:
            raise DataError([f"{Path(self.path).name}: {problem}" for problem in problems])
        if self._several:
            return np.array(targets, dtype=np.float32), classes
        if numeric:
            numbers = np.array(targets, dtype=np.float64)
            if self.threshold is None:
                return numbers.astype(np.float32), ()
            usual = (f"{label} up to {self.threshold:g}", f"{label} above {self.threshold:g}")
            return (numbers[:, 0] > self.threshold).astype(np.int64), self.classes or usual
        if len(classes) > max(50, len(words) // 4):
            raise DataError(
                f"{Path(self.path).name}: {label} has {len(classes)} different values: set regression = "
                "true if it is a number, or a threshold"
            )
        return np.array(targets, dtype=np.int64), classes

    @cached_property
    def _declared(self) -> Statistics | None:
        return Statistics.read(placed(self.declared)) if self.statistics == "declared" else None

    @cached_property
    def inputs(self) -> tuple[Array, tuple[str, ...], Array]:
        """Values with NaN if missing [n, F], their names, and whether they are quantities rather than 0 or 1 [F]."""
        columns: dict[str, Array] = {}
        amounts: set[str] = set()
        missing: dict[str, Array] = {}
        for name in self._features:
            words = self._words(name)
            plainly = None if self.missing or name in self.categories else numbers_of(words)
            if plainly is None:
                gone = np.array([self._is_missing(w) for w in words])
            if name in self.categories:
                words = [plain(w) for w in words]
                for value in sorted({w for w, no in zip(words, gone, strict=True) if not no}):
                    columns[f"{name} = {value}"] = np.array([float(w == value) for w in words])
            else:
                numbers = plainly
                if numbers is None:
                    cells = zip(words, gone, self._kept, strict=True)
                    numbers = np.array([np.nan if no else self._number(w, name, i) for w, no, i in cells])
                if name in self.zero_is_missing:
                    numbers[numbers == 0] = np.nan
                gone = np.isnan(numbers)
                columns[name] = numbers
                amounts.add(name)
            missing[f"{name} is missing"] = gone
        if not columns:
            raise DataError(f"{Path(self.path).name} has no features")
        if self._declared is not None:
            names = self._declared.names
            columns |= {name: gone.astype(float) for name, gone in missing.items()}
            columns |= {n: np.zeros(len(self._kept)) for n in names if n not in columns and self._is_category(n)}
            if lacking := [n for n in names if n not in columns]:
                raise DataError(
                    [f'{Path(self.path).name} has no input "{n}", which {self.declared} lists' for n in lacking]
                )
        else:
            columns |= {n: gone.astype(float) for n, gone in missing.items() if self.indicators and gone.any()}
            names = tuple(columns)
        return np.stack([columns[n] for n in names], axis=1), names, np.array([n in amounts for n in names])

    def _is_category(self, name: str) -> bool:
        """Return whether ``name`` is "column = value" of a known categorical column, even for an absent value."""
        return any(name.startswith(f"{column} = ") for column in self.categories)

    def _is_missing(self, word: str) -> bool:
        return is_missing(word, self.missing)

    def _number(self, word: str, column: str, row: int) -> float:
        if not is_number(word):
            raise DataError(
                f"{Path(self.path).name}: row {row + 2} has {word!r} in {column}, which is not a number: list it in "
                f'categories or leave_out, name what it identifies with patient = "{column}" or site = "{column}", or '
                f"add the word to missing{comma_hint(word)}"
            )
        return float(word)


@dataclass(frozen=True)
class _Columns:
    """The columns of the labels, the patient, the site and the event; "" if there is none."""

    labels: tuple[str, ...]
    patient: str
    site: str
    event: str = ""

    @property
    def columns(self) -> tuple[str, ...]:
        """All of them."""
        return *self.labels, self.patient, self.site, self.event


@dataclass(frozen=True, eq=False)
class FittedTable:
    """Table filled and scaled with given statistics.

    Attributes:
        base: The table.
        statistics: Statistics of its inputs.
    """

    base: FeatureTable
    statistics: Statistics

    @property
    def info(self) -> Info:
        """The table's description."""
        return replace(self.base.info)

    @property
    def fingerprint(self) -> str:
        """Hash of the table and the statistics."""
        return digest(self.base.fingerprint, self.statistics.text())

    def table(self) -> Table:
        """Return the table's rows."""
        return self.base.table()

    def examples(self, ids: Sequence[str]) -> Examples:
        """Return the named rows, filled and scaled."""
        return self.base._examples(ids, self.statistics)
