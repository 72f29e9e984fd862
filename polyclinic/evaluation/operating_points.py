"""Sensitivity and specificity at thresholds that are chosen on validation patients, separately for each seed.

A threshold belongs to one model. It is chosen on the validation patients of the same seed, because a validation patient
of one seed may be a test patient of another. Sensitivity and specificity are means over seeds; their intervals are
Clopper and Pearson's, in which a patient who is tested in several seeds counts once, and hold for these thresholds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from polyclinic.evaluation.calibration import threshold_at
from polyclinic.evaluation.records.predictions import Cases, Predictions, as_cases
from polyclinic.evaluation.records.run_reader import Run, training_sites
from polyclinic.statistics.intervals import Estimate, effective_number, proportion
from polyclinic.statistics.undefined import Array, Undefined


@dataclass(frozen=True)
class OperatingPoint:
    """Performance at a required sensitivity.

    Attributes:
        wanted: The sensitivity that each threshold has on validation patients, at least.
        thresholds: The threshold of each seed's model.
        sensitivity: On test patients, mean over seeds.
        specificity: On test patients, mean over seeds.
    """

    wanted: float
    thresholds: tuple[float, ...]
    sensitivity: Estimate
    specificity: Estimate


def operating_point(
    run: Run, label: str, sites: Sequence[str], unit: str, wanted: float, level: float = 0.95, shared: bool = True
) -> OperatingPoint:
    """Return the performance of ``label`` on the test patients of ``sites``.

    Args:
        run: A run of a task with two classes.
        label: The method.
        sites: The tested sites.
        unit: What a case is: ``"patient"`` or ``"image"``.
        wanted: The required sensitivity.
        level: Confidence level.
        shared: Whether a patient has the same number in every seed.

    Raises:
        Undefined: If a seed has no validation predictions, or no positive validation patient.
    """
    training, thresholds, tested = training_sites(run), list[float](), list[list[Cases]]()
    for seed in [s for m, s in run.arms if m == label]:
        validation = _cases(run.validation.get((label, seed), {}), training, unit)
        if not validation:
            raise Undefined(f"seed {seed} has no validation predictions")
        score, target = (np.concatenate([getattr(c, k) for c in validation]) for k in ("score", "target"))
        thresholds.append(threshold_at(score[:, 1], target == 1, wanted))
        tested.append(_cases(run.arms[label, seed], sites, unit))
    rates = [_rate(tested, thresholds, positive, level, shared) for positive in (True, False)]
    return OperatingPoint(wanted, tuple(thresholds), *rates)


def _cases(predictions: Mapping[str, Predictions], sites: Sequence[str], unit: str) -> list[Cases]:
    return [as_cases(predictions[s], unit) for s in sites if s in predictions]


def _rate(
    tested: Sequence[Sequence[Cases]], thresholds: Sequence[float], positive: bool, level: float, shared: bool
) -> Estimate:
    """Return the fraction of cases of one class that the thresholds classify correctly."""
    hits, names = list[Array](), list[Array]()
    for cases, threshold in zip(tested, thresholds, strict=True):
        right, of = list[Array](), list[Array]()
        for site, c in enumerate(cases):
            mine = c.target == int(positive)
            right.append(((c.score[mine, 1] >= threshold) == positive).astype(float))
            of.append(np.column_stack([np.full(int(mine.sum()), site), c.patient[mine]]))
        if sum(map(len, right)):
            hits.append(np.concatenate(right))
            names.append(np.concatenate(of))
    return share_of_patients(hits, names, level, shared) if hits else Estimate(None, why="no test case of this class")


def share_of_patients(hits: Sequence[Array], names: Sequence[Array], level: float, shared: bool) -> Estimate:
    """Return the mean over seeds of a proportion, with Clopper and Pearson's interval, in which a patient counts once.

    Args:
        hits: For each seed, 1 or 0 for every case. [cases]
        names: For each seed, what identifies the patient of every case. [cases, k]
        level: Confidence level.
        shared: Whether a patient has the same name in every seed.
    """
    ids = [np.unique(p, axis=0, return_counts=True) for p in (np.concatenate(names), *names)]
    n = effective_number(ids[0][1]) if shared else max(effective_number(counts) for _, counts in ids[1:])
    share = float(np.mean([h.mean() for h in hits]))
    return Estimate(share, *proportion(share, n, level), max(len(who) for who, _ in ids[1:]), "Clopper-Pearson")
