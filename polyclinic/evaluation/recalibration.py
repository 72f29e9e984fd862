"""Recalibration at every site: one number per site, fitted on that site's validation patients.

A site whose prevalence differs from the others' gets probabilities that are too high or too low by about a constant on
the scale of log odds, and at a threshold of 1/2 many wrong decisions, although the model ranks its patients well. An
intercept per site corrects this (recalibration-in-the-large: Steyerberg, Borsboom, van Houwelingen, Eijkemans and
Habbema, "Validation and updating of predictive logistic regression models", Statistics in Medicine 2004,
https://doi.org/10.1002/sim.1844). A ridge penalty of ``a²/2`` keeps it finite for sites with few validation patients.
The test patients are not used for it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import expit

from polyclinic.evaluation.calibration import log_odds
from polyclinic.evaluation.metric_functions import metrics_for
from polyclinic.evaluation.records.predictions import Predictions, as_cases
from polyclinic.evaluation.records.record_schema import MethodInfo
from polyclinic.evaluation.records.run_reader import Run, training_sites
from polyclinic.evaluation.sample import sample
from polyclinic.statistics.intervals import Estimate
from polyclinic.statistics.multiple_tests import holm
from polyclinic.statistics.paired_tests import Difference
from polyclinic.statistics.undefined import Array

FEWEST = 10
"""Validation patients that a site needs at least."""
METRICS = ("accuracy", "brier", "observed_to_expected")
TESTED = ("accuracy", "brier")
_LABEL = "recalibrated"


@dataclass(frozen=True)
class Recalibration:
    """Results before and after recalibration of each site.

    Attributes:
        before: By site and metric.
        after: By site and metric.
        differences: After minus before by metric, mean over these sites, positive if better, Holm-corrected.
        without: Training sites that have too few validation patients, and their number.
    """

    before: Mapping[str, Mapping[str, Estimate]]
    after: Mapping[str, Mapping[str, Estimate]]
    differences: Mapping[str, Difference]
    without: Mapping[str, int]


def intercept_of(score: Array, target: Array) -> float:
    """Return the a that maximizes the log likelihood of ``logit P(y) = a + logit(score)`` minus ``a²/2`` (Newton).

    Args:
        score: [n], probabilities.
        target: [n], 0 or 1.
    """
    x, a = log_odds(score), 0.0
    for _ in range(50):
        p = expit(a + x)
        step = float((target - p).sum() - a) / float((p * (1 - p)).sum() + 1.0)
        a += float(np.clip(step, -2.0, 2.0))
        if abs(step) < 1e-10:
            break
    return a


def recalibration(run: Run, label: str, level: float, unit: str, min_cell: int = 0) -> Recalibration | None:
    """Return the results of ``label`` before and after recalibration; None if no site can be recalibrated.

    Args:
        run: A run of a task with two classes.
        label: The method.
        level: Confidence level.
        unit: What a case is: ``"patient"`` or ``"image"``.
        min_cell: Sites with fewer test patients are left out.
    """
    seeds = [seed for method, seed in run.arms if method == label]
    if run.info.task != "classification" or any((label, seed) not in run.validation for seed in seeds):
        return None
    patients = {
        site: min(_patients(run.validation[label, s].get(site)) for s in seeds)
        for site in training_sites(run)
        if seeds and all(site in run.arms[label, s] for s in seeds)
    }
    sites = [s for s, n in patients.items() if n >= FEWEST]
    arms: dict[tuple[str, int], Mapping[str, Predictions]] = {}
    for seed in seeds:
        own = {site: run.arms[label, seed][site] for site in sites}
        if any(p.score is None or p.score.shape[1] != 2 for p in own.values()):
            return None
        arms[label, seed] = own
        arms[_LABEL, seed] = {site: _moved(p, run.validation[label, seed][site], unit) for site, p in own.items()}
    if not sites:
        return None
    info = run.info.model_copy(update={"methods": (*run.info.methods, MethodInfo(label=_LABEL))})
    data = sample(replace(run, info=info, arms=arms, splits={}), level, unit)
    sites = [s for s in sites if data.count(s)[0] >= min_cell]
    if not sites:
        return None
    table = metrics_for("classification", 2)
    before, after = (
        {s: {k: data.estimate(m, [s], table[k], True) for k in METRICS} for s in sites} for m in (label, _LABEL)
    )
    differences = {k: data.difference(_LABEL, label, sites, table[k]) for k in TESTED}
    asked = [k for k, d in differences.items() if d.p is not None]
    for k, p in zip(asked, holm([differences[k].p or 0.0 for k in asked]), strict=True):
        differences[k] = replace(differences[k], adjusted=p)
    return Recalibration(before, after, differences, {s: n for s, n in patients.items() if n < FEWEST})


def _patients(p: Predictions | None) -> int:
    return 0 if p is None else len(np.unique(p.patient))


def _moved(p: Predictions, validation: Predictions, unit: str) -> Predictions:
    """Return the predictions with the intercept that the validation patients determine."""
    assert p.score is not None
    cases = as_cases(validation, unit)
    a = intercept_of(cases.score[:, 1], (cases.target == 1).astype(float))
    moved = expit(log_odds(p.score[:, 1]) + a)
    return replace(p, score=np.stack([1 - moved, moved], 1))
