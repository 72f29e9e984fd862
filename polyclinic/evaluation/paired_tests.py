"""Is one method better than another? Paired, corrected for the number of questions, and content to say no.

- Paired differences under the same resampled patients; with several seeds, the variance between seeds is added.
- Paired DeLong test of two AUCs (DeLong et al. 1988, see ``intervals``).
- Corrected resampled t (Nadeau and Bengio, "Inference for the Generalization Error", Machine Learning 2003,
  https://doi.org/10.1023/A:1024068626366, equation 3.6 with its variance (1/J + n_test/n_train) σ²): for repeated
  splits of the same patients, whose test sets overlap.
- Wilcoxon's signed ranks over sites; Holm's step-down correction (Scandinavian Journal of Statistics 1979).
- Friedman's test with Nemenyi's critical difference (Demšar, "Statistical Comparisons of Classifiers over Multiple
  Data Sets", JMLR 2006, https://jmlr.org/papers/v7/demsar06a.html, section 3.2.2).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from polyclinic.evaluation.intervals import Ints, delong_covariance, percentile
from polyclinic.evaluation.metric import Array, Undefined

BETTER, WORSE, UNDECIDED = "better", "worse", "no difference shown"


@dataclass(frozen=True)
class Difference:
    """One method against another, signed so that positive is better.

    Attributes:
        value: None where either has no value; ``why`` says so.
        low: Lower limit of the interval.
        high: Upper limit.
        p: Two-sided.
        adjusted: ``p`` after Holm's correction within its family of questions; None before that.
        n: Units it rests on.
        how: The test.
        why: Why there is no value.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    adjusted: float | None = None
    n: int = 0
    how: str = ""
    why: str = ""

    def verdict(self, alpha: float = 0.05) -> str:
        """``better`` or ``worse`` only where the interval leaves out 0 and p, corrected if it was, is below alpha."""
        p = self.p if self.adjusted is None else self.adjusted
        if self.low is None or self.high is None or (p is not None and p >= alpha):
            return UNDECIDED
        return BETTER if self.low > 0 else WORSE if self.high < 0 else UNDECIDED


def two_sided(draws: Array) -> float:
    """The bootstrap's p: twice the smaller share of draws on either side of 0, never below 2 / (draws + 1)."""
    d = draws[np.isfinite(draws)]
    return float(min(1.0, 2 * (1 + min((d <= 0).sum(), (d >= 0).sum())) / (len(d) + 1)))


def difference(value: float, draws: Array, n: int = 0, level: float = 0.95, how: str = "") -> Difference:
    """A difference with its percentile interval and p from bootstrap ``draws`` of it."""
    if not np.isfinite(value):
        return Difference(None, n=n, why="undefined for one of the two")
    limits = percentile(draws, level)
    if limits is None:
        return Difference(value, n=n, why="no interval: too few patients to resample")
    return Difference(value, *limits, two_sided(draws), None, n, how)


def over_seeds(values: Array, draws: Array, n: int = 0, level: float = 0.95, how: str = "") -> Difference:
    """The mean of several seeds' differences, unsure of the patients and of the luck of training.

    The variance is that of the bootstrap over patients plus that of a mean of S seeds, Var = Var_b + s²/S. The
    interval is Student's, with Satterthwaite's degrees of freedom, so that two or three seeds do not pass for many.
    What differs by patient and seed at once is counted in both parts, which errs on the side of caution.

    Args:
        values: [S] one difference a seed, S ≥ 2.
        draws: [draws] bootstrap values of their mean.
        n: Patients behind them.
        level: Of confidence.
        how: The bootstrap, in words.
    """
    value, known = float(np.mean(values)), draws[np.isfinite(draws)]
    if not np.isfinite(value):
        return Difference(None, n=n, why="undefined for one of the two")
    if len(known) < max(0.5 * len(draws), 20):
        return Difference(value, n=n, why="no interval: too few patients to resample")
    patients, seeds = float(known.var(ddof=1)), float(np.var(values, ddof=1)) / len(values)
    total = patients + seeds
    if total == 0:
        return Difference(value, value, value, 1.0 if value == 0 else 0.0, None, n, how)
    df = total**2 / (seeds**2 / (len(values) - 1) + patients**2 / max(n - 1, 1))
    half = float(stats.t.ppf(0.5 + level / 2, df)) * total**0.5
    p = float(2 * stats.t.sf(abs(value) / total**0.5, df))
    return Difference(value, value - half, value + half, p, None, n, how)


