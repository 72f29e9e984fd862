"""Bootstrap weights of a run's patients, the same for all methods, and the intervals computed from them.

Seeds may share their test patients (one split for all) or have different splits. If a patient has the same number in
every seed, as in runs of this version, the patient has the same weight in all seeds, and a draw of a mean over seeds is
the mean of the seeds' draws. If every seed numbers its own test patients, patients in several test sets cannot be
identified. The limits of a mean over seeds are then the means of the seeds' limits, which is exact for equal test sets
and conservative for others. With folds, the predictions of a seed are those of all folds together, each patient once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyclinic.evaluation.metric import Metric
from polyclinic.evaluation.records.predictions import Cases, as_cases
from polyclinic.evaluation.records.run_reader import Run
from polyclinic.statistics.intervals import Estimate, bca, delong, percentile, resamples
from polyclinic.statistics.paired_tests import Difference, difference, over_seeds
from polyclinic.statistics.undefined import Array

JACKKNIFE = 600  # patients above which the percentile interval is as good and much cheaper
Where = tuple[str, int]  # a site, and a seed


@dataclass(frozen=True)
class Sample:
    """A run's test cases, and weights for its patients.

    Attributes:
        cases: By (method label, seed), then site.
        patients: By site and seed, the patients that any method tested, ascending.
        weights: By site and seed, [1 + draws, patients]; the first row is all ones.
        shared: Whether a patient has the same number in every seed.
        images: Numbers of tested images and of cases by site, over all method runs.
        level: Confidence level.
        seed: Seed of the draws.
    """

    cases: Mapping[tuple[str, int], Mapping[str, Cases]]
    patients: Mapping[Where, NDArray[np.int64]]
    weights: Mapping[Where, Array]
    shared: bool
    level: float
    seed: int
    images: Mapping[str, tuple[int, int]]

    @property
    def one_split(self) -> bool:
        """Whether every seed tested the same patients, as far as the numbers show."""
        return self.shared and all(
            len({c.patient.tobytes() for c in (arm[site] for arm in self.cases.values() if site in arm)}) == 1
            for site in self.sites
        )

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites at which any method was tested."""
        return tuple(dict.fromkeys(site for site, _ in self.weights))

    def seeds(self, label: str) -> tuple[int, ...]:
        """Return the seeds for which ``label`` has predictions."""
        return tuple(seed for method, seed in self.cases if method == label and self.cases[method, seed])

    def has(self, label: str, sites: Sequence[str]) -> bool:
        """Return whether every seed of ``label`` has cases at each of ``sites``."""
        seeds = self.seeds(label)
        return bool(seeds) and all(site in self.cases[label, seed] for seed in seeds for site in sites)

    def count(self, site: str) -> tuple[int, int, int]:
        """Return the numbers of test patients, images and cases of ``site``; the largest over seeds if not shared."""
        patients = max(len(ids) for (name, _), ids in self.patients.items() if name == site)
        return patients, *self.images[site]

    def draws(self, label: str, sites: Sequence[str], metric: Metric) -> Array:
        """Compute the metric of ``label`` over the pooled cases of ``sites``: [seeds, 1 + draws]."""
        return np.stack([self._draws(label, seed, sites, metric, self.weights) for seed in self.seeds(label)])

    def _draws(
        self, label: str, seed: int, sites: Sequence[str], metric: Metric, weights: Mapping[Where, Array]
    ) -> Array:
        here = [self.cases[label, seed][s] for s in sites]
        columns = [
            weights[s, seed][:, np.searchsorted(self.patients[s, seed], c.patient)]
            for s, c in zip(sites, here, strict=True)
        ]
        score, target = _together(here, metric.name)
        return metric.kernel(score, target, np.concatenate(columns, axis=1))

    def macro(self, label: str, sites: Sequence[str], metric: Metric) -> Array:
        """Compute the mean over those of ``sites`` for which the metric is defined: [seeds, 1 + draws].

        A draw without one of the classes at a site is omitted for that site only.
        """
        each = [d for d in (self.draws(label, [s], metric) for s in sites) if np.isfinite(d[:, 0]).all()]
        if not each:
            return np.full((len(self.seeds(label)), 1 + self._count()), np.nan)
        return np.asarray(np.mean([self._redrawn(d) for d in each], axis=0))

    def _redrawn(self, draws: Array) -> Array:
        """Replace each undefined draw of a site, [seeds, 1 + draws], by a defined one.

        Sites are drawn independently, so the result has the distribution of draws that are defined at every site. The
        replacement depends only on the drawn patients, so that methods remain paired.
        """
        found, known = draws.copy(), np.isfinite(draws[:, 1:])
        if (known.mean(axis=1) < 0.5).any():
            return found  # too few patients of one class to resample
        for rows in [np.arange(len(draws))] if self.shared else np.arange(len(draws))[:, None]:
            whole = known[rows].all(axis=0)
            good, bad = 1 + np.flatnonzero(whole), 1 + np.flatnonzero(~whole)
            if len(good):
                found[np.ix_(rows, bad)] = draws[np.ix_(rows, np.resize(good, len(bad)))]
        return found

    def over_seeds(self, draws: Array) -> Array:
        """Return draws of the mean over seeds, [seeds, draws] -> [draws]; by quantiles if the splits differ."""
        return np.asarray((draws if self.shared else np.sort(draws, axis=1)).mean(0))

    def macro_estimate(self, label: str, sites: Sequence[str], metric: Metric) -> Estimate:
        """Return the mean over sites with its percentile interval."""
        n = self._patients(label, sites)
        each = self.macro(label, sites, metric)
        value = float(each[:, 0].mean())
        if not np.isfinite(value):
            return Estimate(None, n=n, why="no site has a value")
        limits = percentile(self.over_seeds(each[:, 1:]), self.level)
        if limits is None:
            return Estimate(value, n=n, why="no interval: too few patients to resample")
        return Estimate(value, *limits, n, self._how("percentile"))

    def estimate(self, label: str, sites: Sequence[str], metric: Metric, interval: bool) -> Estimate:
        """Return the metric over the pooled cases of ``sites``, averaged over seeds, with or without its interval."""
        n, seeds = self._patients(label, sites), self.seeds(label)
        plain = {w: np.ones((1, len(p))) for w, p in self.patients.items()}
        values = [float(self._draws(label, seed, sites, metric, plain)[0]) for seed in seeds]
        value = float(np.mean(values))
        if not np.isfinite(value):
            bad = seeds[int(np.flatnonzero(~np.isfinite(values))[0])]
            return Estimate(None, n=n, why=metric.why(_together(self._cases(label, bad, sites), metric.name)[1]))
        if not interval:
            return Estimate(value, n=n)
        groups = [seeds] if self.shared else [(seed,) for seed in seeds]
        found = [self._interval(label, group, sites, metric) for group in groups]
        if any(e.low is None for e in found) or n < 2:
            return Estimate(value, n=n, why=next((e.why for e in found if e.why), "no interval: one patient"))
        low, high = (float(np.mean([getattr(e, k) for e in found])) for k in ("low", "high"))
        return Estimate(value, low, high, n, found[0].how + ("" if len(found) == 1 else "; mean of the seeds’ limits"))

    def _interval(self, label: str, seeds: Sequence[int], sites: Sequence[str], metric: Metric) -> Estimate:
        """Return the interval of the mean over ``seeds``, which share their patients."""
        if metric.name == "auc" and (exact := self._delong(label, seeds, sites)) is not None:
            return exact
        draws = np.mean([self._draws(label, s, sites, metric, self.weights) for s in seeds], axis=0)
        ids, name = self.patients[sites[0], seeds[0]], "percentile"
        if len(sites) == 1 and 2 <= len(ids) <= JACKKNIFE:
            without = {(sites[0], s): 1.0 - np.eye(len(ids)) for s in seeds}
            left = np.mean([self._draws(label, s, sites, metric, without) for s in seeds], axis=0)
            limits, name = bca(float(draws[0]), draws[1:], left, self.level), "BCa"
        else:
            limits = percentile(draws[1:], self.level)
        if limits is None:
            return Estimate(float(draws[0]), why="no interval: too few patients to resample")
        return Estimate(float(draws[0]), *limits, how=self._how(name))

    def _delong(self, label: str, seeds: Sequence[int], sites: Sequence[str]) -> Estimate | None:
        """Return DeLong's interval; None unless there are two classes and every seed tested the same cases."""
        arms = [self._cases(label, seed, sites) for seed in seeds]
        scores, targets = zip(*(_together(arm, "auc") for arm in arms), strict=True)
        if scores[0].shape[1] != 2 or targets[0].ndim != 1:
            return None
        ids = [np.concatenate([c.patient * len(sites) + i for i, c in enumerate(arm)]) for arm in arms]
        same = (np.array_equal(a, ids[0]) and np.array_equal(t, targets[0]) for a, t in zip(ids, targets, strict=True))
        if not all(same):
            return None
        clustered = len(np.unique(ids[0])) < len(ids[0])
        return delong(np.stack([s[:, 1] for s in scores]), targets[0] == 1, ids[0] if clustered else None, self.level)

    def paired(self, a: str, b: str, sites: Sequence[str], metric: Metric) -> Array:
        """Return method ``a`` minus ``b``, averaged over ``sites``; positive is better. [common seeds, 1 + draws]"""
        common = [s for s in self.seeds(a) if s in self.seeds(b)]
        sign = -1.0 if metric.higher_is_better is False else 1.0
        rows = [[self.seeds(m).index(s) for s in common] for m in (a, b)]
        return sign * (self.macro(a, sites, metric)[rows[0]] - self.macro(b, sites, metric)[rows[1]])

    def by_split(self, a: str, b: str, sites: Sequence[str], metric: Metric) -> list[float]:
        """Return method ``a`` minus ``b`` in each split, averaged over those of ``sites`` at which both were tested."""
        sign = -1.0 if metric.higher_is_better is False else 1.0
        plain = {w: np.ones((1, len(p))) for w, p in self.patients.items()}
        found = []
        for seed in [s for s in self.seeds(a) if s in self.seeds(b)]:
            both = [s for s in sites if s in self.cases[a, seed] and s in self.cases[b, seed]]
            each = [[float(self._draws(m, seed, [s], metric, plain)[0]) for m in (a, b)] for s in both]
            known = [x - y for x, y in each if np.isfinite(x) and np.isfinite(y)]
            if known:
                found.append(sign * float(np.mean(known)))
        return found

    def difference(self, a: str, b: str, sites: Sequence[str], metric: Metric) -> Difference:
        """Return method ``a`` minus ``b``; with several seeds, the interval includes the variance between seeds."""
        if not sites or not set(self.seeds(a)) & set(self.seeds(b)):
            return Difference(None, why="no seed or no site in common")
        d, n = self.paired(a, b, sites, metric), self._patients(a, sites)
        if len(d) == 1:
            return difference(float(d[0, 0]), d[0, 1:], n, self.level, self._how("paired percentile"))
        how = self._how("paired").replace(",", f" and variance between {len(d)} seeds,", 1)
        return over_seeds(d[:, 0], self.over_seeds(d[:, 1:]), n, self.level, how)

    def _cases(self, label: str, seed: int, sites: Sequence[str]) -> list[Cases]:
        return [self.cases[label, seed][s] for s in sites]

    def _patients(self, label: str, sites: Sequence[str]) -> int:
        return sum(max(len(self.patients[s, seed]) for seed in self.seeds(label)) for s in sites)

    def _count(self) -> int:
        return len(next(iter(self.weights.values()))) - 1

    def _how(self, name: str) -> str:
        return f"{name} bootstrap over patients, {self._count()} draws, seed {self.seed}"


