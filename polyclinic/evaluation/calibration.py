"""Calibration of predicted probabilities, and thresholds.

Calibration error: the root mean squared error over ten bins of equal width, without the bias that sampling adds to it
(Kumar, Liang and Ma, "Verified Uncertainty Calibration", NeurIPS 2019, https://arxiv.org/abs/1909.10155, the debiased
estimator of section 4; there the bins have equal mass). The usual expected calibration error of a perfectly calibrated
model is about 0.08 with 170 patients. Observed/expected: the number of positives divided by the sum of their
predicted probabilities (Debray and others, BMJ 2017, https://doi.org/10.1136/bmj.i6460). Slope and intercept: Van
Calster, McLernon, van Smeden, Wynants and Steyerberg, "Calibration: the Achilles heel of predictive analytics", BMC
Medicine 2019, https://doi.org/10.1186/s12916-019-1466-7.

For two classes the calibration error compares the probability of the second class with its frequency; for more
classes, the probability of the most probable class with the frequency of its being correct.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from polyclinic.evaluation.metric import Metric
from polyclinic.statistics.undefined import Array, Ints, Undefined

BINS = 10
TINY = 1e-6


@dataclass(frozen=True)
class Bin:
    """One point of a reliability plot: mean predicted probability and observed frequency among ``n`` cases."""

    low: float
    high: float
    predicted: float
    observed: float
    n: int


def claims_of(score: Array, target: NDArray[Any]) -> tuple[Array, Array]:
    """Return the probabilities that are evaluated, and the outcomes as 0 or 1. Each of shape [claims]."""
    if target.ndim == 2:
        return score.ravel(), np.asarray(target, float).ravel()
    if score.shape[1] == 2:
        return score[:, 1], (target == 1).astype(float)
    return score.max(1), (score.argmax(1) == target).astype(float)


def reliability(score: Array, target: NDArray[Any], bins: int = BINS) -> list[Bin]:
    """Return the points of a reliability plot, without empty bins."""
    claimed, outcome = claims_of(score, target)
    index = _bin_of(claimed, bins)
    return [
        Bin(k / bins, (k + 1) / bins, float(claimed[index == k].mean()), float(outcome[index == k].mean()), int(n))
        for k, n in enumerate(np.bincount(index, minlength=bins))
        if n
    ]


def _bin_of(claimed: Array, bins: int) -> NDArray[np.int64]:
    return np.clip((claimed * bins).astype(np.int64), 0, bins - 1)


def _calibration_error(score: Array, target: NDArray[Any], weight: Array) -> Array:
    # √ max(0, Σ_b n_b/n [(p̄_b − ȳ_b)² − ȳ_b (1 − ȳ_b) / (n_b − 1)]); a bin with a single claim counts as 0
    claimed, outcome = claims_of(score, target)
    each = weight if target.ndim == 1 else np.repeat(weight, target.shape[1], axis=1)
    bins = (_bin_of(claimed, BINS)[:, None] == np.arange(BINS)).astype(float)
    n, hits = each @ bins, each @ (outcome[:, None] * bins)
    with np.errstate(divide="ignore", invalid="ignore"):
        observed, gap = hits / n, each @ ((claimed - outcome)[:, None] * bins) / n
        squares = n * (gap**2 - observed * (1 - observed) / (n - 1))
    total = np.where(n > 1, squares, 0.0).sum(1) / each.sum(1)
    return np.asarray(np.sqrt(np.maximum(total, 0.0)))


def _observed_to_expected(score: Array, target: NDArray[Any], weight: Array) -> Array:
    claimed, outcome = claims_of(score, target)
    with np.errstate(invalid="ignore"):  # no case has weight
        return np.asarray((weight @ outcome) / (weight @ np.clip(claimed, TINY, None)))


def logistic_fit(x: Array, y: Array, weight: Array, slope: bool = True) -> tuple[Array, Array]:
    """Fit logit P(y) = a + b·x by maximum likelihood with Newton's method, for each row of ``weight``.

    Args:
        x: [n], the predicted log odds.
        y: [n], 0 or 1.
        weight: [b, n].
        slope: Whether b is estimated; otherwise it is 1, and a is the calibration-in-the-large.

    Returns:
        a and b, of shape [rows]; NaN if no finite maximum exists (one class, or classes that x separates).
    """
    rows, here = len(weight), weight > 0
    a, b = np.zeros(rows), np.zeros(rows) if slope else np.ones(rows)
    leader = _leaders(here)
    first = np.unique(leader)
    if len(first) < rows:  # the jackknife's rows hardly differ from the first, so that its result is a close start
        starts = np.zeros(rows), np.zeros(rows)
        starts[0][first], starts[1][first] = logistic_fit(x, y, weight[first], slope)
        known = np.isfinite(starts[0][leader]) & np.isfinite(starts[1][leader])
        a, b = np.where(known, starts[0][leader], a), np.where(known, starts[1][leader], b)
    separated = _separated(x, y, here) if slope else np.zeros(rows, bool)
    present = ((weight @ y) > 0) & ((weight @ (1 - y)) > 0)
    live, size = present & ~separated, np.zeros(rows)
    row, case = np.nonzero(here & live[:, None])
    w, xs, ys = weight[row, case], x[case], y[case]
    for _ in range(50):
        p = expit(a[row] + b[row] * xs)
        gradient, curvature = w * (ys - p), w * (p * (1 - p)) + 1e-12
        ga, haa = (np.bincount(row, v, rows) for v in (gradient, curvature))
        if slope:
            gb, hab, hbb = (np.bincount(row, v, rows) for v in (gradient * xs, curvature * xs, curvature * xs * xs))
            det = np.maximum(haa * hbb - hab**2, 1e-12)
            da, db = (hbb * ga - hab * gb) / det, (haa * gb - hab * ga) / det
        else:
            da, db = ga / np.maximum(haa, 1e-12), np.zeros(rows)
        size = np.where(live, np.maximum(np.abs(da), np.abs(db)), size)
        short = live * np.minimum(1.0, 2.0 / np.maximum(size, 1e-12))  # no step longer than 2
        a, b = a + short * da, b + short * db
        live &= size >= 1e-7  # the error is of the order of its square
        if not live.any():
            break
        if 2 * np.count_nonzero(left := live[row]) < len(row):
            row, w, xs, ys = row[left], w[left], xs[left], ys[left]
    failed = ~present | separated | (size > 1e-4)
    return np.where(failed, np.nan, a), np.where(failed, np.nan, b)


def _leaders(here: NDArray[np.bool_]) -> Ints:
    """Return for each row [b, n] of cases that are present the first row that has all of these cases."""
    leader = np.full(len(here), -1)
    while (rest := leader < 0).any():
        one = int(np.argmax(rest))
        leader[rest & ~(here & ~here[one]).any(1)] = one
    return leader


def _separated(x: Array, y: Array, here: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return for each row whether a threshold of x separates the classes, so that the slope has no finite estimate."""
    pos, neg = here & (y == 1), here & (y == 0)
    low, high = np.where(pos, x, np.inf).min(1), np.where(pos, x, -np.inf).max(1)
    return np.asarray((np.where(neg, x, -np.inf).max(1) <= low) | (np.where(neg, x, np.inf).min(1) >= high))


