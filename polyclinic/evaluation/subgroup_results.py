"""Results by subgroups of patients, such as sex, age group and scanner, if the data contain these columns.

A group consists of all test patients of the training sites with the same value in a column. Small groups are not shown.
A column is not shown at all if a hidden group could be computed by subtracting the shown groups from the total.

Values and differences are computed within each site and then averaged, so that groups of different sites and different
prevalence are not confused with groups of patients. Sites count by patients; for an AUC, by pairs of a positive and a
negative patient; for a difference, by ``n m / (n + m)`` with n and m patients of the two groups (Cochran's weights).
Differences are from the largest group; limits combine those of the groups at each site (Zou and Donner, Statistics in
Medicine 2008), p follows from them, and Holm's correction is over all differences.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import ndtr

from polyclinic.core import atomic
from polyclinic.evaluation.metric import Metric
from polyclinic.evaluation.own_metrics import metrics_of
from polyclinic.evaluation.records.predictions import Predictions
from polyclinic.evaluation.records.run_reader import Run, training_sites
from polyclinic.evaluation.sample import Sample, sample
from polyclinic.statistics.intervals import Estimate, mean_of_limits, z_of
from polyclinic.statistics.multiple_tests import holm
from polyclinic.statistics.paired_tests import Difference

if TYPE_CHECKING:
    from polyclinic.data import source  # loads PyTorch, which a report does not need

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
    """One group's result within the training sites; ``patients`` counts each once.

    ``difference`` is that from the reference group, positive if this group has better results; None for the reference,
    and for groups that are not shown.
    """

    name: str
    patients: int
    estimate: Estimate
    difference: Difference | None = None


@dataclass(frozen=True)
class Attribute:
    """The groups of a column with their reference, the largest group, or the reason why they are not shown."""

    name: str
    groups: tuple[Group, ...] = ()
    why: str = ""
    reference: str = ""


def groups_of(
    table: "source.Table", numbers: Mapping[str, int], columns: Sequence[str] = ()
) -> dict[str, dict[str, list[int]]]:
    """Return patients' numbers by column and group. A patient with several values in a column is in no group of it.

    Args:
        table: The patients of the data, with their columns.
        numbers: The number of each patient, as in predictions.
        columns: Columns in addition to those in ``SHOWN``.
    """
    found: dict[str, dict[str, list[int]]] = {}
    for column, values in table.columns.items():
        if (column.lower() not in SHOWN and column not in columns) or column in table.sites[:1]:
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


def write_groups(run: Path, table: "source.Table", numbers: Mapping[str, int], columns: Sequence[str] = ()) -> None:
    """Write ``groups.json`` with the patients' numbers, not names, to a run folder, unless no column is known."""
    if found := groups_of(table, numbers, columns):
        atomic.write(run / FILE, json.dumps(found, separators=(",", ":")) + "\n")


def by_group(run: Run, label: str, level: float, fewest: int = FEWEST) -> list[Attribute]:
    """Return the primary metric of ``label`` in each group, on the test patients of the training sites.

    Args:
        fewest: Minimum number of patients of a group that is shown.
    """
    file = run.path / FILE
    if not file.is_file():
        return []
    fewest = max(fewest, FEWEST)
    metric = metrics_of(run.info)[run.info.metric]
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
        parts = {k: _part(run, label, sites, members[k], level) for k, who in tested.items() if len(who) >= fewest}
        reference = max(parts, key=lambda k: (len(tested[k]), k)) if parts else ""
        shown = []
        for name, patients in tested.items():
            if name not in parts:
                shown.append(Group(name, 0, Estimate(None, why=f"not shown: fewer than {fewest} patients")))
                continue
            difference = None
            if name != reference:
                difference = (
                    _difference(parts[name], parts[reference], label, metric)
                    if not patients & tested[reference]
                    else Difference(None, why="the groups have patients in common")
                )
            shown.append(Group(name, len(patients), _within_sites(parts[name], label, metric), difference))
        found.append(Attribute(column, tuple(shown), reference=reference))
    return _corrected(found)


