"""Comparison of methods: paired differences, tests, and ranks.

- Paired differences: Student's t with the jackknife's variance over patients (see ``jackknife``); with several seeds,
  the variance between seeds is added.
- Corrected resampled t (Nadeau and Bengio, "Inference for the Generalization Error", Machine Learning 2003,
  https://doi.org/10.1023/A:1024068626366, equation 3.6 with its variance (1/J + n_test/n_train) σ²): for repeated
  splits of the same patients, whose test sets overlap.
- Non-inferiority and equivalence with a margin: the one-sided t-test of ``difference ≤ −margin``; two one-sided tests
  (Schuirmann, "A comparison of the Two One-Sided Tests Procedure and the Power Approach", Journal of Pharmacokinetics
  and Biopharmaceutics 1987, https://doi.org/10.1007/BF01068419). Every one-sided test is at 2.5 %, so that the tests
  agree with the 95 % interval (ICH E9, "Statistical Principles for Clinical Trials", 1998, sections 3.3.2 and 5.5).
- Wilcoxon's signed ranks over sites ("Individual Comparisons by Ranking Methods", Biometrics Bulletin 1945,
  https://doi.org/10.2307/3001968), as ``scipy.stats.wilcoxon`` computes them by default. It is computed here because
  importing ``scipy.stats`` takes about a fifth of the time of a report.
- Friedman's test with Nemenyi's critical difference (Demšar, "Statistical Comparisons of Classifiers over Multiple
  Data Sets", JMLR 2006, https://jmlr.org/papers/v7/demsar06a.html, section 3.2.2).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy.special import ndtr, stdtr, stdtrit

from polyclinic.statistics.auc import mid_ranks
from polyclinic.statistics.jackknife import Spread, added
from polyclinic.statistics.undefined import Array, Undefined

Question = Literal["difference", "non-inferiority", "equivalence"]
BETTER, WORSE, UNDECIDED, NOT_TESTED = "better", "worse", "no difference shown", "not tested"
NON_INFERIOR, EQUIVALENT = "non-inferior", "equivalent"
BEYOND = "worse by more than the margin"
APART = "different by more than the margin"
FEWEST = 6
"""The smallest number of differing patients with which an exact test can reach p < 0.05: 2/2⁶ = 0.031."""


@dataclass(frozen=True)
class Difference:
    """Difference between two methods, signed so that positive is better.

    Attributes:
        value: None if a method has no value; ``why`` then gives the reason.
        low: Lower limit of the interval.
        high: Upper limit of the interval.
        p: Two-sided p-value.
        adjusted: ``p`` after Holm's correction within its family of tests; None before that.
        n: Number of independent units.
        how: The test.
        why: Reason why there is no value or no test.
        question: What is tested. ``p`` is two-sided for a difference, and one-sided with a margin.
        margin: The largest difference that does not matter; None for the question of a difference.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    adjusted: float | None = None
    n: int = 0
    how: str = ""
    why: str = ""
    question: Question = "difference"
    margin: float | None = None

    def verdict(self, alpha: float = 0.05) -> str:
        """Return the result of the test, which every table, file and command shows.

        Returns:
            ``better`` or ``worse`` if the interval excludes 0 and p (corrected, if available) is below ``alpha``;
            ``not tested`` with the reason if there is no p-value; otherwise ``no difference shown``. With a margin,
            ``non-inferior`` if the interval lies above −margin, ``equivalent`` if it lies within ±margin, and the
            one-sided p is below ``alpha / 2``; a difference beyond the margin if the interval lies beyond it;
            otherwise ``non-inferiority not shown`` or ``equivalence not shown``.
        """
        if self.p is None:
            return f"{NOT_TESTED}: {self.why}" if self.why else NOT_TESTED
        p = self.p if self.adjusted is None else self.adjusted
        if self.margin is not None:
            return self._within(self.margin, p < alpha / 2)
        if self.low is None or self.high is None or p >= alpha:
            return UNDECIDED
        return BETTER if self.low > 0 else WORSE if self.high < 0 else UNDECIDED

    def _within(self, margin: float, shown: bool) -> str:
        low, high = (-np.inf if self.low is None else self.low), (np.inf if self.high is None else self.high)
        if self.question == "non-inferiority":
            if shown and low > -margin:
                return NON_INFERIOR
            return BEYOND if high < -margin else f"{self.question} not shown"
        if shown and -margin < low and high < margin:
            return EQUIVALENT
        return APART if high < -margin or low > margin else f"{self.question} not shown"


