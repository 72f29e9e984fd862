"""Estimates with confidence intervals whose unit is the patient.

- AUC: DeLong's variance, with Student's limits on the logit scale, so that they lie within 0 and 1; Newcombe's method 5
  for perfect separation (see ``auc``).
- Proportions: Clopper and Pearson, "The Use of Confidence or Fiducial Limits Illustrated in the Case of the Binomial",
  Biometrika 1934, https://doi.org/10.1093/biomet/26.4.404.
- Anything else: Student's limits with the jackknife's variance over patients (see ``jackknife``).
- Several sites as a sample of sites: DerSimonian and Laird, "Meta-analysis in clinical trials", Controlled Clinical
  Trials 1986, https://doi.org/10.1016/0197-2456(86)90046-2; Hartung and Knapp, "A refined method for the meta-analysis
  of controlled clinical trials with binary outcome", Statistics in Medicine 2001, https://doi.org/10.1002/sim.1009;
  for a new site, the confidence distribution of Nagashima, Noma and Furukawa, "Prediction intervals for random-effects
  meta-analysis: A confidence distribution approach", Statistical Methods in Medical Research 2019,
  https://doi.org/10.1177/0962280218773520, with quantiles of the generalized Q statistic in place of random draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv, expit, gammaincinv, gammaln, ndtri, stdtr, stdtrit

from polyclinic.statistics.auc import delong_parts, newcombe, placements
from polyclinic.statistics.jackknife import Spread
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
        without: Sites that a mean over sites leaves out, because they have no value.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0
    how: str = ""
    why: str = ""
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pooled:
    """A random-effects mean over sites.

    Attributes:
        estimate: The mean.
        tau2: The variance between sites.
        i2: I², 0 to 1.
        prediction: Limits within which the value of a new site is expected; None with fewer than three sites.
        shrunken: The value of each site, moved toward the mean by the share of its difference that sampling explains;
            empty with fewer than three sites.
    """

    estimate: Estimate
    tau2: float
    i2: float
    prediction: tuple[float, float] | None = None
    shrunken: tuple[Estimate, ...] = ()


def z_of(level: float) -> float:
    """Return the normal quantile of a two-sided interval: 1.96 for 0.95."""
    return float(ndtri(0.5 + level / 2))


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
    try:
        aucs, covariances, (with_pos, with_neg) = delong_parts(scores, y, patient)
    except Undefined as reason:
        value = float(np.mean([placements(s, y)[0].mean() for s in scores]))
        return Estimate(value, n=patients, why=f"no interval: {reason}")
    value = float(aucs.mean())
    parts = covariances.mean((1, 2))  # of the mean over seeds: 1ᵀ Σ 1 / k²
    variance = float(parts.sum())
    if variance <= 1e-14 or value in (0.0, 1.0):
        low, high = newcombe(value, int(y.sum()), int((~y).sum()), level)
        return Estimate(value, low, high, patients, "Newcombe's method 5 (perfect separation)")
    df = variance**2 / float(parts[0] ** 2 / (with_pos - 1) + parts[1] ** 2 / (with_neg - 1))
    low, high = student(value, Spread(variance, df), "logit", level)
    return Estimate(value, low, high, patients, "DeLong" if patient is None else "DeLong, clustered by patient")


def proportion(share: float, n: float, level: float = 0.95) -> tuple[float, float]:
    """Return the limits of Clopper and Pearson for a proportion, which cover at least at their level for every n.

    Args:
        share: The observed proportion.
        n: Number of independent units; an effective number need not be whole.
        level: Confidence level.
    """
    hits, tail = share * n, (1 - level) / 2
    low = float(betaincinv(hits, n - hits + 1, tail)) if share > 0 else 0.0
    high = float(betaincinv(hits + 1, n - hits, 1 - tail)) if share < 1 else 1.0
    return low, high


def effective_number(counts: Array) -> float:
    """Return Kish's effective number of units, ``(Σ m)² / Σ m²``, if unit i contributes ``m_i`` dependent cases."""
    return float(counts.sum() ** 2 / (counts**2).sum())


def student(value: float, spread: Spread, scale: str = "", level: float = 0.95) -> tuple[float, float]:
    """Return Student's limits of an estimate.

    Args:
        value: The estimate.
        spread: Its variance and degrees of freedom.
        scale: ``"logit"`` for values between 0 and 1, ``"log"`` for positive values: the limits are computed on that
            scale (delta method) and transformed back, unless the value lies at a limit of the scale. On the log scale
            one degree of freedom is deducted as long as two are left: such values are skewed, so that their variance
            is less certain than the variance of normal values (``benchmarks/coverage.py`` shows the coverage).
        level: Confidence level.
    """
    df = max(spread.df - 1, min(spread.df, 2.0)) if scale == "log" else spread.df
    half = float(stdtrit(df, 0.5 + level / 2)) * spread.variance**0.5
    if scale == "logit" and 0 < value < 1:
        center, half = np.log(value / (1 - value)), half / (value * (1 - value))
        return float(expit(center - half)), float(expit(center + half))
    if scale == "log" and value > 0:
        ratio = float(np.exp(min(half / value, 50.0)))
        return value / ratio, value * ratio
    return value - half, value + half