def _corrected(found: Sequence[Attribute]) -> list[Attribute]:
    """Apply Holm's correction over all differences."""
    asked = [g.difference.p for a in found for g in a.groups if g.difference and g.difference.p is not None]
    adjusted = iter(holm(asked))
    return [
        replace(
            a,
            groups=tuple(
                replace(g, difference=replace(g.difference, adjusted=next(adjusted)))
                if g.difference and g.difference.p is not None
                else g
                for g in a.groups
            ),
        )
        for a in found
    ]


def _tested(run: Run, label: str, sites: Sequence[str]) -> set[tuple[str, int]]:
    arms = [arm for (method, _), arm in run.arms.items() if method == label]
    return {(site, int(i)) for arm in arms for site in sites if site in arm for i in arm[site].patient}


def _part(run: Run, label: str, sites: Sequence[str], patients: Iterable[int], level: float) -> Sample:
    """Return the test cases of a group."""
    wanted = np.array(sorted(patients))
    arms = {}
    for key, arm in run.arms.items():
        if key[0] != label:
            continue
        kept = {s: _only(p, wanted) for s, p in arm.items() if s in sites and np.isin(p.patient, wanted).any()}
        if kept:
            arms[key] = kept
    return sample(replace(run, arms=arms, splits={}), level)


def _at_sites(part: Sample, label: str, metric: Metric) -> dict[str, Estimate]:
    """Return the group's estimate at each site where it has a value and an interval in every seed."""
    each = {s: part.estimate(label, [s], metric, True) for s in part.sites if part.has(label, [s])}
    return {s: e for s, e in each.items() if e.value is not None and e.low is not None}


def _within_sites(part: Sample, label: str, metric: Metric) -> Estimate:
    """Return the mean over sites, weighted by patients, for an AUC by pairs of a positive and a negative patient."""
    each = _at_sites(part, label, metric)
    if not each:
        here = [s for s in part.sites if part.has(label, [s])]
        return part.macro_estimate(label, here, metric) if here else Estimate(None, why="not tested in every seed")
    weights = np.array([_weight(part, label, s, metric) for s in each])
    weights = weights / weights.sum()
    value = float(weights @ np.array([e.value for e in each.values()]))
    n = sum(e.n for e in each.values())
    how = f"limits of the sites combined ({next(iter(each.values())).how})"
    left = tuple(s for s in part.sites if s not in each)
    return Estimate(value, *mean_of_limits(list(each.values()), weights.tolist()), n, how, without=left)


def _weight(part: Sample, label: str, site: str, metric: Metric) -> float:
    target = part.cases[label, part.seeds(label)[0]][site].target
    if metric.name == "auc" and target.ndim == 1 and len(np.unique(target)) == 2:
        return float(np.prod(np.unique(target, return_counts=True)[1]))
    return float(len(target))


def _difference(part: Sample, reference: Sample, label: str, metric: Metric) -> Difference:
    """Return the mean over sites of the difference between two groups of different patients, positive if better."""
    ours, theirs = (_at_sites(p, label, metric) for p in (part, reference))
    both = [s for s in ours if s in theirs]
    if not both:
        return Difference(None, why="no site has an interval for both groups")
    weights = np.array([ours[s].n * theirs[s].n / (ours[s].n + theirs[s].n) for s in both])
    signed = metric.sign * weights / weights.sum()
    estimates = [e for s in both for e in (ours[s], theirs[s])]
    both_weights = [float(w) for weight in signed for w in (weight, -weight)]
    value = float(np.dot(both_weights, [e.value or 0.0 for e in estimates]))
    low, high = mean_of_limits(estimates, both_weights)
    toward_zero = value - low if value > 0 else high - value
    z = abs(value) / (toward_zero / z_of(part.level)) if toward_zero > 0 else 0.0
    n = sum(ours[s].n + theirs[s].n for s in both)
    return Difference(value, low, high, 2 * float(ndtr(-z)), None, n, "limits of groups and sites combined")


def _only(p: Predictions, wanted: np.ndarray) -> Predictions:  # type: ignore[type-arg]
    rows = np.isin(p.patient, wanted)
    score, target = (None if a is None else a[rows] for a in (p.score, p.target))
    return Predictions(p.patient[rows], score, target, {k: v[rows] for k, v in p.cases.items()})
