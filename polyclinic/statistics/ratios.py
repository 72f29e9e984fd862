"""Ratio of two means with Fieller's interval, such as the share of a gap that a method closes.

Fieller, "Some problems in interval estimation", Journal of the Royal Statistical Society B 16:175-185, 1954: the
interval holds every θ for which Student's t-test of ``E[x − θ y] = 0`` does not reject:
``(x̄ − θ ȳ)² ≤ t² (Vₓₓ − 2 θ Vₓᵧ + θ² Vᵧᵧ)``. The coverage of this set is exact for normal pairs, also if ȳ is small. If
ȳ does not differ from 0 at the same level, the set is unbounded, and no interval is given, because the data then
exclude no ratio of either sign that is large enough.
"""

from collections.abc import Sequence

import numpy as np
from scipy.special import stdtrit

from polyclinic.statistics.intervals import Estimate
from polyclinic.statistics.undefined import Undefined


def ratio_of_means(
    numerators: Sequence[float],
    denominators: Sequence[float],
    level: float = 0.95,
    test: float = 0.0,
    train: float = 1.0,
) -> Estimate:
    """Compute the ratio of two paired means with Fieller's interval.

    Args:
        numerators: One for each of J independent repetitions, or of J random splits of the same patients.
        denominators: Their denominators, in the same order.
        level: Confidence level.
        test: Number, or fraction, of patients in each test set if the repetitions are splits of the same patients; the
            variances are then Nadeau and Bengio's, as in ``paired_tests.corrected_t``. 0 for independent repetitions.
        train: Number, or fraction, of patients in each training set.

    Returns:
        The ratio. It has no interval, and ``why`` gives the reason, if the denominator does not differ from 0.

    Raises:
        Undefined: If there are fewer than two repetitions, or the mean of the denominators is 0.
        ValueError: If the two differ in length, or ``test`` is negative or ``train`` not positive.
    """
    x, y = np.asarray(numerators, float), np.asarray(denominators, float)
    if x.shape != y.shape:
        raise ValueError(f"{len(x)} numerators and {len(y)} denominators are no pairs")
    if test < 0 or train <= 0:
        raise ValueError("test and train count patients; test must not be negative, and train must be positive")
    if len(x) < 2:
        raise Undefined("a ratio of means needs at least two repetitions")
    a, b = float(x.mean()), float(y.mean())
    if b == 0:
        raise Undefined("the mean of the denominators is 0")
    how = "Fieller" if test == 0 else "Fieller, with the variance of repeated splits"
    (vxx, vxy), (_, vyy) = (1 / len(x) + test / train) * np.cov(x, y)
    t2 = float(stdtrit(len(x) - 1, 0.5 + level / 2)) ** 2
    first, middle, last = b * b - t2 * vyy, a * b - t2 * vxy, a * a - t2 * vxx
    if first <= 0:
        return Estimate(a / b, n=len(x), how=how, why="the denominator is not shown to differ from 0")
    half = float(np.sqrt(max(middle * middle - first * last, 0.0)))
    return Estimate(a / b, float((middle - half) / first), float((middle + half) / first), len(x), how)