def _together(cases: Sequence[Cases], metric: str) -> tuple[Array, NDArray[Any]]:
    return np.concatenate([c.score_for(metric) for c in cases]), np.concatenate([c.target for c in cases])


def sample(run: Run, draws: int, seed: int, level: float, unit: str = "patient") -> Sample:
    """Convert a run's predictions to cases, and draw the weights of its patients.

    Raises:
        ValueError: If ``unit`` is neither ``"patient"`` nor ``"image"``.
    """
    regression = run.info.task == "regression"
    cases = {
        arm: {s: as_cases(p, unit, regression) for s, p in sites.items()} for arm, sites in run.arms.items() if sites
    }
    shared, patients, weights = share_patients(cases), dict[Where, NDArray[np.int64]](), dict[Where, Array]()
    seeds = list(dict.fromkeys(s for _, s in cases))
    for i, site in enumerate(s.name for s in run.info.sites):
        for group in [seeds] if shared else [[s] for s in seeds]:
            here = [sites[site].patient for (_, s), sites in cases.items() if s in group and site in sites]
            if here:
                ids = np.unique(np.concatenate(here))
                key = [seed, 0, i] if shared else [seed, 0, i, group[0]]
                drawn = resamples(len(ids), draws, np.random.default_rng(key))
                mine = np.concatenate([np.ones((1, len(ids))), drawn])
                patients |= {(site, s): ids for s in group}
                weights |= {(site, s): mine for s in group}
    return Sample(cases, patients, weights, shared, level, seed, _images(run, cases, shared))


