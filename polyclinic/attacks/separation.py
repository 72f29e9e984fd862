"""Separation of training patients ("members") from other patients ("non-members") by scores.

All statistics are per patient and have 95 % confidence intervals; all tests are exact or nearly exact, so that they are
valid for the few patients of one site.

- AUC: interval by DeLong, or by Newcombe for perfect separation or a single patient in a group, as in the evaluation
  (see ``polyclinic.statistics``). Test against 0.5: Mann and Whitney's, one-sided.
- True-positive rate (TPR) at a fixed false-positive rate (FPR), as recommended by Carlini et al., S&P 2022,
  https://arxiv.org/abs/2112.03570. The threshold is itself estimated from few non-members. So the lower limit uses a
  threshold that is strict enough, and the upper one a threshold that is loose enough, for the true FPR to be on the
  safe side (exact, by order statistics), and Clopper and Pearson's limit of the TPR there (Biometrika 1934). The four
  errors share the 5 %.
- Exposure of a few: the number of members above all but ``allowed`` non-members. If members and non-members are
  exchangeable, the probability of ``exposed`` or more is that of at most ``allowed`` non-members among the highest
  ``exposed + allowed`` scores, which is hypergeometric. The test needs no external threshold.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.special import betainccinv, betaincinv, ndtr, ndtri
from torch import Tensor

from polyclinic.errors import ConfigError
from polyclinic.statistics.auc import auc_variance, newcombe
from polyclinic.statistics.intervals import delong
from polyclinic.statistics.undefined import Array

RATES = (0.001, 0.01)
"""The false-positive rates at which the true-positive rate is reported."""


@dataclass(frozen=True)
class Rate:
    """The true-positive rate at one false-positive rate.

    Attributes:
        fpr: The false-positive rate.
        value: The fraction of members detected; None with fewer than 1 / ``fpr`` non-members.
        low: Lower limit of the 95 % interval.
        high: Upper limit of the 95 % interval.
    """

    fpr: float
    value: float | None
    low: float
    high: float

    @property
    def says(self) -> str:
        """The rate as text: ``6.0 % (0.0 to 10.9)``, or the required number of non-members."""
        if self.value is None:
            return f"needs {math.ceil(1 / self.fpr - 1e-9):,} others"
        return f"{100 * self.value:.1f} % ({100 * self.low:.1f} to {100 * self.high:.1f})"


@dataclass(frozen=True)
class Found:
    """How well one attack separates members from non-members.

    Attributes:
        auc: Area under the ROC curve; 0.5 is chance.
        low: Lower limit of its 95 % interval.
        high: Upper limit of its 95 % interval.
        rates: True-positive rates at ``RATES``.
        exposed: Number of members with scores above all but ``allowed`` of the non-members.
        allowed: 0.1 % of the non-members, rounded down; so 0 with fewer than 1,000.
        p_auc: Probability of this AUC or a larger one under the null hypothesis.
        p_exposed: Probability of ``exposed`` or more under the null hypothesis.
        members: Number of patients used in training.
        others: Number of other patients.
    """

    auc: float
    low: float
    high: float
    rates: tuple[Rate, ...]
    exposed: int
    allowed: int
    p_auc: float
    p_exposed: float
    members: int
    others: int

    def rate(self, fpr: float) -> Rate:
        """Return the true-positive rate at ``fpr``, one of ``RATES``."""
        return next(rate for rate in self.rates if rate.fpr == fpr)

    @property
    def says(self) -> str:
        """The result as text, with intervals."""
        above = f"all {self.others} others" if not self.allowed else f"all but {self.allowed} of {self.others} others"
        rates = "; ".join(f"TPR at {100 * rate.fpr:g} % FPR {rate.says}" for rate in self.rates)
        return (
            f"AUC {self.auc:.3f} ({self.low:.3f} to {self.high:.3f}); {rates}; {self.exposed} of {self.members} "
            f"members above {above}"
        )


@dataclass(frozen=True)
class Detectable:
    """The power of a comparison with given numbers of patients.

    Attributes:
        auc: The smallest AUC that the test detects with power 0.8; None if it can detect none.
        exposed: The number of members, scored above all others with certainty, that is always detected; None if not
            even all of them would be.
    """

    auc: float | None
    exposed: int | None


def found(members: Tensor, others: Tensor, level: float = 0.95) -> Found:
    """Compare two groups of scores, one score per patient, larger if membership is more certain.

    Args:
        members: [n], of patients used in training.
        others: [m], of other patients.
        level: Confidence level.

    Raises:
        ValueError: If a group is empty, or a score is not a number.
    """
    x, y = members.double().numpy(), others.double().numpy()
    if not len(x) or not len(y):
        raise ConfigError("membership inference needs patients used in training and other patients")
    if np.isnan(x).any() or np.isnan(y).any():
        raise ConfigError("a membership score is NaN: the attack cannot be evaluated")
    allowed = int(len(y) * RATES[0] + 1e-9)
    exposed = int((x > np.sort(y)[::-1][allowed]).sum())
    value, low, high = _auc(x, y, level)
    return Found(
        value,
        low,
        high,
        tuple(_rate(x, y, fpr, level) for fpr in RATES),
        exposed,
        allowed,
        _mann_whitney(x, y, value),
        tail(exposed, allowed, len(x), len(y)),
        len(x),
        len(y),
    )


def tail(exposed: int, allowed: int, members: int, others: int) -> float:
    """Return the probability of ``exposed`` or more members above all but ``allowed`` non-members by chance."""
    from scipy.stats import hypergeom  # slow to import, and not needed to show results

    return float(hypergeom.cdf(allowed, members + others, others, exposed + allowed))


def detectable(members: int, others: int, alpha: float, power: float = 0.8) -> Detectable:
    """Return the power of a comparison with these numbers of patients by tests of size ``alpha``."""
    allowed = int(others * RATES[0] + 1e-9)
    enough = (x for x in range(1, members + 1) if tail(x, allowed, members, others) <= alpha)
    theta = np.linspace(0.5, 1.0, 1001)
    chance = math.sqrt((members + others + 1) / (12 * members * others))
    reach = theta - 0.5 + ndtri(alpha) * chance - ndtri(power) * np.sqrt(auc_variance(theta, members, others))
    possible = -math.log(math.comb(members + others, members)) <= math.log(alpha)  # at perfect separation
    seen = theta[reach >= 0] if possible else theta[:0]
    return Detectable(float(seen[0]) if len(seen) else None, next(enough, None))


def _auc(x: Array, y: Array, level: float) -> tuple[float, float, float]:
    """Return the AUC with DeLong's interval, or Newcombe's if a group has a single patient; each is one case."""
    estimate = delong(np.r_[x, y], np.r_[np.ones(len(x)), np.zeros(len(y))], level=level)
    assert estimate.value is not None
    if estimate.low is None or estimate.high is None:
        return estimate.value, *newcombe(estimate.value, len(x), len(y), level)
    return estimate.value, estimate.low, estimate.high


def _mann_whitney(x: Array, y: Array, auc: float) -> float:
    """Return the p-value of the AUC: exact if a group has 8 or fewer and there are no ties, else by normal theory."""
    n, m = len(x), len(y)
    counts = np.unique(np.r_[x, y], return_counts=True)[1].astype(float)
    if min(n, m) <= 8 and counts.max() == 1:
        from scipy.stats import mannwhitneyu

        return float(mannwhitneyu(x, y, alternative="greater", method="exact").pvalue)
    ties = float((counts**3 - counts).sum()) / ((n + m) * (n + m - 1))
    variance = n * m / 12 * (n + m + 1 - ties)
    if variance <= 0:
        return 1.0
    return float(ndtr(-((auc - 0.5) * n * m - 0.5) / math.sqrt(variance)))


def _rate(x: Array, y: Array, fpr: float, level: float) -> Rate:
    """Return the true-positive rate at ``fpr`` with its interval.

    The (j + 1)-th highest of m non-members has a true FPR that follows Beta(j + 1, m − j), so that it exceeds ``fpr``
    with probability P[Binomial(m, fpr) ≤ j].
    """
    highest, n, m, error = np.sort(y)[::-1], len(x), len(y), (1 - level) / 4
    strict, loose = _thresholds(m, fpr, error)
    least = 0 if strict < 0 else int((x > highest[strict]).sum())
    most = n if loose >= m else int((x >= highest[loose]).sum())
    low = 0.0 if least == 0 else float(betaincinv(least, n - least + 1, error))
    high = 1.0 if most == n else float(betainccinv(most + 1, n - most, error))
    if m * fpr < 1 - 1e-9:
        return Rate(fpr, None, low, high)
    return Rate(fpr, float((x > highest[int(m * fpr + 1e-9)]).mean()), low, high)


@lru_cache
def _thresholds(m: int, fpr: float, error: float) -> tuple[int, int]:
    """Return the positions among m non-members, from the highest, whose true FPR is at most, and at least, ``fpr``.

    Each holds with probability 1 − ``error``. The first is −1, and the second m, if there is no such position.
    """
    from scipy.stats import binom

    counts = np.arange(m)
    strict = int(np.searchsorted(binom.cdf(counts, m, fpr), error, side="right")) - 1
    return strict, int(np.argmax(np.r_[binom.sf(counts, m, fpr), 0.0] <= error))