def paired(
    values: Array,
    spread: Spread,
    differing: int,
    patients: int,
    level: float = 0.95,
    how: str = "",
    question: Question = "difference",
    margin: float | None = None,
) -> Difference:
    """Test the mean of several seeds' paired differences, with the variance over patients and over training seeds.

    The variance is that over patients plus that of a mean of S seeds, ``Var = V + s²/S`` (with one seed, ``V``). The
    interval is Student's, with Satterthwaite's degrees of freedom, which accounts for small numbers of patients and of
    seeds. An interaction of patient and seed is counted in both parts, so that the interval is conservative.

    No p-value is given if fewer than ``FEWEST`` patients differ between the methods, because the exact sign-flip test
    of n differing patients cannot have a p below 2/2ⁿ, nor if all patients differ equally.

    Args:
        values: [S], one difference per seed.
        spread: Variance of their mean over patients, with its degrees of freedom.
        differing: Number of patients with different results under the two methods.
        patients: Number of patients.
        level: Confidence level.
        how: Description of the test.
        question: What is tested.
        margin: The margin of non-inferiority or equivalence, positive.
    """
    value = float(np.mean(values))
    asked = Difference(value, n=patients, question=question, margin=margin)
    if not np.isfinite(value):
        return replace(asked, value=None, why="undefined for one of the two")
    if differing == 0 and value == 0 and margin is not None:
        return replace(asked, why="equal results for every patient, so their variance is unknown")
    if differing == 0 and value == 0:
        return replace(asked, p=1.0, how="equal results for every patient")
    if differing < FEWEST:
        of = f" of {patients}" if differing < patients else ""
        why = f"{differing}{of} patients{' differ' if of else ''}, fewer than {FEWEST}"
        return replace(asked, why=why)
    if spread.variance <= 1e-12 * value**2:
        return replace(asked, why=f"no variance among {patients} patients")
    total = spread
    if len(values) > 1:
        seeds = Spread(float(np.var(values, ddof=1)) / len(values), len(values) - 1.0)
        total = added([spread, seeds], [1.0, 1.0])
    se = total.variance**0.5
    return replace(_decided(asked, se, total.df, level), how=how)


def _decided(asked: Difference, se: float, df: float, level: float) -> Difference:
    """Return ``asked`` with the limits and the p of its question, by Student's t."""
    value = asked.value or 0.0
    half = float(stdtrit(df, 0.5 + level / 2)) * se
    if asked.margin is None:
        p = float(2 * stdtr(df, -abs(value) / se))
    elif asked.question == "non-inferiority":
        p = float(stdtr(df, -(value + asked.margin) / se))
    else:
        p = float(stdtr(df, (abs(value) - asked.margin) / se))  # the larger p of the two one-sided tests
    return replace(asked, low=value - half, high=value + half, p=p)


def corrected_t(
    differences: Sequence[float],
    test: float,
    train: float,
    level: float = 0.95,
    question: Question = "difference",
    margin: float | None = None,
) -> Difference:
    """Compute Nadeau and Bengio's corrected resampled t-test.

    Args:
        differences: One for each of J random splits of the same patients.
        test: Number, or fraction, of patients in each test set.
        train: Number, or fraction, of patients in each training set.
        level: Confidence level.
        question: What is tested.
        margin: The margin of non-inferiority or equivalence, positive.

    Raises:
        Undefined: If there are fewer than two splits.
        ValueError: If ``test`` or ``train`` is not positive.
    """
    d = np.asarray(differences, float)
    if len(d) < 2:
        raise Undefined("the corrected t test needs at least two splits")
    if test <= 0 or train <= 0:
        raise ValueError("test and train count patients; both must be positive")
    se = float(np.sqrt((1 / len(d) + test / train) * d.var(ddof=1)))  # (1/J + n₂/n₁) σ̂²
    mean, df = float(d.mean()), len(d) - 1
    asked = Difference(mean, n=len(d), how="corrected resampled t", question=question, margin=margin)
    if se <= 1e-9 * abs(mean) or se == 0:
        return replace(asked, why=f"no variance among {len(d)} splits")
    return _decided(asked, se, df, level)


