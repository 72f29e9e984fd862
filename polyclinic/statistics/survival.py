"""Statistics of times to an event of which some are censored: survival curves, concordance, and Brier scores.

A case has a time and an event: 1 if the event happened then, 0 if the case was last seen then without it (censored).
Every function takes weights [b, n], so that one definition serves values and jackknife variances.

- Survival curve: Kaplan and Meier, "Nonparametric Estimation from Incomplete Observations", Journal of the American
  Statistical Association 1958, https://doi.org/10.1080/01621459.1958.10501452; limits by Greenwood's variance on the
  scale of log(−log S) (Kalbfleisch and Prentice, "The Statistical Analysis of Failure Time Data", 2002, section 1.4).
- Concordance C: Harrell, Lee and Mark, "Multivariable prognostic models", Statistics in Medicine 1996,
  https://doi.org/10.1002/(SICI)1097-0258(19960229)15:4<361::AID-SIM168>3.0.CO;2-4. Ties of predictions count half. At
  equal times an event precedes a censoring, and two events are not compared.
- Concordance weighted by the inverse probability of censoring: Uno, Cai, Pencina, D'Agostino and Wei, "On the
  C-statistics for evaluating overall adequacy of risk prediction procedures with censored survival data", Statistics in
  Medicine 2011, https://doi.org/10.1002/sim.4154.
- Brier score of survival: Graf, Schmoor, Sauerbrei and Schumacher, "Assessment and comparison of prognostic
  classification schemes for survival data", Statistics in Medicine 1999,
  https://doi.org/10.1002/(SICI)1097-0258(19990915/30)18:17/18<2529::AID-SIM274>3.0.CO;2-5.

The censoring distribution G is estimated from the same cases, and an event at t is weighted by 1/G(t−), the probability
of being observed just before it.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from polyclinic.statistics.undefined import Array, Ints

ROWS = 256
"""Number of cases that are compared with all others at once."""


def survival_curve(time: Array, event: Array, weight: Array, at: Array) -> Array:
    """Return Kaplan and Meier's estimate of the probability of surviving beyond each time ``at``.

    Args:
        time: [n], positive.
        event: [n], 0 or 1.
        weight: [b, n].
        at: [m].

    Returns:
        [b, m]; NaN after the last observation, unless the curve has reached 0.
    """
    steps, curve, present = _product_limit(time, event, weight)
    found = _at(curve, np.searchsorted(steps, at, side="right"))
    last = np.where(present, steps, -np.inf).max(1, initial=-np.inf)
    return np.where((at[None] <= last[:, None]) | (found <= 0), found, np.nan)


def curve_limits(time: Array, event: Array, at: Array, level: float = 0.95) -> tuple[Array, Array, Array]:
    """Return Kaplan and Meier's estimate at each time ``at`` with its limits; NaN where it is not determined. [m]"""
    one = np.ones((1, len(time)))
    value = survival_curve(time, event, one, at)[0]
    steps, deaths, at_risk = _counts(time, event, one)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(at_risk > deaths, deaths / (at_risk * (at_risk - deaths)), np.nan)[0]
        total = np.concatenate([[0.0], np.cumsum(terms)])[np.searchsorted(steps, at, side="right")]
        # Var log(−log S) = Σ d / (n (n − d)) / (log S)²
        spread = float(ndtri(0.5 + level / 2)) * np.sqrt(total) / np.log(value)
        low, high = value ** np.exp(-spread), value ** np.exp(spread)
    sure = value == 1  # no event so far: no limits
    return value, np.where(sure, np.nan, np.minimum(low, high)), np.where(sure, np.nan, np.maximum(low, high))


def at_risk(time: Array, at: Array) -> Array:
    """Return the number of cases that are still observed just before each time ``at``. [m]"""
    return np.asarray((time[:, None] >= at).sum(0), float)


def concordance(score: Array, time: Array, event: Array, weight: Array) -> Array:
    """Return Harrell's C: among comparable pairs, how often the case that lived longer has the higher score. [b]

    Args:
        score: [n], higher for a longer expected survival.
        time: [n].
        event: [n], 0 or 1.
        weight: [b, n].

    Returns:
        NaN if no pair is comparable.
    """
    return _concordance(score, time, event, weight, weight)


def weighted_concordance(score: Array, time: Array, event: Array, weight: Array, until: float) -> Array:
    """Return Uno's C of events before ``until``, each pair weighted by 1/G(t−)² with t its earlier time. [b]"""
    steps, curve, _ = _censoring(time, event, weight)
    before = _at(curve, np.searchsorted(steps, time, side="left"))
    with np.errstate(divide="ignore", invalid="ignore"):
        leading = np.where(before > 0, weight / before**2, 0.0)
    return _concordance(score, time, event * (time < until), leading, weight)


