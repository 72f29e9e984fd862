"""Power of a comparison of two methods, and the number of test patients that a given power needs.

The test is that of ``paired_tests.paired``: Student's t for the mean over K sites of paired differences, with
``Var = Σ_k V_k(n) / K² + σ_s² / S`` for n test patients at each site and S training seeds, and Satterthwaite's degrees
of freedom. Its power is that of the noncentral t distribution (Chow, Shao, Wang and Lokhnygina, "Sample Size
Calculations in Clinical Research", 3rd edition 2017, chapter 3; for two one-sided tests the lower bound
``P₁ + P₂ − 1`` of both powers, which is close to the power if that is high).

The variance of a site is given per patient, or by assumptions:

- AUC: Hanley and McNeil, Radiology 1982, https://doi.org/10.1148/radiology.143.1.7063747, and for two AUCs of the same
  patients ``2 V (1 − r)`` with their correlation r (Hanley and McNeil, Radiology 1983,
  https://doi.org/10.1148/radiology.148.3.6878708).
- Accuracy: the fraction d of patients that only one of two methods classifies correctly, ``(d − δ²) / n`` with the
  difference δ (Connor, "Sample Size for Testing Differences in Proportions for the Paired-Sample Design", Biometrics
  1987, https://doi.org/10.2307/2531961).
"""

from collections.abc import Callable
from dataclasses import dataclass

from scipy import stats

from polyclinic.statistics.jackknife import Spread, added
from polyclinic.statistics.paired_tests import FEWEST, Question
from polyclinic.statistics.undefined import Undefined

MOST = 100_000
"""The largest number of patients at a site that is tried."""


@dataclass(frozen=True)
class Design:
    """A planned comparison.

    Attributes:
        question: What is to be shown.
        difference: The true difference that is assumed, positive if better.
        margin: The margin of non-inferiority or equivalence; None for a difference.
        sites: Number of sites.
        seeds: Number of training seeds.
        seed_sd: Standard deviation between seeds of the difference.
        level: Confidence level of the interval.
    """

    question: Question
    difference: float
    margin: float | None
    sites: int
    seeds: int = 1
    seed_sd: float = 0.0
    level: float = 0.95


def power_of(design: Design, site: Spread) -> float:
    """Return the probability that the verdict is the one that the design is to show.

    Args:
        design: The design.
        site: The variance of the difference at one site, with its degrees of freedom.
    """
    k = design.sites
    total = added([site] * k, [1 / k] * k)
    if design.seeds > 1 and design.seed_sd > 0:
        total = added([total, Spread(design.seed_sd**2 / design.seeds, design.seeds - 1.0)], [1.0, 1.0])
    se, critical = total.variance**0.5, float(stats.t.ppf(0.5 + design.level / 2, total.df))
    if design.margin is None:
        shift = abs(design.difference) / se
        return _above(critical, total.df, shift)
    upward = _above(critical, total.df, (design.difference + design.margin) / se)
    if design.question == "non-inferiority":
        return upward
    return max(0.0, upward + _above(critical, total.df, (design.margin - design.difference) / se) - 1.0)


def _above(critical: float, df: float, shift: float) -> float:
    """Return P(T > critical) of a noncentral t; of the normal approximation beyond the range of the computation."""
    if shift > 30:
        return float(stats.norm.sf(critical - shift))
    return float(stats.nct.sf(critical, df, shift))


def patients_for(design: Design, variance: Callable[[int], Spread], power: float) -> int:
    """Return the smallest number of test patients at each site that gives at least ``power``.

    Args:
        design: The design.
        variance: The variance of the difference at a site with n patients.
        power: The wanted power.

    Raises:
        Undefined: If no number of patients suffices. The message gives the reason.
    """
    least = max(4, -(-FEWEST // design.sites))
    if power_of(design, variance(MOST)) < power:
        if design.margin is not None and design.difference <= -design.margin:
            raise Undefined("the assumed difference lies beyond the margin")
        most = power_of(design, variance(MOST))
        raise Undefined(
            f"{MOST} patients at each site have a power of {most:.2f}: more seeds, more sites or a larger "
            "difference is needed"
        )
    low, high = least - 1, MOST  # the power rises with n
    if power_of(design, variance(least)) >= power:
        return least
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power_of(design, variance(middle)) >= power else (middle, high)
    return high


def by_patient(sd: float) -> Callable[[int], Spread]:
    """Return the variance of a mean of n differences with the standard deviation ``sd``."""
    return lambda n: Spread(sd**2 / n, n - 1.0)


def of_auc(auc: float, correlation: float, prevalence: float) -> Callable[[int], Spread]:
    """Return the variance of a difference of two AUCs of the same n patients."""

    def variance(n: int) -> Spread:
        positives = min(max(prevalence * n, 2.0), n - 2.0)
        negatives = n - positives
        q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
        above = (positives - 1) * (q1 - auc**2) + (negatives - 1) * (q2 - auc**2)
        one = (auc * (1 - auc) + above) / (positives * negatives)
        return Spread(2 * one * (1 - correlation), max(n - 2.0, 1.0))

    return variance


def of_accuracy(disagreement: float, difference: float) -> Callable[[int], Spread]:
    """Return the variance of a difference of accuracy if only one method is right for a fraction of the patients.

    Raises:
        Undefined: If the difference is larger than the fraction of patients that can cause it.
    """
    if abs(difference) >= disagreement:
        raise Undefined(f"a difference of {difference:g} needs more than {disagreement:g} of patients that disagree")
    return by_patient((disagreement - difference**2) ** 0.5)


def upper_sd(sd: float, df: float, confidence: float = 0.8) -> float:
    """Return an upper confidence limit of a pilot's standard deviation, with which a study is planned.

    A study planned with the pilot's estimate itself has too little power in half of all cases (Browne, "On the use of
    a pilot sample for sample size determination", Statistics in Medicine 1995, https://doi.org/10.1002/sim.4780141709).
    """
    return float(sd * (df / stats.chi2.ppf(1 - confidence, df)) ** 0.5)
