"""Tree of DICOM files as a source: one example per series, labels from a table by patient.

Files are grouped by their headers, whatever their names and folders; an export with all files in one folder is read.
The scanner (manufacturer and model) is always a column, so that simulated hospitals can follow real machines.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from polyclinic.data.collection import Collection, Entry, FromFiles, described
from polyclinic.data.examples import DataError
from polyclinic.data.filename_screening import in_name
from polyclinic.data.files import opened, placed
from polyclinic.data.formats.column_roles import column_of, detected, matched, missing_at
from polyclinic.data.formats.dicom.file import quiet
from polyclinic.data.formats.dicom.series import Series, dicom_files, find_series, selected
from polyclinic.data.labels import MissingLabels, Reading
from polyclinic.data.preprocessing.pipeline_config import Steps
from polyclinic.data.source import HIDDEN, Info, Task, digest
from polyclinic.data.sources.tabular_files import read_rows


@dataclass(frozen=True)
class DicomImages(FromFiles):
    """Series of a DICOM tree, with labels by patient.

    Attributes:
        path: The folder, or a ``.zip`` file of it.
        labels: A table with one row per patient (CSV, gzipped CSV, Excel or Parquet).
        sheet: The sheet of an Excel workbook, if several have content.
        patient: Its column with (0010,0020), or with the pseudonym that replaced it; if empty, the first with a usual
            name. Leading zeros that a spreadsheet removed do not matter.
        label: Its column with the class or number; if empty, the first with a usual name.
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
    labels: str
    patient: str = ""
    label: str = ""
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

    def collect(self) -> Collection:
        """Collect every series of a patient who has a label."""
        root, table = opened(self.path), placed(self.labels)
        rows = read_rows(table, sheet=self.sheet)
        problems: list[str] = []
        who = column_of(rows, "patient", self.patient, problems)
        rest = {name: cells for name, cells in rows.items() if name != who}
        label = column_of(rest, "label", self.label, problems)
        site = column_of(rest, "site", self.site, problems)
        for role, given, column in (("patient", self.patient, who), ("label", self.label, label)):
            if not column and not given:
                problems.append(f"has no column that names the {role}: name it with {role} = ...")
        if problems:
            raise DataError([f"{table.name} {problem}. There are {', '.join(rows)}" for problem in problems])
        people = Counter(rows[who])
        if unknown_rows := missing_at(rows[who]):
            some = ", ".join(f"row {i + 2}" for i in unknown_rows[:5])
            problems.append(f"{table.name}: {len(unknown_rows)} rows name no patient ({some})")
        if twice := sum(count > 1 for count in people.values()):
            problems.append(f"{table.name}: {twice} patients have more than one row")
        scanners: dict[Path, str] = {}

        def look(path: Path, dataset: Any) -> None:
            with quiet():
                words = [str(dataset.get(k) or "").strip() for k in ("Manufacturer", "ManufacturerModelName")]
            scanners[path] = " ".join(word for word in words if word) or "not stated"

        files = dicom_files(root)
        found = find_series(files, look=look)
        if self.unreadable == "refuse":
            problems += [f"{problem}" for problem in found.problems[:20]]
        at = {name: i for i, name in enumerate(rows[who])}
        own = matched({series.patient for series in found.series}, at)
        row = {patient: at[name] for patient, name in own.items()}
        chosen: list[Series] = []
        unknown, scouts = 0, 0
        for series in sorted(found.series, key=lambda s: s.paths):
            if self.modality not in ("", series.modality) or len(series.paths) < self.slices:
                continue
            if not selected(series, self.series):
                continue
            if series.localizer and "uid" not in self.series:
                scouts += 1
            elif series.patient not in row:
                unknown += 1
            else:
                chosen.append(series)
        if not chosen and not problems:
            problems.append(f"no series of {root.name} belongs to a patient of {table.name} ({unknown} have no row)")
        task: Task = "regression" if self.regression else "classification"
        words = [rows[label][row[series.patient]] for series in chosen]
        reading = Reading(self.classes)
        lost = set(reading.unlabeled({label: words})) if self.missing_labels == "drop" else set()
        chosen = [series for i, series in enumerate(chosen) if i not in lost]
        words = [word for i, word in enumerate(words) if i not in lost]
        places = [f"{table.name}, row {row[series.patient] + 2}" for series in chosen]
        targets: list[int] | list[tuple[float, ...]]
        targets, classes = reading.read({label: words}, task, problems, places)
        if problems:
            raise DataError([f"{root.name}: {problem}" for problem in problems[:20]])
        entries = []
        shared = Counter(parent for series in chosen for parent in {path.parent for path in series.paths})
        for number, series in enumerate(chosen):
            parent = series.paths[0].parent
            alone = shared[parent] == 1 and len(series.paths) > 1 and parent != root
            name = (parent if alone else series.paths[0]).relative_to(root).as_posix()
            name = name if in_name(Path(name).parts) is None else f"series-{digest(name)[:16]}"
            columns = {"scanner": scanners[series.paths[0]], "modality": series.modality or "not stated"}
            if site:
                columns[site] = rows[site][row[series.patient]]
            patient = f"patient-{digest(series.patient)[:16]}"
            entries.append(Entry(name, series.paths, patient, targets[number], None, columns, slices=True))
        modalities = ", ".join(sorted({e.columns["modality"] for e in entries}))
        name = Path(self.path).stem
        notes = [f"Left out: {unknown} series of patients without a label."] * bool(unknown)
        notes += [f"Left out: {scouts} localizers."] * bool(scouts)
        notes += [f"Left out: {len(lost)} series whose {label} is missing."] * bool(lost)
        info = described(self.about, Info(name, name, modalities, "not stated", task, classes), notes)
        notes += detected({"patient": (self.patient, who), "label": (self.label, label), "site": (self.site, site)})
        sites = tuple(dict.fromkeys((site, "scanner"))) if site else ("scanner",)
        return self.made(info, entries, sites)
