"""Simulate the coverage of every interval and the type-I error of every verdict of the evaluation.

Run: ``python benchmarks/coverage.py [repetitions]``. It prints the tables of docs/explanation/evaluation.md. The
formulas are written here a second time, over arrays of repetitions; tests/evaluation/test_coverage.py holds them equal
to the product's and runs a small simulation. Patients have an effect that all methods and seeds share; methods and
seeds have effects of their own. The two compared methods are equally good.

Arrays are of shape [repetitions, sites, seeds, patients]; the first half of a site's patients is positive.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import stats

from polyclinic.statistics.auc import newcombe
from polyclinic.statistics.intervals import pool_sites
from polyclinic.statistics.paired_tests import FEWEST
from polyclinic.statistics.undefined import Array

METRICS = {"auc": "AUC", "accuracy": "Accuracy", "dice": "Dice", "mae": "Mean absolute error"}
SCALE = {"auc": "logit", "dice": "logit", "mae": "log", "accuracy": ""}
PATIENTS, SEEDS, SITES = (5, 10, 20, 50), (1, 2, 3, 5), (3, 5, 8)
SKILL = 1.8  # distance of the classes in standard deviations: AUC 0.90, accuracy 0.82
MARGIN = {"auc": 0.05, "accuracy": 0.05, "dice": 0.02, "mae": 0.1}
TRUTH = {
    "auc": float(stats.norm.cdf(SKILL / 2**0.5)),
    "accuracy": float(stats.norm.cdf(SKILL / 2)),
    "dice": 0.8,
    "mae": (2 / np.pi) ** 0.5,
}


@dataclass(frozen=True)
class Trial:
    """Repeated studies of two methods.

    Attributes:
        metric: The metric.
        scores: One array per method: log odds, Dice, or errors.
        positives: Number of positive patients at each site.
    """

    metric: str
    scores: tuple[Array, Array]
    positives: int


def simulate(metric: str, patients: int, seeds: int, sites: int, repetitions: int, rng: np.random.Generator) -> Trial:
    """Return simulated studies."""
    common = rng.normal(size=(repetitions, sites, 1, patients))
    own = [rng.normal(size=(repetitions, sites, seeds, patients)) for _ in range(2)]
    if metric == "dice":
        base = rng.beta(8, 2, size=common.shape)
        return Trial(metric, (_dice(base, own[0]), _dice(base, own[1])), patients // 2)
    a, b = (0.7**0.5 * common + 0.3**0.5 * e for e in own)
    if metric == "mae":
        return Trial(metric, (a, b), patients // 2)
    side = SKILL * (np.arange(patients) < patients // 2) - SKILL / 2
    return Trial(metric, (a + side, b + side), patients // 2)


def _dice(base: Array, own: Array) -> Array:
    return np.asarray(np.clip(base + 0.03 * own, 0, 1))


def by_patient(trial: Trial, method: int) -> tuple[Array, Array]:
    """Return the metric [repetitions, sites, seeds], and pseudo-values averaged over seeds [.., sites, patients]."""
    x, m = trial.scores[method], trial.positives
    if trial.metric != "auc":
        if trial.metric == "mae":
            x = np.abs(x)
        elif trial.metric == "accuracy":
            x = ((x > 0) == (np.arange(x.shape[-1]) < m)).astype(float)
        return x.mean(-1), x.mean(2)
    wins = (x[..., :m, None] > x[..., None, m:]).astype(np.float32)
    n = x.shape[-1]
    total, rows, columns = (wins.sum(axis, dtype=float) for axis in ((-2, -1), -1, -2))
    value = total / (m * (n - m))
    without = np.concatenate(
        [
            (total[..., None] - rows) / ((m - 1) * (n - m)),
            (total[..., None] - columns) / (m * (n - m - 1)),
        ],
        -1,
    )
    return value, n * value.mean(2)[..., None] - (n - 1) * without.mean(2)


def spread(trial: Trial, pseudo: Array) -> tuple[Array, Array]:
    """Return variance and degrees of freedom at each site. [repetitions, sites]"""
    n, m = pseudo.shape[-1], trial.positives
    away = (pseudo - pseudo.mean(-1, keepdims=True)) ** 2 / (n * (n - 1))
    if trial.metric != "auc":
        return away.sum(-1), np.full(away.shape[:-1], n - 1.0)
    return added(
        np.stack([away[..., :m].sum(-1), away[..., m:].sum(-1)]), np.array([m - 1.0, n - m - 1.0])[:, None, None]
    )


def added(variances: Array, df: Array) -> tuple[Array, Array]:
    """Return the sum of variances over the first axis, with Satterthwaite's degrees of freedom."""
    total = variances.sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return total, np.where(total > 0, total**2 / (variances**2 / df).sum(0), 1.0)


