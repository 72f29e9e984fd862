"""How sure: confidence intervals whose unit is the patient.

- AUC: DeLong, DeLong, Clarke-Pearson, "Comparing the areas under two or more correlated ROC curves", Biometrics 1988,
  https://doi.org/10.2307/2531595, in O(n log n) by mid-ranks (Sun and Xu, IEEE Signal Processing Letters 2014,
  https://doi.org/10.1109/LSP.2014.2337313). Where a patient has several cases, the clustered variance of Obuchowski,
  "Nonparametric analysis of clustered ROC curve data", Biometrics 1997, https://doi.org/10.2307/2533958. Limits are
  formed on the logit scale, so that they stay within 0 and 1. Where the variance is 0 (perfect separation), method 5
  of Newcombe, Statistics in Medicine 2006, https://doi.org/10.1002/sim.2324, takes over.
- A proportion: Wilson, JASA 1927.
- Anything else: the bootstrap over patients, percentile or BCa (Efron, "Better Bootstrap Confidence Intervals", JASA
  1987, https://doi.org/10.1080/01621459.1987.10478410).
- Several sites as a sample of sites: DerSimonian and Laird, "Meta-analysis in clinical trials", Controlled Clinical
  Trials 1986, https://doi.org/10.1016/0197-2456(86)90046-2.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, rankdata

from polyclinic.evaluation.metric import Array, Undefined

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Estimate:
    """A value, its interval, and how they came about.

    Attributes:
        value: None where the cases do not determine it; ``why`` says so then.
        low: Lower confidence limit, None where there is no interval.
        high: Upper confidence limit.
        n: Patients behind it.
        how: How the interval was formed.
        why: Why there is no value or no interval.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0
    how: str = ""
    why: str = ""


@dataclass(frozen=True)
class Pooled:
    """A random-effects mean over sites: the estimate, the variance between sites, and I² (0 to 1)."""

    estimate: Estimate
    tau2: float
    i2: float


def z_of(level: float) -> float:
    """The normal quantile of a two-sided interval: 1.96 for 0.95."""
    return float(norm.ppf(0.5 + level / 2))