def by_fold(run: Run, level: float) -> Sample:
    """Return the test cases of each fold separately, with folds in place of seeds, without draws."""
    numbers = {key: i for i, key in enumerate(sorted({(seed, fold) for _, seed, fold in run.splits}))}
    arms = {(label, numbers[seed, fold]): sites for (label, seed, fold), sites in run.splits.items()}
    return sample(replace(run, arms=arms, splits={}), 1, 0, level)


def _images(run: Run, cases: Mapping[tuple[str, int], Mapping[str, Cases]], shared: bool) -> dict[str, tuple[int, int]]:
    """Return the numbers of images and cases of each site, over all method runs; the largest if not shared."""
    found: dict[str, tuple[int, int]] = {}
    for site in (s.name for s in run.info.sites):
        here = [(run.arms[arm][site], sites[site]) for arm, sites in cases.items() if site in sites]
        if here and not shared:
            found[site] = max(c.images for _, c in here), max(len(c.patient) for _, c in here)
        elif here:
            images: dict[int, int] = {}
            rows = set[tuple[int, bytes]]()
            for p, c in here:
                ids, counts = np.unique(p.patient, return_counts=True)
                images |= dict(zip(ids.tolist(), counts.tolist(), strict=True))
                rows |= {(int(i), np.asarray(t).tobytes()) for i, t in zip(c.patient, c.target, strict=True)}
            found[site] = sum(images.values()), len(rows)
    return found


def share_patients(cases: Mapping[tuple[str, int], Mapping[str, Cases]]) -> bool:
    """Return whether a number denotes the same patient in every seed, as far as numbers and targets show.

    Numbers that are specific to a seed range from 0 to n − 1 in each seed, and differ between seeds in n or in the
    patients' targets.
    """
    found: dict[str, dict[int, list[tuple[int, bytes]]]] = {}
    for (_, seed), sites in cases.items():
        for site, c in sites.items():
            rows = [(int(p), np.asarray(t).tobytes()) for p, t in zip(c.patient, c.target, strict=True)]
            found.setdefault(site, {}).setdefault(seed, rows)
    for seeds in found.values():
        fresh = all({p for p, _ in rows} == set(range(len({p for p, _ in rows}))) for rows in seeds.values())
        first = next(iter(seeds.values()))
        if fresh and any(rows != first for rows in seeds.values()):
            return False
    return True