def signed_ranks(differences: Sequence[float]) -> Difference:
    """Compute Wilcoxon's signed-rank test. The value is the median difference.

    Pairs that do not differ are left out. p is exact for at most 50 pairs if no two absolute differences are equal and
    all pairs differ, and for at most 13 pairs in any case; otherwise it is that of the normal approximation.

    Raises:
        Undefined: If fewer than six pairs differ, since p could not be below 0.05.
    """
    d = np.asarray(differences, float)
    if int((d != 0).sum()) < 6:
        raise Undefined("signed ranks need at least six pairs that differ")
    return Difference(float(np.median(d)), None, None, _signed_rank_p(d), None, len(d), "Wilcoxon signed ranks")


def _signed_rank_p(differences: Array) -> float:
    """Return the two-sided p of the sum of the ranks of positive differences."""
    d = differences[differences != 0]
    size, ranks = len(d), mid_ranks(np.abs(d))
    positive = float(ranks[d > 0].sum())
    ties = np.unique(ranks, return_counts=True)[1]
    if len(differences) <= (50 if ties.max() == 1 and size == len(differences) else 13):
        return _exact_rank_p(ranks, positive)
    mean = size * (size + 1) / 4
    variance = (size * (size + 1) * (2 * size + 1) - float((ties**3 - ties).sum()) / 2) / 24
    return float(2 * ndtr(-abs(positive - mean) / variance**0.5))


def _exact_rank_p(ranks: Array, positive: float) -> float:
    """Return the two-sided p of a sum of positive ranks if each sign has probability 1/2, from all 2ⁿ sums."""
    doubled = np.rint(2 * ranks).astype(np.int64)  # mid-ranks are multiples of 1/2
    ways = np.zeros(int(doubled.sum()) + 1)  # the number of sets of ranks with each sum
    ways[0] = 1.0
    for rank in doubled:
        ways[rank:] += ways[:-rank].copy()
    observed = round(2 * positive)
    return float(min(1.0, 2 * min(ways[: observed + 1].sum(), ways[observed:].sum()) / ways.sum()))


@dataclass(frozen=True)
class Ranking:
    """Mean ranks (1 is best) of k methods over N blocks, with the critical difference.

    Attributes:
        methods: Names by mean rank, best first.
        ranks: Their mean ranks.
        critical: Nemenyi's critical difference. Two methods whose ranks differ by less are not distinguished.
        p: p-value of Friedman's test of equality.
        blocks: N.
        cliques: Groups of methods with consecutive ranks that differ by at most ``critical``.
    """

    methods: tuple[str, ...]
    ranks: tuple[float, ...]
    critical: float
    p: float
    blocks: int
    cliques: tuple[tuple[str, ...], ...]


def rank_methods(methods: Sequence[str], values: Array, higher_is_better: bool = True, alpha: float = 0.05) -> Ranking:
    """Compute Friedman's test and Nemenyi's critical difference.

    Args:
        methods: k names.
        values: [N, k], one row per block (a site or a data set), without missing values.
        higher_is_better: Whether higher values are better.
        alpha: Significance level of the critical difference.

    Raises:
        Undefined: If there are fewer than three methods or fewer than three blocks.
    """
    n, k = values.shape
    if k < 3 or n < 3:
        raise Undefined("ranking needs at least three methods and three sites")
    from scipy.stats import friedmanchisquare, studentized_range  # slow to import

    signed = -values if higher_is_better else values
    ranks = np.apply_along_axis(mid_ranks, 1, signed).mean(0)
    p = float(friedmanchisquare(*values.T).pvalue) if np.ptp(values, axis=1).any() else 1.0
    # CD = q_α √(k (k + 1) / 6 N), q_α the studentized range's quantile / √2
    critical = float(studentized_range.ppf(1 - alpha, k, np.inf) / 2**0.5 * (k * (k + 1) / (6 * n)) ** 0.5)
    order = np.argsort(ranks, kind="stable")
    names, sorted_ = tuple(methods[i] for i in order), ranks[order]
    spans: list[tuple[int, int]] = []
    for i in range(k):
        j = int(np.flatnonzero(sorted_ - sorted_[i] <= critical)[-1])
        if j > i and (not spans or j > spans[-1][1]):
            spans.append((i, j))
    cliques = tuple(names[i : j + 1] for i, j in spans)
    return Ranking(names, tuple(map(float, sorted_)), critical, p, n, cliques)