def wilson(successes: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion.

    Raises:
        Undefined: If n is 0.
    """
    if n <= 0:
        raise Undefined("no cases")
    z, p = z_of(level), successes / n
    center, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, float((center - half) / (1 + z * z / n))), min(1.0, float((center + half) / (1 + z * z / n)))


def placements(score: Array, positive: NDArray[Any]) -> tuple[Array, Array]:
    """DeLong's structural components, by mid-ranks.

    Returns:
        For each positive, the share of negatives it beats (V₁₀, [m]); for each negative, the share of positives that
        beat it (V₀₁, [n]); ties count half. Both have the AUC as their mean.

    Raises:
        Undefined: If a class is missing.
    """
    y = np.asarray(positive).astype(bool)
    m, n = int(y.sum()), int((~y).sum())
    if m == 0 or n == 0:
        raise Undefined(f"all {m + n} cases are of one class")
    every, pos, neg = rankdata(score), rankdata(score[y]), rankdata(score[~y])
    return (every[y] - pos) / n, 1.0 - (every[~y] - neg) / m


def delong_covariance(scores: Array, positive: NDArray[Any], patient: Ints | None = None) -> tuple[Array, Array]:
    """The AUCs of several scores of the same cases, and their covariance.

    Args:
        scores: [k, cases].
        positive: [cases], 0 or 1.
        patient: [cases]; cases of one patient may depend on each other. None: each case is its own patient.

    Returns:
        AUCs [k] and covariance [k, k].

    Raises:
        Undefined: If a class is missing, or has a single patient.
    """
    y = np.asarray(positive).astype(bool)
    ids = np.arange(len(y)) if patient is None else np.unique(patient, return_inverse=True)[1]
    v10, v01 = (np.array(v) for v in zip(*(placements(s, y) for s in scores), strict=True))
    auc, m, n = v10.mean(1), int(y.sum()), int((~y).sum())
    size = int(ids.max()) + 1
    # Sums by patient of V − AUC: for V₁₀ over its positives, for V₀₁ over its negatives.
    a = np.stack([np.bincount(ids[y], v, size) for v in v10 - auc[:, None]])
    b = np.stack([np.bincount(ids[~y], v, size) for v in v01 - auc[:, None]])
    with_pos, with_neg = len(np.unique(ids[y])), len(np.unique(ids[~y]))
    if with_pos < 2 or with_neg < 2:
        raise Undefined("fewer than two patients in a class")
    s10 = with_pos / (with_pos - 1) * (a @ a.T) / m  # S₁₀; with one case per patient DeLong's 1/(m−1) Σ (V−θ)²
    s01 = with_neg / (with_neg - 1) * (b @ b.T) / n
    s11 = size / max(size - 1, 1) * (a @ b.T + b @ a.T) / (m * n)  # 0 where no patient has both classes
    return auc, s10 / m + s01 / n + s11


def delong(score: Array, positive: NDArray[Any], patient: Ints | None = None, level: float = 0.95) -> Estimate:
    """The AUC with DeLong's interval. ``score`` is [cases], or [seeds, cases] for the mean AUC of several runs.

    Raises:
        Undefined: If a class is missing.
    """
    scores = np.atleast_2d(score)
    y = np.asarray(positive).astype(bool)
    patients = len(y) if patient is None else len(np.unique(patient))
    value = float(np.mean([placements(s, y)[0].mean() for s in scores]))
    try:
        covariance = delong_covariance(scores, y, patient)[1]
    except Undefined as reason:
        return Estimate(value, n=patients, why=f"no interval: {reason}")
    variance = float(np.mean(covariance))  # of the mean over seeds: 1ᵀ Σ 1 / k²
    if variance <= 1e-14 or value in (0.0, 1.0):
        low, high = newcombe(value, int(y.sum()), int((~y).sum()), level)
        return Estimate(value, low, high, patients, "Newcombe's method 5 (perfect separation)")
    logit = np.log(value / (1 - value))
    half = z_of(level) * np.sqrt(variance) / (value * (1 - value))
    low, high = (float(1 / (1 + np.exp(-t))) for t in (logit - half, logit + half))
    return Estimate(value, low, high, patients, "DeLong" if patient is None else "DeLong, clustered by patient")


def newcombe(auc: float, positives: int, negatives: int, level: float = 0.95) -> tuple[float, float]:
    """Newcombe's method 5: the AUCs θ with |auc − θ| ≤ z √V(θ), V after Hanley and McNeil at m = n = (m + n)/2."""
    middle = (positives + negatives) / 2
    theta = np.linspace(0.0, 1.0, 20001)
    spread = 2 * middle - 1 - (3 * middle - 3) / ((2 - theta) * (1 + theta))
    variance = theta * (1 - theta) / (positives * negatives) * np.maximum(spread, 0)
    inside = theta[np.abs(auc - theta) <= z_of(level) * np.sqrt(variance) + 1e-12]
    return float(inside.min()), float(inside.max())


def resamples(patients: int, count: int, rng: np.random.Generator) -> Array:
    """How often each patient was drawn, in each of ``count`` draws with replacement. [count, patients]"""
    if patients == 0:
        return np.zeros((count, 0))
    return rng.multinomial(patients, np.full(patients, 1.0 / patients), size=count).astype(float)


def percentile(draws: Array, level: float = 0.95) -> tuple[float, float] | None:
    """The percentile interval of bootstrap values; undefined draws are left out. None where fewer than half remain."""
    known = draws[np.isfinite(draws)]
    if len(known) < max(0.5 * len(draws), 20):
        return None
    low, high = np.quantile(known, [0.5 - level / 2, 0.5 + level / 2])
    return float(low), float(high)


def bca(value: float, draws: Array, jackknife: Array, level: float = 0.95) -> tuple[float, float] | None:
    """The bias-corrected and accelerated interval.

    Args:
        value: The estimate.
        draws: [b] its bootstrap values.
        jackknife: [n] its values with one patient left out.
        level: Of confidence.

    Returns:
        The limits; the percentile interval where the jackknife has no spread; None where too few draws are defined.
    """
    known, left = draws[np.isfinite(draws)], jackknife[np.isfinite(jackknife)]
    plain = percentile(draws, level)
    if plain is None or len(left) < 2:
        return plain
    away = left.mean() - left
    spread = float((away**2).sum())
    if spread < 1e-24 or np.ptp(known) == 0:
        return plain
    a = float((away**3).sum()) / (6 * spread**1.5)
    share = ((known < value).mean() + (known <= value).mean()) / 2  # half of the ties, as for discrete statistics
    z0 = float(norm.ppf(np.clip(share, 1 / (len(known) + 1), len(known) / (len(known) + 1))))
    z = np.array([-z_of(level), z_of(level)])
    at = norm.cdf(z0 + (z0 + z) / (1 - a * (z0 + z)))
    low, high = np.quantile(known, at)
    return float(low), float(high)


def bootstrap(
    statistic: Callable[[Array], Array],
    patients: int,
    count: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    method: str = "bca",
) -> Estimate:
    """A statistic with its bootstrap interval over patients.

    Args:
        statistic: Maps weights of patients [b, patients] to values [b], NaN where undefined.
        patients: How many there are.
        count: Draws.
        level: Of confidence.
        seed: Of the draws.
        method: ``"bca"`` or ``"percentile"``.

    Raises:
        ValueError: For another method.
    """
    if method not in ("bca", "percentile"):
        raise ValueError(f"no bootstrap interval called {method!r}; use 'bca' or 'percentile'")
    value = float(statistic(np.ones((1, patients)))[0]) if patients else float("nan")
    if not np.isfinite(value):
        return Estimate(None, n=patients, why=f"not determined by {patients} patients")
    draws = statistic(resamples(patients, count, np.random.default_rng(seed)))
    if method == "bca":
        limits = bca(value, draws, statistic(1.0 - np.eye(patients)), level)
    else:
        limits = percentile(draws, level)
    if patients < 2 or limits is None:
        return Estimate(value, n=patients, why="no interval: too few patients to resample")
    name = "BCa" if method == "bca" else "percentile"
    return Estimate(value, *limits, patients, f"{name} bootstrap over patients, {count} draws, seed {seed}")


def pool_sites(values: Sequence[float] | Array, variances: Sequence[float] | Array, level: float = 0.95) -> Pooled:
    """DerSimonian and Laird's random-effects mean: sites as a sample from many sites.

    Args:
        values: One estimate a site.
        variances: Their sampling variances, positive.
        level: Of confidence.

    Raises:
        Undefined: With fewer than two sites.
        ValueError: If a variance is not positive.
    """
    y, v = np.asarray(values, float), np.asarray(variances, float)
    if len(y) < 2:
        raise Undefined("random effects need at least two sites")
    if not np.all(v > 0):
        raise ValueError("every site needs a positive sampling variance")
    w = 1 / v
    fixed = (w @ y) / w.sum()
    q = float(w @ (y - fixed) ** 2)  # Cochran's Q
    df = len(y) - 1
    tau2 = max(0.0, (q - df) / float(w.sum() - (w @ w) / w.sum()))
    star = 1 / (v + tau2)
    mean, half = float((star @ y) / star.sum()), z_of(level) / np.sqrt(star.sum())
    how = f"DerSimonian-Laird random effects over {len(y)} sites"
    i2 = max(0.0, (q - df) / q) if q > 0 else 0.0
    return Pooled(Estimate(mean, float(mean - half), float(mean + half), len(y), how), tau2, i2)