def tested(trial: Trial, sites: slice) -> tuple[Array, Array, Array, Array]:
    """Return the difference, mean over ``sites``, its standard error, degrees of freedom, and whether it is tested."""
    (a, of_a), (b, of_b) = (by_patient(trial, k) for k in (0, 1))
    values, pseudo = (a - b)[:, sites].mean(1), (of_a - of_b)[:, sites]
    k, seeds = pseudo.shape[1], values.shape[1]
    variance, df = spread(trial, pseudo)
    total, free = added(variance.T / k**2, df.T)
    if seeds > 1:
        ours = values.var(1, ddof=1) / seeds
        total, free = added(np.stack([total, ours]), np.stack([free, np.full(len(free), seeds - 1.0)]))
    value, differing = values.mean(1), (np.abs(pseudo) > 1e-9).sum((1, 2))
    return value, np.sqrt(total), free, (differing >= FEWEST) & (total > 1e-12 * value**2)


def p_values(trial: Trial, sites: slice) -> Array:
    """Return p of the difference, mean over ``sites``; NaN if it is not tested. [repetitions]"""
    value, se, free, known = tested(trial, sites)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(known, 2 * stats.t.sf(np.abs(value) / se, free), np.nan))


def at_the_margin(trial: Trial) -> Trial:
    """Return the studies with a first method that is worse by exactly ``MARGIN``."""
    x, margin = trial.scores[0], MARGIN[trial.metric]
    if trial.metric == "dice":
        return Trial(trial.metric, (x - margin, trial.scores[1]), trial.positives)
    if trial.metric == "mae":
        return Trial(trial.metric, (x * (1 + margin / TRUTH["mae"]), trial.scores[1]), trial.positives)
    scale = 2**0.5 if trial.metric == "auc" else 2.0
    less = SKILL - scale * float(stats.norm.ppf(TRUTH[trial.metric] - margin))
    side = less * (np.arange(x.shape[-1]) < trial.positives) - less / 2
    return Trial(trial.metric, (x - side, trial.scores[1]), trial.positives)


