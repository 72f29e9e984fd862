"""The draws behind every interval of a run: which patients count how often, the same for all methods and seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyclinic.studies.compare import Difference, difference
from polyclinic.studies.intervals import Estimate, bca, delong, percentile, resamples
from polyclinic.studies.metrics import Array, Metric
from polyclinic.studies.predictions import Cases, as_cases
from polyclinic.studies.records import Run

JACKKNIFE = 600  # patients above which the percentile interval is as good and much cheaper


@dataclass(frozen=True)
class Sample:
    """A run's test cases, and weights for its patients.

    Attributes:
        cases: By (method label, seed), then site.
        patients: By site, the patients that any arm tested, ascending.
        weights: By site, [1 + draws, patients]; the first row is all ones.
        level: Of confidence.
        seed: Of the draws.
    """

    cases: Mapping[tuple[str, int], Mapping[str, Cases]]
    patients: Mapping[str, NDArray[np.int64]]
    weights: Mapping[str, Array]
    level: float
    seed: int

    def seeds(self, label: str) -> tuple[int, ...]:
        """The seeds for which ``label`` has predictions."""
        return tuple(seed for method, seed in self.cases if method == label and self.cases[method, seed])

    def has(self, label: str, sites: Sequence[str]) -> bool:
        """Whether every seed of ``label`` has cases at every one of ``sites``."""
        seeds = self.seeds(label)
        return bool(seeds) and all(site in self.cases[label, seed] for seed in seeds for site in sites)

    def count(self, site: str) -> tuple[int, int, int]:
        """Test patients, images and cases of ``site``: the most any arm has."""
        here = [arm[site] for arm in self.cases.values() if site in arm]
        return len(self.patients[site]), max(c.images for c in here), max(len(c.patient) for c in here)

    def draws(
        self, label: str, sites: Sequence[str], metric: Metric, weights: Mapping[str, Array] | None = None
    ) -> Array:
        """The metric of ``label`` over the cases of ``sites`` taken together: [seeds, 1 + draws]."""
        weights = self.weights if weights is None else weights
        return np.stack([self._draws(label, seed, sites, metric, weights) for seed in self.seeds(label)])

    def _draws(
        self, label: str, seed: int, sites: Sequence[str], metric: Metric, weights: Mapping[str, Array]
    ) -> Array:
        here = [self.cases[label, seed][s] for s in sites]
        columns = [
            weights[s][:, np.searchsorted(self.patients[s], c.patient)] for s, c in zip(sites, here, strict=True)
        ]
        score, target = _together(here, metric.name)
        return metric.kernel(score, target, np.concatenate(columns, axis=1))

    def macro(self, label: str, sites: Sequence[str], metric: Metric) -> Array:
        """The mean over those of ``sites`` where the metric is defined: [seeds, 1 + draws]."""
        each = [d for d in (self.draws(label, [s], metric) for s in sites) if np.isfinite(d[:, 0]).all()]
        if not each:
            return np.full((len(self.seeds(label)), 1 + self._count()), np.nan)
        return np.asarray(np.mean(each, axis=0))

    def macro_estimate(self, label: str, sites: Sequence[str], metric: Metric) -> Estimate:
        """The mean over sites with its percentile interval."""
        n = sum(len(self.patients[s]) for s in sites)
        values = self.macro(label, sites, metric).mean(0)
        if not np.isfinite(values[0]):
            return Estimate(None, n=n, why="no site has a value")
        limits = percentile(values[1:], self.level)
        if limits is None:
            return Estimate(float(values[0]), n=n, why="no interval: too few patients to resample")
        return Estimate(float(values[0]), *limits, n, self._how("percentile"))

    def estimate(self, label: str, sites: Sequence[str], metric: Metric, interval: bool) -> Estimate:
        """The metric over the cases of ``sites`` together, averaged over seeds, with or without its interval."""
        n = sum(len(self.patients[s]) for s in sites)
        plain = {s: np.ones((1, len(self.patients[s]))) for s in sites}
        value = float(self.draws(label, sites, metric, plain).mean())
        if not np.isfinite(value):
            return Estimate(None, n=n, why=metric.why(_together(self._first(label, sites), metric.name)[1]))
        if not interval:
            return Estimate(value, n=n)
        if metric.name == "auc" and (exact := self._delong(label, sites)) is not None:
            return exact
        draws, name = self.draws(label, sites, metric).mean(0)[1:], "percentile"
        if len(sites) == 1 and 2 <= n <= JACKKNIFE:
            left = self.draws(label, sites, metric, {sites[0]: 1.0 - np.eye(n)}).mean(0)
            limits, name = bca(value, draws, left, self.level), "BCa"
        else:
            limits = percentile(draws, self.level)
        if limits is None or n < 2:
            return Estimate(value, n=n, why="no interval: too few patients to resample")
        return Estimate(value, *limits, n, self._how(name))

    def _delong(self, label: str, sites: Sequence[str]) -> Estimate | None:
        """DeLong's interval, where there are two classes and every seed tested the same cases."""
        arms = [[self.cases[label, seed][s] for s in sites] for seed in self.seeds(label)]
        scores, targets = zip(*(_together(arm, "auc") for arm in arms), strict=True)
        if scores[0].shape[1] != 2 or targets[0].ndim != 1 or any(not np.array_equal(t, targets[0]) for t in targets):
            return None
        ids = [np.concatenate([c.patient * len(sites) + i for i, c in enumerate(arm)]) for arm in arms]
        if any(not np.array_equal(i, ids[0]) for i in ids):
            return None
        clustered = len(np.unique(ids[0])) < len(ids[0])
        return delong(np.stack([s[:, 1] for s in scores]), targets[0] == 1, ids[0] if clustered else None, self.level)

    def difference(self, a: str, b: str, sites: Sequence[str], metric: Metric) -> Difference:
        """Method ``a`` minus ``b``, mean over ``sites``, signed so that positive is better; paired."""
        common = [s for s in self.seeds(a) if s in self.seeds(b)]
        n = sum(len(self.patients[s]) for s in sites)
        if not common or not sites:
            return Difference(None, n=n, why="no seed or no site in common")
        sign = -1.0 if metric.higher_is_better is False else 1.0
        rows = [[self.seeds(m).index(s) for s in common] for m in (a, b)]
        d = sign * (self.macro(a, sites, metric)[rows[0]] - self.macro(b, sites, metric)[rows[1]])
        draws, how = d[:, 1:].mean(0), self._how("paired percentile")
        if len(common) > 1:  # another seed, another model: draw the seeds as well
            dice = np.random.default_rng([self.seed, 1])
            drawn = dice.integers(len(common), size=(len(common), d.shape[1] - 1))
            draws = np.take_along_axis(d[:, 1:], drawn, axis=0).mean(0)
            how = how.replace("over patients", "over patients and seeds")
        return difference(float(d[:, 0].mean()), draws, n, self.level, how)

    def _first(self, label: str, sites: Sequence[str]) -> list[Cases]:
        return [self.cases[label, self.seeds(label)[0]][s] for s in sites]

    def _count(self) -> int:
        return len(next(iter(self.weights.values()))) - 1

    def _how(self, name: str) -> str:
        return f"{name} bootstrap over patients, {self._count()} draws, seed {self.seed}"


def _together(cases: Sequence[Cases], metric: str) -> tuple[Array, NDArray[Any]]:
    return np.concatenate([c.score_for(metric) for c in cases]), np.concatenate([c.target for c in cases])


def sample(run: Run, draws: int, seed: int, level: float, unit: str = "patient") -> Sample:
    """Turns a run's predictions into cases, and draws the weights of its patients.

    Raises:
        ValueError: Where ``unit`` is neither ``"patient"`` nor ``"image"``.
    """
    regression = run.info.task == "regression"
    cases = {arm: {s: as_cases(p, unit, regression) for s, p in sites.items()} for arm, sites in run.arms.items()}
    patients, weights = {}, {}
    for i, site in enumerate(run.info.sites):
        here = [arm[site.name].patient for arm in cases.values() if site.name in arm]
        if here:
            patients[site.name] = np.unique(np.concatenate(here))
            size = len(patients[site.name])
            drawn = resamples(size, draws, np.random.default_rng([seed, 0, i]))
            weights[site.name] = np.concatenate([np.ones((1, size)), drawn])
    return Sample(cases, patients, weights, level, seed)
