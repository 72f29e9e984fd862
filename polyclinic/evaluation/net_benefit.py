"""Decision curves: the net benefit of acting on a model's predictions, with intervals, by site.

Vickers and Elkin, "Decision Curve Analysis", Medical Decision Making 2006, https://doi.org/10.1177/0272989X06295361.
The net benefit of one patient at threshold t is 1 for a treated patient with the disease, ``−t / (1 − t)`` for one
without, and 0 if untreated. It is a mean over patients, so that its interval is Student's with the jackknife's
variance, like that of any other metric; all thresholds are computed at once. Curves are computed for each seed's model
and averaged, and are means over sites, because the prevalence of pooled patients is that of no hospital.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyclinic.evaluation.sample import STUDENT, Sample
from polyclinic.statistics.intervals import Estimate, student
from polyclinic.statistics.jackknife import Spread, column_spreads, mean_of_columns
from polyclinic.statistics.undefined import Array, Undefined

THRESHOLDS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class NetBenefit:
    """Net benefit per patient at one threshold, mean over sites.

    Attributes:
        threshold: The threshold probability.
        model: Of treating the patients whose predicted probability is at least the threshold.
        treat_all: Of treating all patients.
        gain: Of the model, minus the better of treating all and treating none at each site.
    """

    threshold: float
    model: Estimate
    treat_all: Estimate
    gain: Estimate


def decision_curve(
    data: Sample, label: str, sites: Sequence[str], thresholds: Sequence[float] = THRESHOLDS
) -> tuple[NetBenefit, ...]:
    """Return the decision curve of ``label``, mean over ``sites``, for a task with two classes."""
    each = [_without_each(data, label, site, np.asarray(thresholds, float)) for site in sites]
    values = np.mean([np.mean([rows[0] for rows in groups], axis=0) for groups in each], axis=0)
    patients = sum(max(len(data.patients[site, seed]) for seed in data.seeds(label)) for site in sites)
    try:
        variances, df = zip(*(_spreads(groups) for groups in each), strict=True)
        spreads = mean_of_columns(np.array(variances), np.array(df))
        estimates = [
            _estimate(float(value), spread, patients, data.level) for value, spread in zip(values, spreads, strict=True)
        ]
    except Undefined as reason:
        estimates = [Estimate(float(value), n=patients, why=f"no interval: {reason}") for value in values]
    width = len(thresholds)
    return tuple(NetBenefit(t, *estimates[k::width]) for k, t in enumerate(thresholds))


def benefits(score: Array, target: NDArray[Any], thresholds: Array) -> tuple[Array, Array]:
    """Return the net benefit of each case: by the model, and of treating all. Each of shape [n, thresholds]."""
    treated = np.where(target[:, None] == 1, 1.0, -thresholds / (1 - thresholds))
    return treated * (score[:, 1:2] >= thresholds), treated


def _without_each(data: Sample, label: str, site: str, thresholds: Array) -> list[Array]:
    """Return the means at a site, of all patients and without each, for each group of seeds with common patients.

    Each of shape [1 + patients, 3 · thresholds]: of the model, of treating all, and of the gain.
    """
    found = []
    for seeds in data.groups(data.seeds(label)):
        rows = []
        for seed in seeds:
            cases = data.cases[label, seed][site]
            each = np.concatenate(benefits(cases.score, cases.target, thresholds), axis=1)
            model, treat_all = np.split(data.means_without_each(label, seed, site, each), 2, axis=1)
            rows.append(np.concatenate([model, treat_all, model - np.maximum(treat_all, 0.0)], axis=1))
        found.append(np.mean(rows, axis=0))
    return found


def _spreads(groups: Sequence[Array]) -> tuple[Array, float]:
    """Return the variances of the mean over ``groups`` of each column, and their degrees of freedom.

    The dependence of the groups is unknown, so these are bounds (see ``mean_of_dependent``).
    """
    variances, df = zip(*(column_spreads(rows[0], rows[1:]) for rows in groups), strict=True)
    return variances[0] if len(groups) == 1 else np.mean(np.sqrt(variances), axis=0) ** 2, min(df)


def _estimate(value: float, spread: Spread, patients: int, level: float) -> Estimate:
    if spread.variance <= 1e-14:
        return Estimate(value, n=patients, why=f"no interval: no variance among {patients} patients")
    return Estimate(value, *student(value, spread, "", level), patients, STUDENT)
