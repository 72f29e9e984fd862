"""The delete-one jackknife over patients: variance of an estimate, and the degrees of freedom of that variance.

The jackknife variance of a mean is the usual s²/n, so that an interval with Student's quantiles is exact for means of
normal values and close for smooth statistics (Efron and Stein, "The Jackknife Estimate of Variance", Annals of
Statistics 1981, https://doi.org/10.1214/aos/1176345462). A percentile bootstrap divides by n instead of n − 1 and uses
normal tails, which makes it too narrow for fewer than about 20 patients. Variances of independent parts are combined
with Satterthwaite's degrees of freedom ("An Approximate Distribution of Estimates of Variance Components", Biometrics
Bulletin 1946, https://doi.org/10.2307/3002019).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from polyclinic.statistics.undefined import Array, Ints, Undefined


@dataclass(frozen=True)
class Spread:
    """The variance of an estimate, and the degrees of freedom of that variance."""

    variance: float
    df: float


@dataclass(frozen=True)
class Jackknife:
    """A statistic with its values without each unit.

    Attributes:
        value: The statistic of all units.
        without: [n], the statistic without each unit (a patient, or a group of patients).
        stratum: [n], the class of each unit for statistics that compare classes; otherwise zeros.
    """

    value: float
    without: Array
    stratum: Ints

    @property
    def pseudo_values(self) -> Array:
        """``n θ − (n − 1) θ₍₋ᵢ₎`` for each unit i; the values themselves if the statistic is their mean."""
        n = len(self.without)
        return n * self.value - (n - 1) * self.without

    @property
    def changing(self) -> int:
        """Number of units with a pseudo-value other than 0; of a paired mean, the units that differ."""
        return int((np.abs(self.pseudo_values) > 1e-9).sum())

    def spread(self) -> Spread:
        """Return the variance, with Welch's degrees of freedom over strata.

        Raises:
            Undefined: If a stratum has fewer than two units, or the statistic is undefined without one of them.
        """
        n, counts = len(self.without), np.bincount(self.stratum)
        used = np.flatnonzero(counts).tolist()
        if n < 2:
            raise Undefined("fewer than two patients")
        if counts[used].min() < 2:
            raise Undefined("fewer than two patients in a class")
        if not np.isfinite(self.without).all():
            raise Undefined("undefined without one of the patients")
        pseudo = self.pseudo_values
        away = (pseudo - pseudo.mean()) ** 2 / (n * (n - 1))
        sums = np.bincount(self.stratum, away)
        parts = [Spread(float(sums[k]), counts[k] - 1.0) for k in used]
        return added(parts, [1.0] * len(parts))


def column_spreads(value: Array, without: Array) -> tuple[Array, float]:
    """Return the variances [k] of several statistics, without strata, and their common degrees of freedom.

    Args:
        value: [k], the statistics of all units.
        without: [n, k], the statistics without each unit.

    Raises:
        Undefined: If there are fewer than two units.
    """
    n = len(without)
    if n < 2:
        raise Undefined("fewer than two patients")
    pseudo = n * value - (n - 1) * without
    variance = ((pseudo - pseudo.mean(0)) ** 2).sum(0) / (n * (n - 1))
    return np.asarray(variance), n - 1.0


def added(parts: Sequence[Spread], weights: Sequence[float]) -> Spread:
    """Return the spread of a weighted sum of independent estimates, with Satterthwaite's degrees of freedom."""
    variances = np.array([w * w * p.variance for p, w in zip(parts, weights, strict=True)])
    total = float(variances.sum())
    if total <= 0:
        return Spread(0.0, float(sum(p.df for p in parts)))
    squares = sum(v * v / max(p.df, 1e-9) for v, p in zip(variances, parts, strict=True))
    return Spread(total, float(total * total / squares))


def mean_of_columns(variances: Array, df: Array) -> list[Spread]:
    """Return the spread of the mean of p independent estimates for each of k statistics (see ``added``).

    Args:
        variances: [p, k].
        df: [p], their degrees of freedom.
    """
    parts = variances / len(variances) ** 2
    total, squares = parts.sum(0), (parts**2 / np.maximum(df, 1e-9)[:, None]).sum(0)
    together = float(df.sum())
    return [
        Spread(v, v * v / s) if v > 0 else Spread(0.0, together)
        for v, s in zip(total.tolist(), squares.tolist(), strict=True)
    ]


def mean_of_dependent(parts: Sequence[Spread]) -> Spread:
    """Return a spread that bounds that of a mean of estimates whose dependence is unknown.

    The standard deviation of a mean is at most the mean of the standard deviations.
    """
    return Spread(float(np.mean([p.variance**0.5 for p in parts])) ** 2, min(p.df for p in parts))
