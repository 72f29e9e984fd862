"""Tree of DICOM files as a source: one example per series, with a label by patient from a table, or with a mask.

Files are grouped by their headers, whatever their names and folders; an export with all files in one folder is read.
The scanner (manufacturer and model) is always a column, so that simulated hospitals can follow real machines.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from polyclinic.data.collection import Collection, Entry, FromFiles, described
from polyclinic.data.deidentification.filename_screening import in_name
from polyclinic.data.examples import DataError
from polyclinic.data.files import opened, placed
from polyclinic.data.formats.column_roles import column_of, detected, matched, missing_at, named_column, no_column
from polyclinic.data.formats.dicom.file import quiet
from polyclinic.data.formats.dicom.segments import referenced_series
from polyclinic.data.formats.dicom.series import Found, Series, dicom_files, find_series, selected
from polyclinic.data.labels import MissingLabels, Reading, SurvivalReading, event_problems, survival_notes
from polyclinic.data.preprocessing.pipeline_config import Steps
from polyclinic.data.source import HIDDEN, Info, Task, digest
from polyclinic.data.sources.tabular_files import read_rows


@dataclass(frozen=True)
class DicomImages(FromFiles):
    """Series of a DICOM tree, with labels by patient, or with the masks of the tree that refer to them.

    Attributes:
        path: The folder, or a ``.zip`` file of it.
        labels: A table with one row per patient (CSV, gzipped CSV, Excel or Parquet). With ``segments`` it is optional
            and states which patients are read, and their site.
        sheet: The sheet of an Excel workbook, if several have content.
        patient: Its column with (0010,0020), or with the pseudonym that replaced it; if empty, the first with a usual
            name. Leading zeros that a spreadsheet removed do not matter.
        label: Its column with the class or number; if empty, the first with a usual name. With ``event``, the column of
            the time to an event.
        event: The column that says whether the event happened at that time, 1, or the patient was last seen then, 0
            (survival analysis).
        event_codes: Values of ``event`` that mean that it happened, instead of 1.
        censored_codes: Values of ``event`` that mean that it did not, instead of 0.
        site: Its column that names the site; if empty, the first with a usual name, otherwise the scanner; ``"none"``
            takes the scanner.
        regression: Whether the label is a number rather than a class.
        modality: Only series of this modality, such as ``"CT"``; "" for all.
        slices: Smallest number of slices of a series.
        series: Selection of series by their headers, such as ``{description = "T1*"}``; keys are ``uid``,
            ``description``, ``number``, ``modality``, ``protocol``, ``body_part``, ``kernel`` and ``slice_thickness``.
            Localizers are left out.
        classes: The classes in order; if empty, the sorted values.
        missing_labels: ``"refuse"`` raises an error for patients without a label; ``"drop"`` leaves them out and
            says so.
        steps: Preprocessing.
        unreadable: ``"refuse"`` raises an error for damaged files; ``"skip"`` leaves them out and lists them.
        about: Description from the catalog; not settable in a study file.
    """

    path: str
    labels: str = ""
    patient: str = ""
    label: str = ""
    event: str = ""
    event_codes: tuple[str, ...] = ()
    censored_codes: tuple[str, ...] = ()
    site: str = ""
    regression: bool = False
    modality: str = ""
    slices: int = 1
    series: Mapping[str, str] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    missing_labels: MissingLabels = "refuse"
    sheet: str = ""
    steps: Steps = ()
    unreadable: Literal["refuse", "skip"] = "refuse"
    about: Info | None = field(default=None, metadata=HIDDEN)

    def __post_init__(self) -> None:
        super().__post_init__()
        codes = (*self.event_codes, *self.censored_codes)
        problems = event_problems(self.event, self.label, codes, self.regression)
        if not self.labels and not self.segments:
            problems.append(
                "give labels = the table of labels by patient; or segments = [...], the names of segments, if the tree "
                "contains segmentations or structure sets"
            )
        if self.segments and (self.label or self.event or self.regression):
            problems.append("segments = [...] makes masks the targets: leave label, event and regression out")
        if problems:
            raise DataError(problems)

    def collect(self) -> Collection:
        """Collect every series of a patient who has a label, or that a mask refers to."""
        root, problems = opened(self.path), list[str]()
        table = self._table(problems)
        scanners, masks = dict[Path, str](), dict[str, list[Path]]()

        def look(path: Path, dataset: Any) -> None:
            with quiet():
                words = [str(dataset.get(k) or "").strip() for k in ("Manufacturer", "ManufacturerModelName")]
            scanners[path] = " ".join(word for word in words if word) or "not stated"
            for uid in (referenced_series(path, dataset) or ()) if self.segments else ():
                masks.setdefault(uid, []).append(path)

        found = find_series(dicom_files(root), look=look)
        if self.unreadable == "refuse":
            problems += [f"{problem}" for problem in found.problems[:20]]
        chosen, notes = self._chosen(found, table, root, problems)
        if self.segments:
            chosen, own = _with_masks(chosen, masks, problems, notes)
            task: Task = "segmentation"
            targets: Targets = [None] * len(chosen)
            classes: tuple[str, ...] = self.classes
        else:
            task, own = "survival" if self.event else "regression" if self.regression else "classification", {}
            chosen, targets, classes = self._labeled(chosen, table, task, problems, notes)
        if problems:
            raise DataError([f"{root.name}: {problem}" for problem in problems[:20]])
        entries = []
        shared = Counter(parent for series in chosen for parent in {path.parent for path in series.paths})
        for series, target in zip(chosen, targets, strict=True):
            parent = series.paths[0].parent
            alone = shared[parent] == 1 and len(series.paths) > 1 and parent != root
            name = (parent if alone else series.paths[0]).relative_to(root).as_posix()
            name = name if in_name(Path(name).parts) is None else f"series-{digest(name)[:16]}"
            columns = {"scanner": scanners[series.paths[0]], "modality": series.modality or "not stated"}
            if table.site:
                columns[table.site] = table.cell(table.site, series.patient)
            patient = f"patient-{digest(series.patient)[:16]}"
            mask = own.get(series.paths)
            entries.append(Entry(name, series.paths, patient, target, mask, columns, slices=True))
        modalities = ", ".join(sorted({e.columns["modality"] for e in entries}))
        name = Path(self.path).stem
        info = described(self.about, Info(name, name, modalities, "not stated", task, classes), notes)
        sites = tuple(dict.fromkeys((table.site, "scanner"))) if table.site else ("scanner",)
        return self.made(info, entries, sites)

    def _table(self, problems: list[str]) -> "_Patients":
        """Return the table of patients, which has no rows if there is none. Append to ``problems`` those of its rows.

        Raises:
            DataError: If columns are missing. The message lists every problem.
        """
        if not self.labels:
            return _Patients("", {}, "", "", "")
        table = placed(self.labels)
        rows, missing = read_rows(table, sheet=self.sheet), list[str]()
        who = column_of(rows, "patient", self.patient, missing)
        rest = {name: cells for name, cells in rows.items() if name != who}
        label = "" if self.segments else column_of(rest, "label", self.label, missing)
        site = column_of(rest, "site", self.site, missing)
        wanted = [("patient", self.patient, who), *([] if self.segments else [("label", self.label, label)])]
        for role, given, column in wanted:
            if not column and not given:
                missing.append(f"has no column that names the {role}: name it with {role} = ...")
        event = named_column(rest, self.event) if self.event else ""
        if event is None:
            missing.append(no_column(rest, self.event))
        if missing:
            raise DataError([f"{table.name} {problem}. There are {', '.join(rows)}" for problem in missing])
        people = Counter(rows[who])
        if unknown_rows := missing_at(rows[who]):
            some = ", ".join(f"row {i + 2}" for i in unknown_rows[:5])
            problems.append(f"{table.name}: {len(unknown_rows)} rows name no patient ({some})")
        if twice := sum(count > 1 for count in people.values()):
            problems.append(f"{table.name}: {twice} patients have more than one row")
        return _Patients(table.name, rows, who, label, site, event or "")

    def _chosen(
        self, found: Found, table: "_Patients", root: Path, problems: list[str]
    ) -> tuple[list[Series], list[str]]:
        """Return the series that the study selects, of patients in the table if there is one; and notes."""
        table.match({series.patient for series in found.series})
        chosen: list[Series] = []
        unknown, scouts = 0, 0
        for series in sorted(found.series, key=lambda s: s.paths):
            if self.modality not in ("", series.modality) or len(series.paths) < self.slices:
                continue
            if not selected(series, self.series):
                continue
            if series.localizer and "uid" not in self.series:
                scouts += 1
            elif self.labels and series.patient not in table.row:
                unknown += 1
            else:
                chosen.append(series)
        if not chosen and not problems and self.labels:
            problems.append(f"no series of {root.name} belongs to a patient of {table.name} ({unknown} have no row)")
        elif not chosen and not problems:
            problems.append("no series is selected")
        notes = [f"Left out: {unknown} series of patients without a label."] * bool(unknown)
        notes += [f"Left out: {scouts} localizers."] * bool(scouts)
        named = {
            "patient": (self.patient, table.who),
            "label": (self.label, table.label),
            "site": (self.site, table.site),
        }
        return chosen, notes + detected({role: names for role, names in named.items() if names[1]})

    def _labeled(
        self, chosen: list[Series], table: "_Patients", task: Task, problems: list[str], notes: list[str]
    ) -> tuple[list[Series], "Targets", tuple[str, ...]]:
        """Return the series with a label, their targets, and the classes."""
        reading, survival = Reading(self.classes), SurvivalReading(self.event_codes, self.censored_codes)
        names = (table.label, table.event) if self.event else (table.label,)
        cells = {name: [table.cell(name, series.patient) for series in chosen] for name in names}
        lost = set[int]()
        if self.missing_labels == "drop":
            lost = set(survival.unlabeled(*cells.values()) if self.event else reading.unlabeled(cells))
        chosen = [series for i, series in enumerate(chosen) if i not in lost]
        cells = {name: [cell for i, cell in enumerate(column) if i not in lost] for name, column in cells.items()}
        if lost:
            notes.append(f"Left out: {len(lost)} series whose {' or '.join(names)} is missing.")
        places = [f"{table.name}, row {table.row[series.patient] + 2}" for series in chosen]
        if not self.event:
            targets, classes = reading.read(cells, task, problems, places)
            return chosen, targets, classes
        time, event = cells.items()
        pairs = survival.read(time, event, problems, places)
        at = [table.cell(table.site, series.patient) for series in chosen] if table.site else []
        notes += survival_notes(pairs, at) if not problems else []
        return chosen, pairs, ()


Targets = list[int] | list[tuple[float, ...]] | list[None]


@dataclass
class _Patients:
    """A table with one row per patient.

    Attributes:
        name: Name of the file.
        rows: Cells by column.
        who: The column of patients.
        label: The column of labels; "" if masks are the targets.
        site: The column of sites; "" if there is none.
        event: The column of events; "" if there is none.
        row: The row of each patient of the tree.
    """

    name: str
    rows: Mapping[str, Sequence[str]]
    who: str
    label: str
    site: str
    event: str = ""
    row: dict[str, int] = field(default_factory=dict)

    def match(self, patients: set[str]) -> None:
        """Find the rows of ``patients``."""
        at = {name: i for i, name in enumerate(self.rows.get(self.who, []))}
        self.row = {patient: at[name] for patient, name in matched(patients, at).items()}

    def cell(self, column: str, patient: str) -> str:
        """Return a patient's cell."""
        return self.rows[column][self.row[patient]]


def _with_masks(
    chosen: list[Series], masks: Mapping[str, list[Path]], problems: list[str], notes: list[str]
) -> tuple[list[Series], dict[tuple[Path, ...], Path]]:
    """Return the series that one mask refers to, and their masks by the series' files."""
    several = [masks[series.key] for series in chosen if len(masks.get(series.key, ())) > 1]
    if several:
        problems.append(
            f"{len(several)} series have several segmentations or structure sets (as {several[0][0].name} and "
            f"{several[0][1].name}): keep one of them in the folder"
        )
    kept = [series for series in chosen if series.key in masks]
    if chosen and not kept:
        problems.append("no segmentation or structure set refers to a selected series (by its SeriesInstanceUID)")
    if len(kept) < len(chosen):
        notes.append(f"Left out: {len(chosen) - len(kept)} series without a segmentation or structure set.")
    return kept, {series.paths: masks[series.key][0] for series in kept}