def delong_test(a: Array, b: Array, positive: Array, patient: Ints | None = None, level: float = 0.95) -> Difference:
    """AUC of score ``a`` minus that of ``b``, on the same cases. All of shape [cases].

    Raises:
        Undefined: If a class is missing.
    """
    auc, cov = delong_covariance(np.stack([a, b]), positive, patient)
    value, variance = float(auc[0] - auc[1]), float(cov[0, 0] + cov[1, 1] - 2 * cov[0, 1])
    units = len(positive) if patient is None else len(np.unique(patient))
    if variance <= 1e-14:
        return Difference(value, n=units, how="DeLong", why="" if value == 0 else "no variance")
    half = float(stats.norm.ppf(0.5 + level / 2)) * variance**0.5
    p = float(2 * stats.norm.sf(abs(value) / variance**0.5))
    return Difference(value, value - half, value + half, p, None, units, "paired DeLong")


def corrected_t(differences: Sequence[float], test: int, train: int, level: float = 0.95) -> Difference:
    """Nadeau and Bengio's corrected resampled t.

    Args:
        differences: One for each of J random splits of the same patients.
        test: Patients in each test set.
        train: Patients in each training set.
        level: Of confidence.

    Raises:
        Undefined: With fewer than two splits.
        ValueError: If ``test`` or ``train`` is not positive.
    """
    d = np.asarray(differences, float)
    if len(d) < 2:
        raise Undefined("the corrected t test needs at least two splits")
    if test <= 0 or train <= 0:
        raise ValueError("test and train count patients; both must be positive")
    se = float(np.sqrt((1 / len(d) + test / train) * d.var(ddof=1)))  # (1/J + n₂/n₁) σ̂²
    mean, df = float(d.mean()), len(d) - 1
    if se == 0:
        return Difference(mean, mean, mean, 1.0 if mean == 0 else 0.0, None, len(d), "corrected resampled t")
    half = float(stats.t.ppf(0.5 + level / 2, df)) * se
    p = float(2 * stats.t.sf(abs(mean) / se, df))
    return Difference(mean, mean - half, mean + half, p, None, len(d), "corrected resampled t")


def signed_ranks(differences: Sequence[float]) -> Difference:
    """Wilcoxon's signed-rank test, exact for few pairs without ties. The value is the median difference.

    Raises:
        Undefined: With fewer than six pairs that differ: p could never fall below 0.05.
    """
    d = np.asarray(differences, float)
    if int((d != 0).sum()) < 6:
        raise Undefined("signed ranks need at least six pairs that differ")
    p = float(stats.wilcoxon(d).pvalue)
    return Difference(float(np.median(d)), None, None, p, None, len(d), "Wilcoxon signed ranks")


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the order given: max over j ≤ i of min(1, (m − j + 1) p₍ⱼ₎)."""
    m, adjusted, highest = len(p), [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(m), key=lambda i: p[i])):
        highest = max(highest, min(1.0, (m - rank) * p[i]))
        adjusted[i] = highest
    return adjusted


@dataclass(frozen=True)
class Ranking:
    """Mean ranks (1 is best) of k methods over N blocks, and the least difference that means something.

    Attributes:
        methods: By mean rank, best first.
        ranks: Their mean ranks.
        critical: Nemenyi's critical difference; two methods closer than this are not told apart.
        p: Of Friedman's test that all are equal.
        blocks: N.
        cliques: Runs of neighboring methods no two of which differ by more than ``critical``.
    """

    methods: tuple[str, ...]
    ranks: tuple[float, ...]
    critical: float
    p: float
    blocks: int
    cliques: tuple[tuple[str, ...], ...]


def rank_methods(methods: Sequence[str], values: Array, higher_is_better: bool = True, alpha: float = 0.05) -> Ranking:
    """Friedman's test and Nemenyi's critical difference.

    Args:
        methods: k names.
        values: [N, k], one row a block (a site, or a data set), without gaps.
        higher_is_better: Of the values.
        alpha: Of the critical difference.

    Raises:
        Undefined: With fewer than three methods or fewer than three blocks.
    """
    n, k = values.shape
    if k < 3 or n < 3:
        raise Undefined("ranking needs at least three methods and three sites")
    signed = -values if higher_is_better else values
    ranks = np.apply_along_axis(stats.rankdata, 1, signed).mean(0)
    p = float(stats.friedmanchisquare(*values.T).pvalue) if np.ptp(values, axis=1).any() else 1.0
    # CD = q_α √(k (k + 1) / 6 N), q_α the studentised range's quantile / √2
    critical = float(stats.studentized_range.ppf(1 - alpha, k, np.inf) / 2**0.5 * (k * (k + 1) / (6 * n)) ** 0.5)
    order = np.argsort(ranks, kind="stable")
    names, sorted_ = tuple(methods[i] for i in order), ranks[order]
    spans: list[tuple[int, int]] = []
    for i in range(k):
        j = int(np.flatnonzero(sorted_ - sorted_[i] <= critical)[-1])
        if j > i and (not spans or j > spans[-1][1]):
            spans.append((i, j))
    cliques = tuple(names[i : j + 1] for i, j in spans)
    return Ranking(names, tuple(map(float, sorted_)), critical, p, n, cliques)
