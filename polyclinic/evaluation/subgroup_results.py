"""Results by who the patients are and how they were scanned: sex, age, scanner, where the data say so.

A group is all test patients of the training sites of whom a column says the same. Small groups are not shown, and
neither is an attribute where what is hidden could be found by taking the shown groups from the whole. Groups are
looked at, not compared: their differences are not tested, and there are as many as there are columns.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from polyclinic.core import atomic
from polyclinic.data.source import Table
from polyclinic.evaluation.bootstrap import sample
from polyclinic.evaluation.intervals import Estimate
from polyclinic.evaluation.metric_functions import Metric, metrics_for
from polyclinic.evaluation.records.predictions import Predictions
from polyclinic.evaluation.records.run_reader import Run, training_sites

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
"""Columns that results are shown by, whatever their letters' case. A column that names the sites is none of them."""
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
    """A column's groups, or in words why they are not shown."""

    name: str
    groups: tuple[Group, ...] = ()
    why: str = ""


def groups_of(table: Table, numbers: Mapping[str, int]) -> dict[str, dict[str, list[int]]]:
    """Patients' numbers by column and group. A patient of whom a column says several things is in none of its groups.

    Args:
        table: Who is in the data.
        numbers: The number of each patient, as in predictions.
    """
    found: dict[str, dict[str, list[int]]] = {}
    for column, values in table.columns.items():
        if column.lower() not in SHOWN or column in table.sites[:1]:
            continue
        said: dict[str, set[str]] = {}
        for patient, value in zip(table.patients, values, strict=True):
            said.setdefault(patient, set()).add(value.strip())
        groups: dict[str, list[int]] = {}
        for patient, names in sorted(said.items()):
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
    """Writes ``groups.json`` into a run folder; nothing where no column is known. It holds numbers, no names."""
    if found := groups_of(table, numbers):
        atomic.write(run / FILE, json.dumps(found, separators=(",", ":")) + "\n")


def by_group(run: Run, label: str, draws: int, seed: int, level: float, fewest: int = FEWEST) -> list[Attribute]:
    """The primary metric of ``label`` in every group, on test patients of the training sites, pooled.

    Args:
        fewest: Patients below which a group is not shown.
    """
    file = run.path / FILE
    if not file.is_file():
        return []
    fewest = max(fewest, FEWEST)
    metric = metrics_for(run.info.task, len(run.info.classes) or 2)[run.info.metric]
    sites, found = training_sites(run), list[Attribute]()
    everybody = _tested(run, label, sites)  # by site and number: some runs count anew at every site
    for column, groups in json.loads(file.read_text(encoding="utf-8")).items():
        members = {name: set(patients) for name, patients in groups.items()}
        tested = {name: {who for who in everybody if who[1] in mine} for name, mine in members.items()}
        tested = {name: patients for name, patients in tested.items() if patients}
        known = set[tuple[str, int]]().union(*tested.values())
        small = [patients for patients in tested.values() if len(patients) < fewest]
        apart = [*small, everybody - known] if small else []  # what a subtraction would tell of together
        if len(tested) < 2:
            continue
        if small and sum(map(len, apart)) < fewest:
            found.append(Attribute(column, why=f"not shown: a group of fewer than {fewest} patients could be told"))
            continue
        shown = []
        for name, patients in tested.items():
            if len(patients) < fewest:
                estimate = Estimate(None, why=f"not shown: fewer than {fewest} patients")
                shown.append(Group(name, 0, estimate))
            else:
                estimate = _estimate(run, label, sites, members[name], metric, draws, seed, level)
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
    draws: int,
    seed: int,
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
    part = sample(replace(run, arms=arms, splits={}), draws, seed, level)
    here = [s for s in part.sites if part.has(label, [s])]
    return part.estimate(label, here, metric, True) if here else Estimate(None, why="not tested in every seed")


def _only(p: Predictions, wanted: np.ndarray) -> Predictions:  # type: ignore[type-arg]
    rows = np.isin(p.patient, wanted)
    score, target = (None if a is None else a[rows] for a in (p.score, p.target))
    return Predictions(p.patient[rows], score, target, {k: v[rows] for k, v in p.cases.items()})
