"""ROC and precision-recall curves, and confusion matrices, as means over sites.

A curve is averaged at fixed positions of its horizontal axis (vertical averaging: Fawcett, "An introduction to ROC
analysis", Pattern Recognition Letters 2006, section 8.1, https://doi.org/10.1016/j.patrec.2005.10.010), first over the
seeds of a site and then over sites, like all other results. The area under the mean ROC curve is the mean AUC, and that
under the mean precision-recall curve the mean average precision.

Between two points a ROC curve is a straight line, so that ties count half. The precision at a recall is that at the
highest threshold which reaches it; points are not joined by straight lines, which would be too optimistic (Davis and
Goadrich, "The relationship between precision-recall and ROC curves", ICML 2006,
https://doi.org/10.1145/1143844.1143874).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from polyclinic.statistics.auc import sums_by_score
from polyclinic.statistics.undefined import Array, Ints

POSITIONS: Array = np.linspace(0, 1, 101)
"""The positions at which curves are averaged."""


@dataclass(frozen=True)
class MeanCurve:
    """A curve at ``POSITIONS``, the area under it, and the number of sites of which they are the mean."""

    values: Array
    area: float
    sites: int


@dataclass(frozen=True)
class Curve:
    """A curve of one model at one site, and the exact area under it."""

    values: Array
    area: float


def roc_curve(score: Array, positive: Array) -> Curve | None:
    """Return the sensitivity at each false-positive rate; None if a class is missing.

    Args:
        score: [cases].
        positive: [cases], 0 or 1.
    """
    pos, neg = _falling(score, positive)
    if not pos.sum() or not neg.sum():
        return None
    x, y = (np.r_[0.0, np.cumsum(counts) / counts.sum()] for counts in (neg, pos))
    return Curve(_upper(x, y), float(np.trapezoid(y, x)))


def precision_curve(score: Array, positive: Array) -> Curve | None:
    """Return the precision at each recall, and the average precision; None without positives.

    At a recall of 0 it is the precision at the highest score of all.
    """
    pos, neg = _falling(score, positive)
    if not pos.sum():
        return None
    hits, calls = np.cumsum(pos), np.cumsum(pos + neg)
    reached = np.searchsorted(hits / hits[-1], POSITIONS - 1e-12)
    values = (hits / calls)[np.minimum(reached, len(hits) - 1)]
    return Curve(np.asarray(values), float((pos * hits / calls).sum() / hits[-1]))


def mean_curve(by_site: Sequence[Sequence[Curve | None]]) -> MeanCurve | None:
    """Return the mean over sites of the means over seeds; None if no site has a curve.

    Args:
        by_site: The curve of each seed, for each site.
    """
    known = [[curve for curve in seeds if curve is not None] for seeds in by_site]
    means = [(np.mean([c.values for c in seeds], 0), np.mean([c.area for c in seeds])) for seeds in known if seeds]
    if not means:
        return None
    return MeanCurve(np.mean([v for v, _ in means], axis=0), float(np.mean([a for _, a in means])), len(means))


def confusion(predicted: Ints, target: Ints, classes: int) -> Ints:
    """Return the number of cases of each true class (row) that were predicted as each class (column)."""
    flat = np.asarray(target, np.int64) * classes + np.asarray(predicted, np.int64)
    return np.bincount(flat, minlength=classes**2).reshape(classes, classes).astype(np.int64)


def _falling(score: Array, positive: Array) -> tuple[Array, Array]:
    """Return the numbers of positives and negatives at each score, the highest first."""
    pos, neg = sums_by_score(np.asarray(score, float), np.asarray(positive), np.ones((1, len(score))))
    return pos[0, ::-1], neg[0, ::-1]


def _upper(x: Array, y: Array) -> Array:
    """Return ``y`` at ``POSITIONS``, of which a vertical part of the curve counts with its upper end."""
    right = np.searchsorted(x, POSITIONS + 1e-12, side="right")
    before = right - 1
    after = np.minimum(right, len(x) - 1)
    step = x[after] - x[before]
    with np.errstate(invalid="ignore", divide="ignore"):
        part = np.where(step > 0, (POSITIONS - x[before]) / step, 0.0)
    return np.asarray(y[before] + np.clip(part, 0, 1) * (y[after] - y[before]))
