"""Results by subgroups of patients, such as sex, age group and scanner, if the data contain these columns.

A group consists of all test patients of the training sites with the same value in a column. Small groups are not shown.
A column is not shown at all if a hidden group could be computed by subtracting the shown groups from the total. The
results are descriptive: differences between groups are not tested.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from polyclinic.core import atomic
from polyclinic.data.source import Table
from polyclinic.evaluation.metric import Metric
from polyclinic.evaluation.metric_functions import metrics_for
from polyclinic.evaluation.records.predictions import Predictions
from polyclinic.evaluation.records.run_reader import Run, training_sites
from polyclinic.evaluation.sample import sample
from polyclinic.statistics.intervals import Estimate

FILE = "groups.json"
SHOWN = (
    "sex",
    "gender",
    "age",
    "scanner",
    "manufacturer",
    "vendor",
    "device",
    "field_strength",
    "contrast",
    "modality",
    "ethnicity",
    "race",
)
"""Columns by which results are shown, case-insensitively, except for the column of sites."""
AGES = ((40, "below 40"), (60, "40 to 59"), (75, "60 to 74"), (999, "75 and above"))
FEWEST = 10
MANY = 12


@dataclass(frozen=True)
class Group:
    """One group's result, pooled over the training sites; ``patients`` counts each once."""

    name: str
    patients: int
    estimate: Estimate


@dataclass(frozen=True)
class Attribute:
    """The groups of a column, or the reason why they are not shown."""

    name: str
    groups: tuple[Group, ...] = ()
    why: str = ""


def groups_of(table: Table, numbers: Mapping[str, int]) -> dict[str, dict[str, list[int]]]:
    """Return patients' numbers by column and group. A patient with several values in a column is in no group of it.

    Args:
        table: The patients of the data, with their columns.
        numbers: The number of each patient, as in predictions.
    """
    found: dict[str, dict[str, list[int]]] = {}
    for column, values in table.columns.items():
        if column.lower() not in SHOWN or column in table.sites[:1]:
            continue
        values_of: dict[str, set[str]] = {}
        for patient, value in zip(table.patients, values, strict=True):
            values_of.setdefault(patient, set()).add(value.strip())
        groups: dict[str, list[int]] = {}
        for patient, names in sorted(values_of.items()):
            name = next(iter(names)) if len(names) == 1 else ""
            name = _age(name) if column.lower() == "age" else name
            if name and patient in numbers:
                groups.setdefault(name, []).append(numbers[patient])
        if 2 <= len(groups) <= MANY:
            found[column] = dict(sorted(groups.items(), key=lambda item: _order(item[0])))
    return found


def _age(text: str) -> str:
    try:
        years = float(text.rstrip("Yy"))  # DICOM writes 063Y
    except ValueError:
        return ""
    return next((name for limit, name in AGES if years < limit), "")


def _order(name: str) -> tuple[int, str]:
    ages = [text for _, text in AGES]
    return (ages.index(name) if name in ages else -1, name)


def write_groups(run: Path, table: Table, numbers: Mapping[str, int]) -> None:
    """Write ``groups.json`` with the patients' numbers, not names, to a run folder, unless no column is known."""
    if found := groups_of(table, numbers):
        atomic.write(run / FILE, json.dumps(found, separators=(",", ":")) + "\n")


def by_group(run: Run, label: str, level: float, fewest: int = FEWEST) -> list[Attribute]:
    """Return the primary metric of ``label`` in each group, on the pooled test patients of the training sites.

    Args:
        fewest: Minimum number of patients of a group that is shown.
    """
    file = run.path / FILE
    if not file.is_file():
        return []
    fewest = max(fewest, FEWEST)
    metric = metrics_for(run.info.task, len(run.info.classes) or 2)[run.info.metric]
    sites, found = training_sites(run), list[Attribute]()
    everyone = _tested(run, label, sites)  # by site and number: numbers may be specific to a site
    for column, groups in json.loads(file.read_text(encoding="utf-8")).items():
        members = {name: set(patients) for name, patients in groups.items()}
        tested = {name: {who for who in everyone if who[1] in mine} for name, mine in members.items()}
        tested = {name: patients for name, patients in tested.items() if patients}
        known = set[tuple[str, int]]().union(*tested.values())
        small = [patients for patients in tested.values() if len(patients) < fewest]
        apart = [*small, everyone - known] if small else []  # a subtraction would give these together
        if len(tested) < 2:
            continue
        if small and sum(map(len, apart)) < fewest:
            found.append(
                Attribute(column, why=f"not shown: a group of fewer than {fewest} patients could be identified")
            )
            continue
        shown = []
        for name, patients in tested.items():
            if len(patients) < fewest:
                estimate = Estimate(None, why=f"not shown: fewer than {fewest} patients")
                shown.append(Group(name, 0, estimate))
            else:
                estimate = _estimate(run, label, sites, members[name], metric, level)
                shown.append(Group(name, len(patients), estimate))
        found.append(Attribute(column, tuple(shown)))
    return found


def _tested(run: Run, label: str, sites: Sequence[str]) -> set[tuple[str, int]]:
    arms = [arm for (method, _), arm in run.arms.items() if method == label]
    return {(site, int(i)) for arm in arms for site in sites if site in arm for i in arm[site].patient}


def _estimate(
    run: Run,
    label: str,
    sites: Sequence[str],
    patients: Iterable[int],
    metric: Metric,
    level: float,
) -> Estimate:
    wanted = np.array(sorted(patients))
    arms = {}
    for key, arm in run.arms.items():
        if key[0] != label:
            continue
        kept = {s: _only(p, wanted) for s, p in arm.items() if s in sites and np.isin(p.patient, wanted).any()}
        if kept:
            arms[key] = kept
    part = sample(replace(run, arms=arms, splits={}), level)
    here = [s for s in part.sites if part.has(label, [s])]
    return part.estimate(label, here, metric, True) if here else Estimate(None, why="not tested in every seed")


def _only(p: Predictions, wanted: np.ndarray) -> Predictions:  # type: ignore[type-arg]
    rows = np.isin(p.patient, wanted)
    score, target = (None if a is None else a[rows] for a in (p.score, p.target))
    return Predictions(p.patient[rows], score, target, {k: v[rows] for k, v in p.cases.items()})