def non_inferior(metric: str, patients: int, seeds: int, sites: int, repetitions: int) -> float:
    """Return how often non-inferiority is stated of a method that is worse by exactly the margin."""
    rng = np.random.default_rng([patients, seeds, sites, list(METRICS).index(metric), 7])
    hits, step = 0, max(1, 40_000 // (patients * sites * seeds))
    for start in range(0, repetitions, step):
        trial = at_the_margin(simulate(metric, patients, seeds, sites, min(step, repetitions - start), rng))
        value, se, free, known = tested(trial, slice(None))
        value = -value if metric == "mae" else value
        with np.errstate(divide="ignore", invalid="ignore"):
            hits += int((known & (stats.t.sf((value + MARGIN[metric]) / se, free) < 0.025)).sum())
    return hits / repetitions


def site_limits(trial: Trial) -> tuple[Array, Array, Array]:
    """Return the value and the limits of the first method at each site. [repetitions, sites]"""
    value, pseudo = by_patient(trial, 0)
    value, n, m = value.mean(2), pseudo.shape[-1], trial.positives
    if trial.metric == "accuracy":
        hits = value * n
        low = np.where(hits > 0, stats.beta.ppf(0.025, np.maximum(hits, 1e-9), n - hits + 1), 0)
        high = np.where(hits < n, stats.beta.ppf(0.975, hits + 1, np.maximum(n - hits, 1e-9)), 1)
        return value, low, high
    if trial.metric != "auc":
        return value, *student(value, *spread(trial, pseudo), SCALE[trial.metric])
    x = trial.scores[0]
    wins = (x[..., :m, None] > x[..., None, m:]).mean(2)
    parts = np.stack([wins.mean(-1).var(-1, ddof=1) / m, wins.mean(-2).var(-1, ddof=1) / (n - m)])
    variance, df = added(parts, np.array([m - 1.0, n - m - 1.0])[:, None, None])
    low, high = student(value, variance, df, "logit")
    perfect = (variance <= 1e-14) | (value == 1)
    edge = newcombe(1.0, m, n - m)
    return value, np.where(perfect, edge[0], low), np.where(perfect, edge[1], high)


def student(value: Array, variance: Array, df: Array, scale: str) -> tuple[Array, Array]:
    """Return Student's limits on a scale."""
    df = np.where(scale == "log", np.maximum(df - 1, np.minimum(df, 2)), df)
    half = stats.t.ppf(0.975, df) * np.sqrt(variance)
    with np.errstate(divide="ignore", invalid="ignore"):
        if scale == "logit":
            center, half = np.log(value / (1 - value)), half / (value * (1 - value))
            return 1 / (1 + np.exp(half - center)), 1 / (1 + np.exp(-half - center))
        return value * np.exp(-half / value), value * np.exp(half / value)


def mean_limits(trial: Trial) -> tuple[Array, Array, Array]:
    """Return the mean over sites of the first method, and its limits. [repetitions]"""
    if trial.metric in ("auc", "accuracy"):
        value, low, high = site_limits(trial)
        k, mean = value.shape[1], value.mean(1)
        return (
            mean,
            mean - np.sqrt(((value - low) ** 2).sum(1)) / k,
            mean + np.sqrt(((high - value) ** 2).sum(1)) / k,
        )
    value, pseudo = by_patient(trial, 0)
    variance, df = spread(trial, pseudo)
    mean = value.mean((1, 2))
    return mean, *student(mean, *added(variance.T / value.shape[1] ** 2, df.T), SCALE[trial.metric])


def cell(metric: str, patients: int, seeds: int, sites: int, repetitions: int, seed: int = 0) -> tuple[float, ...]:
    """Return type-I errors of the verdicts over sites and at a site, and coverages of the mean and of a site."""
    rng = np.random.default_rng([patients, seeds, sites, list(METRICS).index(metric), seed])
    found, step = [], max(1, 40_000 // (patients * sites * seeds))
    for start in range(0, repetitions, step):
        trial = simulate(metric, patients, seeds, sites, min(step, repetitions - start), rng)
        (_, low, high), (_, lows, highs) = mean_limits(trial), site_limits(trial)
        truth = TRUTH[metric]
        with np.errstate(invalid="ignore"):
            here = np.mean([p_values(trial, slice(k, k + 1)) < 0.05 for k in range(sites)], axis=0)
            over = p_values(trial, slice(None)) < 0.05
        covered = (lows <= truth) & (truth <= highs)
        found.append(np.stack([over, here, (low <= truth) & (truth <= high), covered.mean(1)]))
    return tuple(float(v) for v in np.concatenate(found, axis=1).mean(1))


def random_effects(sites: int, tau: float, repetitions: int) -> tuple[float, float, float]:
    """Return the coverage of the random-effects mean, of the prediction for a new site, and of the worst site."""
    rng = np.random.default_rng([sites, int(100 * tau)])
    mean = new = worst = 0
    for _ in range(repetitions):
        v, truth = rng.uniform(0.05, 0.3, sites), rng.normal(0, tau, sites)
        found = pool_sites(truth + rng.normal(0, v**0.5), v)
        lowest = min(range(sites), key=lambda i: found.shrunken[i].value or 0.0)
        low, high = found.shrunken[lowest].low, found.shrunken[lowest].high
        assert low is not None
        assert high is not None
        worst += low <= truth[lowest] <= high
        assert found.estimate.low is not None
        assert found.estimate.high is not None
        assert found.prediction is not None
        mean += found.estimate.low <= 0 <= found.estimate.high
        new += found.prediction[0] <= rng.normal(0, tau) <= found.prediction[1]
    return mean / repetitions, new / repetitions, worst / repetitions


def tables(repetitions: int) -> Iterator[str]:
    """Yield the lines of the tables."""
    for which, of in ((0, "mean over sites"), (1, "a site")):
        yield f"Type-I error of the verdict, {of} / coverage of the interval, {of}."
        yield ""
        yield "| metric | sites | seeds | " + " | ".join(f"n = {n}" for n in PATIENTS) + " |"
        yield "|---|---:|---:|" + "---:|" * len(PATIENTS)
        for metric, label in METRICS.items():
            for sites in SITES if which == 0 else (3,):
                for seeds in SEEDS:
                    cells = [cell(metric, n, seeds, sites, repetitions) for n in PATIENTS]
                    texts = [f"{c[which]:.3f} / {c[which + 2]:.3f}" for c in cells]
                    yield f"| {label} | {sites} | {seeds} | {' | '.join(texts)} |"
        yield ""
    yield "Non-inferiority stated of a method that is worse by exactly the margin (nominal: at most 0.025)."
    yield ""
    yield "| metric | margin | sites | seeds | " + " | ".join(f"n = {n}" for n in PATIENTS) + " |"
    yield "|---|---:|---:|---:|" + "---:|" * len(PATIENTS)
    for metric, label in METRICS.items():
        for sites in (3, 8):
            for seeds in (1, 3):
                rates = [f"{non_inferior(metric, n, seeds, sites, repetitions):.3f}" for n in PATIENTS]
                yield f"| {label} | {MARGIN[metric]} | {sites} | {seeds} | {' | '.join(rates)} |"
    yield ""
    yield "| sites | τ | random-effects mean | prediction for a new site | worst site, shrunken |"
    yield "|---:|---:|---:|---:|---:|"
    for sites in (3, 4, 6, 8):
        for tau in (0.0, 0.3, 0.6):
            found = random_effects(sites, tau, repetitions // 8)
            yield f"| {sites} | {tau} | {' | '.join(f'{x:.3f}' for x in found)} |"


if __name__ == "__main__":
    for line in tables(int(sys.argv[1]) if len(sys.argv) > 1 else 2000):
        print(line, flush=True)
