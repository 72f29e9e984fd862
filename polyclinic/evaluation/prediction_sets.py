"""Conformal prediction sets: for each patient the classes that the model does not exclude, and their coverage by site.

Split conformal prediction with the score ``1 − p(true class)`` (Sadinle, Lei and Wasserman, "Least Ambiguous Set-Valued
Classifiers With Bounded Error Levels", JASA 2019, https://doi.org/10.1080/01621459.2017.1395341). Its threshold is the
``⌈(n + 1)(1 − α)⌉``-th smallest score of n validation patients. The coverage of 1 − α holds for patients that are
exchangeable with these: with the validation patients of all training sites together it holds on average and not at
each site (Lu, Yu, Karimireddy, Jordan and Raskar, "Federated Conformal Predictors for Distributed Uncertainty
Quantification", ICML 2023, https://arxiv.org/abs/2305.17564), with a site's own ones it holds there. The tested round
was selected on the same validation patients, so that the coverage can be slightly lower than stated.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from polyclinic.evaluation.operating_points import share_of_patients
from polyclinic.evaluation.records.predictions import Cases, as_cases
from polyclinic.evaluation.records.run_reader import Run, training_sites
from polyclinic.statistics.intervals import Estimate
from polyclinic.statistics.undefined import Array


@dataclass(frozen=True)
class SiteSets:
    """The prediction sets at one site, mean over seeds.

    Attributes:
        coverage: Fraction of patients whose set contains their class.
        size: Mean number of classes in a set.
        single: Fraction of sets with exactly one class.
    """

    coverage: Estimate
    size: float
    single: float


@dataclass(frozen=True)
class PredictionSets:
    """Prediction sets with a stated coverage.

    Attributes:
        stated: The stated coverage.
        common: By site, with one threshold of all training sites' validation patients.
        own: By training site, with the site's own threshold, if it has enough validation patients for a finite one.
        needed: Number of validation patients that a finite threshold needs.
    """

    stated: float
    common: Mapping[str, SiteSets]
    own: Mapping[str, SiteSets]
    needed: int


def threshold_of(scores: Array, stated: float) -> float:
    """Return the conformal threshold of validation scores [n]; infinite if n is too small."""
    k = int(np.ceil((len(scores) + 1) * stated - 1e-9))
    return float(np.sort(scores)[k - 1]) if k <= len(scores) else float("inf")


def prediction_sets(
    run: Run, label: str, sites: Sequence[str], unit: str, stated: float = 0.9, level: float = 0.95, shared: bool = True
) -> PredictionSets | None:
    """Return the prediction sets of ``label`` at ``sites``; None without validation predictions of every seed.

    Args:
        run: A run of a classification task.
        label: The method.
        sites: The tested sites.
        unit: What a case is: ``"patient"`` or ``"image"``.
        stated: The stated coverage.
        level: Confidence level of the coverage.
        shared: Whether a patient has the same number in every seed.
    """
    seeds = [seed for method, seed in run.arms if method == label]
    if run.info.task != "classification" or not seeds or any(not run.validation.get((label, s)) for s in seeds):
        return None  # validation patients of folds are test patients of others, and are therefore not read
    training = training_sites(run)
    kept = [{s: p for s, p in run.validation[label, seed].items() if s in training} for seed in seeds]
    validation = [{s: as_cases(p, unit) for s, p in arm.items()} for arm in kept]
    arms = [run.arms[label, seed] for seed in seeds]
    tested = [{s: as_cases(arm[s], unit) for s in sites if s in arm} for arm in arms]
    needed = int(np.ceil(stated / (1 - stated) - 1e-9))
    common, own = dict[str, SiteSets](), dict[str, SiteSets]()
    together = [threshold_of(np.concatenate([_excluded(c) for c in cases.values()]), stated) for cases in validation]
    for site in sites:
        if not all(site in t for t in tested):
            continue
        here = [t[site] for t in tested]
        common[site] = _sets(here, together, level, shared)
        if all(site in v and len(v[site].target) >= needed for v in validation):
            own[site] = _sets(here, [threshold_of(_excluded(v[site]), stated) for v in validation], level, shared)
    return PredictionSets(stated, common, own, needed)


def _excluded(cases: Cases) -> Array:
    """Return 1 minus the probability of the true class. [n]"""
    return np.asarray(1 - cases.score[np.arange(len(cases.target)), cases.target.astype(int)])


def _sets(tested: Sequence[Cases], thresholds: Sequence[float], level: float, shared: bool) -> SiteSets:
    inside = [1 - c.score <= q + 1e-12 for c, q in zip(tested, thresholds, strict=True)]
    hits = [(_excluded(c) <= q + 1e-12).astype(float) for c, q in zip(tested, thresholds, strict=True)]
    coverage = share_of_patients(hits, [c.patient[:, None].astype(float) for c in tested], level, shared)
    sizes = np.concatenate([x.sum(1) for x in inside])
    return SiteSets(coverage, float(sizes.mean()), float((sizes == 1).mean()))
