"""Area under the ROC curve, its covariance, and its limits for perfect separation.

- AUC: the rank statistic, in which ties count half (Hanley and McNeil, "The meaning and use of the area under a ROC
  curve", Radiology 1982, https://doi.org/10.1148/radiology.143.1.7063747).
- Covariance: DeLong, DeLong and Clarke-Pearson, "Comparing the areas under two or more correlated ROC curves",
  Biometrics 1988, https://doi.org/10.2307/2531595, in O(n log n) by mid-ranks (Sun and Xu, IEEE Signal Processing
  Letters 2014, https://doi.org/10.1109/LSP.2014.2337313). If a patient has several cases, the clustered covariance of
  Obuchowski, "Nonparametric analysis of clustered ROC curve data", Biometrics 1997, https://doi.org/10.2307/2533958.
- Limits for perfect separation, where DeLong's variance is 0: method 5 of Newcombe, Statistics in Medicine 2006,
  https://doi.org/10.1002/sim.2324.
"""

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyclinic.statistics.undefined import Array, Ints, Undefined


def auc_of(score: Array, positive: NDArray[Any], weight: Array) -> Array:
    """Compute P(score of a positive > that of a negative) + P(equal) / 2 for each row of case weights.

    Returns:
        For ``score`` [n], ``positive`` [n] and ``weight`` [b, n]: [b], NaN if a class has no weight.
    """
    pos, neg = sums_by_score(score, positive, weight)
    below = np.cumsum(neg, axis=1) - neg
    with np.errstate(divide="ignore", invalid="ignore"):
        pairs = pos.sum(1) * neg.sum(1)
        return np.where(pairs > 0, (pos * (below + 0.5 * neg)).sum(1) / pairs, np.nan)


def sums_by_score(score: Array, positive: NDArray[Any], weight: Array) -> tuple[Array, Array]:
    """Return the weights of positives and of negatives summed over equal scores, in ascending order. [b, scores]"""
    order = np.argsort(score, kind="stable")
    sorted_ = score[order]
    starts = np.flatnonzero(np.r_[True, sorted_[1:] != sorted_[:-1]])
    w, y = weight[:, order], np.asarray(positive)[order].astype(float)
    pos, neg = w * y, w * (1.0 - y)
    if len(starts) < len(score):
        pos, neg = np.add.reduceat(pos, starts, axis=1), np.add.reduceat(neg, starts, axis=1)
    return pos, neg


def mid_ranks(values: Array) -> Array:
    """Return the ranks of ``values`` [n], from 1; equal values have the mean of their ranks."""
    ordered = np.sort(values)
    below, up_to = (np.searchsorted(ordered, values, side) for side in ("left", "right"))
    return np.asarray((below + up_to + 1) / 2)


def placements(score: Array, positive: NDArray[Any]) -> tuple[Array, Array]:
    """Compute DeLong's structural components by mid-ranks. Ties count half.

    Returns:
        For each positive, the fraction of negatives with a lower score (V₁₀, [m]); for each negative, the fraction of
        positives with a higher score (V₀₁, [n]). The mean of each is the AUC.

    Raises:
        Undefined: If a class is missing.
    """
    y = np.asarray(positive).astype(bool)
    m, n = int(y.sum()), int((~y).sum())
    if m == 0 or n == 0:
        raise Undefined(f"all {m + n} cases are of one class")
    every, pos, neg = mid_ranks(score), mid_ranks(score[y]), mid_ranks(score[~y])
    return (every[y] - pos) / n, 1.0 - (every[~y] - neg) / m


def delong_parts(
    scores: Array, positive: NDArray[Any], patient: Ints | None = None
) -> tuple[Array, Array, tuple[int, int]]:
    """Compute the AUCs of several scores of the same cases, and the parts of their covariance.

    Args:
        scores: [k, cases].
        positive: [cases], 0 or 1.
        patient: [cases]. Cases of one patient may be dependent. By default each case is its own patient.

    Returns:
        AUCs [k]; parts of the covariance [3, k, k], which is their sum: of positives, of negatives, and of both; and
        the numbers of patients with positive and with negative cases.

    Raises:
        Undefined: If a class is missing, or has a single patient.
    """
    y = np.asarray(positive).astype(bool)
    v10, v01 = (np.array(v) for v in zip(*(placements(s, y) for s in scores), strict=True))
    auc, m, n = v10.mean(1), int(y.sum()), int((~y).sum())
    if patient is None:
        if m < 2 or n < 2:
            raise Undefined("fewer than two patients in a class")
        a, b = v10 - auc[:, None], v01 - auc[:, None]
        s10, s01 = a @ a.T / (m - 1), b @ b.T / (n - 1)
        return auc, np.stack([s10 / m, s01 / n, np.zeros_like(s10)]), (m, n)
    ids = np.unique(patient, return_inverse=True)[1]
    size = int(ids.max()) + 1
    # Sums by patient of V − AUC: for V₁₀ over its positives, for V₀₁ over its negatives.
    a = np.stack([np.bincount(ids[y], v, size) for v in v10 - auc[:, None]])
    b = np.stack([np.bincount(ids[~y], v, size) for v in v01 - auc[:, None]])
    with_pos, with_neg = len(np.unique(ids[y])), len(np.unique(ids[~y]))
    if with_pos < 2 or with_neg < 2:
        raise Undefined("fewer than two patients in a class")
    s10 = with_pos / (with_pos - 1) * (a @ a.T) / m  # S₁₀; with one case per patient, this is DeLong's
    s01 = with_neg / (with_neg - 1) * (b @ b.T) / n
    s11 = size / max(size - 1, 1) * (a @ b.T + b @ a.T) / (m * n)  # 0 if no patient has both classes
    return auc, np.stack([s10 / m, s01 / n, s11]), (with_pos, with_neg)


@lru_cache(maxsize=4096)  # many small sites are alike
def newcombe(auc: float, positives: int, negatives: int, level: float = 0.95) -> tuple[float, float]:
    """Return the limits by Newcombe's method 5: the AUCs θ with ``|auc − θ| ≤ z √V(θ)``, V by ``auc_variance``."""
    from scipy.special import ndtri  # processes that train do not need SciPy

    theta = np.linspace(0.0, 1.0, 20001)
    z = float(ndtri(0.5 + level / 2))
    inside = theta[np.abs(auc - theta) <= z * np.sqrt(auc_variance(theta, positives, negatives)) + 1e-12]
    return float(inside.min()), float(inside.max())


def auc_variance(theta: Array, positives: int, negatives: int) -> Array:
    """Return Hanley and McNeil's variance of an AUC of ``theta``, with both classes counted as their mean size."""
    middle = (positives + negatives) / 2
    spread = 2 * middle - 1 - (3 * middle - 3) / ((2 - theta) * (1 + theta))
    variance: Array = theta * (1 - theta) / (positives * negatives) * np.maximum(spread, 0)
    return variance
