"""Simulate the coverage of the intervals of survival metrics and the type-I error of their comparison.

Run: ``python benchmarks/survival_coverage.py [repetitions]``. It prints the table of docs/explanation/evaluation.md, by
the product's own functions. Times are Weibull with a log hazard x, 27 % of patients are censored; a model knows x with
noise. Two models are equally good, and share a part of their noise. The true values are those of 100,000 patients.
"""

import sys
from collections.abc import Iterator

import numpy as np

from polyclinic.evaluation.records.predictions import Cases
from polyclinic.evaluation.sample import Sample
from polyclinic.evaluation.survival_metrics import SURVIVAL
from polyclinic.statistics.undefined import Array

TIMES = np.array([0.5, 1.0, 1.5])
METHODS = ("a", "b")
PATIENTS, SITES, SEEDS = (20, 50), 3, (1, 3)


def patients(n: int, rng: np.random.Generator) -> tuple[Array, Array, Array]:
    """Return log hazards [n], targets [n, 2 + m], and the noise that all models share [n]."""
    x = rng.normal(size=n)
    time = 1.2 * (rng.exponential(size=n) / np.exp(x)) ** (1 / 1.3)
    censored = rng.uniform(0.3, 4.0, n)
    seen = np.minimum(time, censored)
    return x, np.column_stack([seen, time <= censored, np.tile(TIMES, (n, 1))]), rng.normal(size=n)


def predicted(x: Array, common: Array, rng: np.random.Generator) -> Array:
    """Return a model's probabilities of surviving beyond each time. [n, m]"""
    noisy = 0.8 * x + 0.4 * common + 0.3 * rng.normal(size=len(x))
    return np.exp(-np.exp(noisy)[:, None] * (TIMES / 1.2) ** 1.3)


def truths(rng: np.random.Generator, size: int = 100_000, block: int = 2000) -> dict[str, float]:
    """Return the value of each metric for very many patients, as the mean over blocks of them."""
    found: dict[str, list[float]] = {name: [] for name in SURVIVAL}
    for _ in range(size // block):
        x, target, common = patients(block, rng)
        score = predicted(x, common, rng)
        for name, metric in SURVIVAL.items():
            found[name].append(metric.of(score, target))
    return {name: float(np.mean(values)) for name, values in found.items()}


def study(n: int, seeds: int, rng: np.random.Generator) -> Sample:
    """Return the test cases of one simulated study."""
    cases: dict[tuple[str, int], dict[str, Cases]] = {(m, s): {} for m in METHODS for s in range(seeds)}
    ids = np.arange(n)
    for k in range(SITES):
        x, target, common = patients(n, rng)
        for arm in cases.values():
            arm[f"site-{k}"] = Cases(ids, predicted(x, common, rng), target, {}, n)
    where = {(f"site-{k}", s): ids for k in range(SITES) for s in range(seeds)}
    return Sample(cases, where, True, 0.95, {f"site-{k}": (n, n) for k in range(SITES)})


def rates(n: int, seeds: int, repetitions: int, truth: dict[str, float]) -> dict[str, tuple[float, ...]]:
    """Return for each metric the type-I error, the coverages of the mean and of a site, and the share with an interval."""
    rng, sites = np.random.default_rng([n, seeds]), [f"site-{k}" for k in range(SITES)]
    counts = {name: np.zeros(6) for name in SURVIVAL}
    for _ in range(repetitions):
        data = study(n, seeds, rng)
        for name, metric in SURVIVAL.items():
            d = data.difference("a", "b", sites, metric) if metric.higher_is_better is not None else None
            wrong = d is not None and d.p is not None and d.p < 0.05
            for place, e in (
                (1, data.macro_estimate("a", sites, metric)),
                (3, data.estimate("a", sites[:1], metric, True)),
            ):
                if e.low is not None and e.high is not None:
                    counts[name][place] += e.low <= truth[name] <= e.high
                    counts[name][place + 1] += 1
            counts[name][0] += wrong
    return {
        name: (c[0] / repetitions, c[1] / max(c[2], 1), c[3] / max(c[4], 1), c[4] / repetitions)
        for name, c in counts.items()
    }


def table(repetitions: int) -> Iterator[str]:
    """Yield the lines of the table."""
    truth = truths(np.random.default_rng(1))
    yield "| metric | true value | seeds | " + " | ".join(f"n = {n}" for n in PATIENTS) + " |"
    yield "|---|---:|---:|" + "---:|" * len(PATIENTS)
    for seeds in SEEDS:
        found = {n: rates(n, seeds, repetitions, truth) for n in PATIENTS}
        for name, metric in SURVIVAL.items():
            cells = []
            for n in PATIENTS:
                error, mean, site, known = found[n][name]
                tested = f"{error:.3f}" if metric.higher_is_better is not None else "–"
                cells.append(f"{tested} / {mean:.3f} / {site:.3f} ({known:.2f})")
            yield f"| {metric.label} | {truth[name]:.3f} | {seeds} | {' | '.join(cells)} |"


if __name__ == "__main__":
    for line in table(int(sys.argv[1]) if len(sys.argv) > 1 else 1000):
        print(line, flush=True)