def log_odds(p: Array) -> Array:
    """Return ``log(p / (1 − p))``, with p limited to 10⁻⁶ … 1 − 10⁻⁶."""
    p = np.clip(p, TINY, 1 - TINY)
    return np.log(p / (1 - p))


def _slope(score: Array, target: NDArray[Any], weight: Array) -> Array:
    claimed, outcome = claims_of(score, target)
    return logistic_fit(log_odds(claimed), outcome, weight)[1]


def _intercept(score: Array, target: NDArray[Any], weight: Array) -> Array:
    claimed, outcome = claims_of(score, target)
    return logistic_fit(log_odds(claimed), outcome, weight, slope=False)[0]


CALIBRATION: Mapping[str, Metric] = {
    m.name: m
    for m in (
        Metric(
            "calibration_error",
            "Calibration error (RMS, debiased)",
            _calibration_error,
            higher_is_better=False,
            has_interval=False,
            by_case="always",
        ),
        Metric(
            "observed_to_expected",
            "Observed / expected",
            _observed_to_expected,
            higher_is_better=None,
            scale="log",
            by_class=True,
            by_case="always",
        ),
        Metric(
            "calibration_slope",
            "Calibration slope",
            _slope,
            None,
            needs_two_classes=True,
            by_class=True,
            by_case="two classes",
        ),
        Metric(
            "calibration_intercept",
            "Calibration intercept",
            _intercept,
            None,
            needs_two_classes=True,
            by_class=True,
            by_case="two classes",
        ),
    )
}


def threshold_at(score: Array, positive: NDArray[Any], sensitivity: float) -> float:
    """Return the highest threshold t such that at least ``sensitivity`` of the positives have a score of at least t.

    Raises:
        Undefined: If there are no positives.
    """
    mine = np.sort(score[np.asarray(positive).astype(bool)])[::-1]
    if len(mine) == 0:
        raise Undefined("no positive case to choose a threshold on")
    return float(mine[max(int(np.ceil(sensitivity * len(mine) - 1e-9)), 1) - 1])
