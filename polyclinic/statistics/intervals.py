"""Estimates with confidence intervals whose unit is the patient.

- AUC: DeLong's variance, with limits on the logit scale, so that they lie within 0 and 1; Newcombe's method 5 for
  perfect separation (see ``auc``).
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
from scipy.stats import norm

from polyclinic.statistics.auc import delong_covariance, newcombe, placements
from polyclinic.statistics.undefined import Array, Ints, Undefined


@dataclass(frozen=True)
class Estimate:
    """A value with its confidence interval and the method of computation.

    Attributes:
        value: None if the cases do not determine it; ``why`` then gives the reason.
        low: Lower confidence limit; None if there is no interval.
        high: Upper confidence limit.
        n: Number of patients.
        how: Method of the interval.
        why: Reason why there is no value or no interval.
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
    """Return the normal quantile of a two-sided interval: 1.96 for 0.95."""
    return float(norm.ppf(0.5 + level / 2))


def delong(score: Array, positive: NDArray[Any], patient: Ints | None = None, level: float = 0.95) -> Estimate:
    """Compute the AUC with DeLong's interval.

    Args:
        score: [cases], or [seeds, cases] for the mean AUC of several runs.
        positive: [cases], 0 or 1.
        patient: [cases]. Cases of one patient may be dependent. By default each case is its own patient.
        level: Confidence level.

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


def resamples(patients: int, count: int, rng: np.random.Generator) -> Array:
    """Return how often each patient is drawn in each of ``count`` draws with replacement. [count, patients]"""
    if patients == 0:
        return np.zeros((count, 0))
    return rng.multinomial(patients, np.full(patients, 1.0 / patients), size=count).astype(float)


def percentile(draws: Array, level: float = 0.95) -> tuple[float, float] | None:
    """Return the percentile interval of the defined bootstrap values; None if fewer than half are defined."""
    known = draws[np.isfinite(draws)]
    if len(known) < max(0.5 * len(draws), 20):
        return None
    low, high = np.quantile(known, [0.5 - level / 2, 0.5 + level / 2])
    return float(low), float(high)


def bca(value: float, draws: Array, jackknife: Array, level: float = 0.95) -> tuple[float, float] | None:
    """Return the bias-corrected and accelerated interval.

    Args:
        value: The estimate.
        draws: [b], its bootstrap values.
        jackknife: [n], its values without one patient.
        level: Confidence level.

    Returns:
        The limits; the percentile interval if the jackknife values are equal; None if too few draws are defined.
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
    """Compute a statistic with its bootstrap interval over patients.

    Args:
        statistic: Maps weights of patients [b, patients] to values [b], NaN if undefined.
        patients: Number of patients.
        count: Number of draws.
        level: Confidence level.
        seed: Seed of the draws.
        method: ``"bca"`` or ``"percentile"``.

    Raises:
        ValueError: If ``method`` is unknown.
    """
    if method not in ("bca", "percentile"):
        raise ValueError(f"unknown bootstrap interval {method!r}; use 'bca' or 'percentile'")
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
    """Compute DerSimonian and Laird's random-effects mean, for which sites are a sample from many sites.

    Args:
        values: One estimate per site.
        variances: Their sampling variances, positive.
        level: Confidence level.

    Raises:
        Undefined: If there are fewer than two sites.
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