def brier_scores(survival: Array, time: Array, event: Array, weight: Array, at: Array) -> Array:
    """Return the Brier score of predicted survival at each time ``at``, weighted by inverse probability of censoring.

    Args:
        survival: [n, m], the predicted probability of surviving beyond each of ``at``.
        time: [n].
        event: [n], 0 or 1.
        weight: [b, n].
        at: [m].

    Returns:
        [b, m]; NaN at times after the last observation.
    """
    steps, curve, _ = _censoring(time, event, weight)
    with np.errstate(divide="ignore"):
        dead = 1 / _at(curve, np.searchsorted(steps, time, side="left"))  # 1 / G(T−), [b, n]
        alive = 1 / _at(curve, np.searchsorted(steps, at, side="right"))  # 1 / G(t), [b, m]
    died = (time[:, None] <= at) & (event[:, None] > 0)
    lived = time[:, None] > at
    # BS(t) = Σ w [1{T ≤ t, δ} S² / G(T−) + 1{T > t} (1 − S)² / G(t)] / Σ w
    past = (weight * np.where(np.isfinite(dead), dead, 0.0)) @ (died * survival**2)
    beyond = weight @ (lived * (1 - survival) ** 2)
    total = past + np.where(beyond > 0, beyond * np.where(np.isfinite(alive), alive, 0.0), 0.0)
    last = np.where(weight > 0, time, -np.inf).max(1, initial=-np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(at[None] <= last[:, None], total / weight.sum(1, keepdims=True), np.nan)


def integrated(values: Array, at: Array) -> Array:
    """Return the mean over time up to the last of ``at`` of values [b, m] that are 0 at time 0, by trapezoids. [b]"""
    known = np.concatenate([np.zeros((len(values), 1)), values], axis=1)
    widths = np.diff(np.concatenate([[0.0], at]))
    return np.asarray(((known[:, 1:] + known[:, :-1]) / 2 * widths).sum(1) / at[-1])


def mean_time(survival: Array, at: Array) -> Array:
    """Return the expected time lived up to the last of ``at``, ``∫ S(u) du`` by trapezoids. [n, m] -> [n]"""
    known = np.concatenate([np.ones((len(survival), 1)), survival], axis=1)
    return np.asarray(((known[:, 1:] + known[:, :-1]) / 2) @ np.diff(np.concatenate([[0.0], at])))


def _counts(time: Array, leaving: Array, weight: Array) -> tuple[Array, Array, Array]:
    """Return the different times [m], and the weights that leave at each and that are at risk before it. [b, m]"""
    order = np.argsort(time, kind="stable")
    sorted_, w = time[order], weight[:, order]
    starts = np.flatnonzero(np.r_[True, sorted_[1:] != sorted_[:-1]]) if len(time) else np.zeros(0, np.int64)
    all_ = np.add.reduceat(w, starts, axis=1) if len(time) else np.zeros((len(weight), 0))
    gone = np.add.reduceat(w * leaving[order], starts, axis=1) if len(time) else all_
    return sorted_[starts], gone, np.cumsum(all_[:, ::-1], axis=1)[:, ::-1]


def _product_limit(time: Array, event: Array, weight: Array) -> tuple[Array, Array, NDArray[np.bool_]]:
    """Return the different times [m], the curve after each [b, m], and whether a case has each time or a later one."""
    steps, deaths, risk = _counts(time, event, weight)
    with np.errstate(divide="ignore", invalid="ignore"):
        factors = np.where(risk > 0, 1 - deaths / risk, 1.0)
    return steps, np.asarray(np.cumprod(factors, axis=1)), np.asarray(risk > 0)


def _censoring(time: Array, event: Array, weight: Array) -> tuple[Array, Array, NDArray[np.bool_]]:
    """Return the same of the censoring distribution G. Events at the time of a censoring come before it."""
    steps, deaths, risk = _counts(time, event, weight)
    censored = _counts(time, 1 - event, weight)[1]
    with np.errstate(divide="ignore", invalid="ignore"):
        factors = np.where(risk - deaths > 0, 1 - censored / (risk - deaths), 1.0)
    return steps, np.asarray(np.cumprod(factors, axis=1)), np.asarray(risk > 0)


def _at(curve: Array, index: Ints) -> Array:
    """Return a curve [b, m] after the first ``index`` steps; 1 after none. [b, len(index)]"""
    return np.concatenate([np.ones((len(curve), 1)), curve], axis=1)[:, index]


def _concordance(score: Array, time: Array, event: Array, leading: Array, weight: Array) -> Array:
    """Return the share of concordant pairs; ``leading`` weights the case of the earlier time. [b]"""
    concordant, pairs = np.zeros(len(weight)), np.zeros(len(weight))
    first = np.flatnonzero(event > 0)
    for start in range(0, len(first), ROWS):
        i = first[start : start + ROWS]
        later = (time[None] > time[i, None]) | ((time[None] == time[i, None]) & (event[None] <= 0))
        higher = (score[None] > score[i, None]) + 0.5 * (score[None] == score[i, None])
        pairs += (leading[:, i] * (weight @ later.T.astype(float))).sum(1)
        concordant += (leading[:, i] * (weight @ (later * higher).T)).sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(pairs > 0, concordant / pairs, np.nan)