def mean_of_limits(estimates: Sequence[Estimate], weights: Sequence[float] | None = None) -> tuple[float, float]:
    """Return the limits of a mean of independent estimates from their own limits.

    The distances from value to limit are combined by the root of their sum of squares (the method of variance estimates
    recovery; Zou and Donner, Statistics in Medicine 2008, https://doi.org/10.1002/sim.3095). Sites at which every
    prediction is correct, with a variance of 0, thereby keep their uncertainty.

    Args:
        estimates: The estimates, with limits.
        weights: Their weights, which sum to 1; equal by default. A weight of −1 after one of 1 gives a difference.
    """
    value, low, high = (np.array([getattr(e, k) for e in estimates], float) for k in ("value", "low", "high"))
    w = np.full(len(value), 1 / len(value)) if weights is None else np.asarray(weights, float)
    mean = float(w @ value)
    down, up = np.where(w > 0, value - low, high - value), np.where(w > 0, high - value, value - low)
    return mean - float(np.sqrt(((w * down) ** 2).sum())), mean + float(np.sqrt(((w * up) ** 2).sum()))


def pool_sites(values: Sequence[float] | Array, variances: Sequence[float] | Array, level: float = 0.95) -> Pooled:
    """Compute a random-effects mean, for which sites are a sample from many sites.

    The variance between sites is DerSimonian and Laird's; the interval is Hartung and Knapp's with Student's quantile,
    never narrower than with a factor of 1. The prediction interval for a new site integrates over the confidence
    distribution of the variance between sites, because an estimated variance of 0 is no evidence that sites are equal.
    So do the shrunken values of the sites (empirical Bayes): the worst of several observed values is too low, because
    the site with the worst luck is selected, and its shrunken value corrects for that.

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
    mean = float((star @ y) / star.sum())
    se = float(np.sqrt(max(1.0, float(star @ (y - mean) ** 2) / df) / star.sum()))
    half = float(stdtrit(df, 0.5 + level / 2)) * se
    how = f"random effects over {len(y)} sites, Hartung-Knapp"
    i2 = max(0.0, (q - df) / q) if q > 0 else 0.0
    estimate = Estimate(mean, mean - half, mean + half, len(y), how)
    if df < 2:
        return Pooled(estimate, tau2, i2)
    possible = _between_sites(y, v)
    return Pooled(estimate, tau2, i2, _prediction(y, v, possible, level), _shrunken(y, v, possible, level))


def _between_sites(y: Array, v: Array) -> Array:
    """Return 99 quantiles of the confidence distribution of τ²: the values with Q(τ²) equal to a quantile of χ²."""
    quantiles = 2 * gammaincinv((len(y) - 1) / 2, (np.arange(99) + 0.5) / 99)
    tau2 = np.zeros(99)  # by bisection; Q falls with τ²
    high = np.full(99, 10 * float(np.var(y) * len(y) + v.max()) / max(float(quantiles[0]), 1e-6))
    for _ in range(40):
        middle = (tau2 + high) / 2
        above = _moments(y, v, middle)[2] > quantiles
        tau2, high = np.where(above, middle, tau2), np.where(above, high, middle)
    return tau2


def _prediction(y: Array, v: Array, tau2: Array, level: float) -> tuple[float, float]:
    """Return the prediction interval of a new site's value."""
    df = len(y) - 1
    mean, variance, q = _moments(y, v, tau2)
    low, high = _mixture_limits(mean[None], np.sqrt(tau2 + variance * np.maximum(1.0, q / df))[None], df, level)
    return float(low[0]), float(high[0])


def _shrunken(y: Array, v: Array, tau2: Array, level: float) -> tuple[Estimate, ...]:
    """Return each site's value ``B μ + (1 − B) y``, ``B = v / (τ² + v)``, averaged over the distribution of τ²."""
    df = len(y) - 1
    mean, variance, q = _moments(y, v, tau2)
    pull = v[:, None] / (tau2 + v[:, None])  # B, [sites, quantiles]
    center = pull * mean + (1 - pull) * y[:, None]
    low, high = _mixture_limits(center, np.sqrt(tau2 * pull + pull**2 * variance * np.maximum(1.0, q / df)), df, level)
    means = center.mean(1)
    return tuple(
        Estimate(float(m), float(a), float(b), how="empirical Bayes") for m, a, b in zip(means, low, high, strict=True)
    )


def _mixture_limits(center: Array, sd: Array, df: int, level: float) -> tuple[Array, Array]:
    """Return the central intervals of equal mixtures of Student's distributions. [n, k] -> [n]

    Newton's method on the mixture's distribution function, with a bisection wherever a step would leave the bracket.
    """
    quantile = float(stdtrit(df, 0.5 + level / 2))
    tails = np.array([(1 - level) / 2, (1 + level) / 2])[:, None]
    wide = quantile * sd.max(1)
    bottom, top = (np.tile(edge, (2, 1)) for edge in (center.min(1) - wide, center.max(1) + wide))
    half = quantile * np.sqrt(center.var(1) + (sd**2).mean(1))
    x = center.mean(1) + np.array([-1.0, 1.0])[:, None] * half
    scale = np.exp(gammaln((df + 1) / 2) - gammaln(df / 2)) / np.sqrt(df * np.pi)
    for _ in range(60):
        z = (x[..., None] - center) / sd
        excess = stdtr(df, z).mean(2) - tails
        density = (scale * (1 + z**2 / df) ** (-(df + 1) / 2) / sd).mean(2)
        bottom, top = np.where(excess < 0, x, bottom), np.where(excess < 0, top, x)
        nearer = x - excess / np.maximum(density, 1e-300)
        nearer = np.where((nearer >= bottom) & (nearer <= top), nearer, (bottom + top) / 2)
        moved, x = np.abs(nearer - x), nearer
        if np.all(moved <= 1e-11 * wide):
            break
    return x[0], x[1]


def _moments(y: Array, v: Array, tau2: Array) -> tuple[Array, Array, Array]:
    """Return the weighted mean, its variance, and Q for each τ²."""
    w = 1 / (v + tau2[:, None])
    mean = (w @ y) / w.sum(1)
    return mean, 1 / w.sum(1), (w * (y - mean[:, None]) ** 2).sum(1)
