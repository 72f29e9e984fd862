"""The test cases of a run, and estimates, intervals and paired differences computed from them.

The unit is the patient: variances are jackknife variances over patients, or over 600 groups of patients at larger
sites. Seeds may share their test patients (one split for all) or have different splits. If a patient has the same
number in every seed, as in runs of this version, the patient is left out of all seeds at once. If every seed numbers
its own test patients, patients in several test sets cannot be identified; the limits of a mean over seeds are then the
means of the seeds' limits, which is exact for equal test sets and conservative for others. With folds, the predictions
of a seed are those of all folds together, each patient once.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyclinic.evaluation.metric import Metric
from polyclinic.evaluation.records.predictions import AVERAGED_TARGETS, Cases, as_cases, unit_of
from polyclinic.evaluation.records.run_reader import Run
from polyclinic.statistics.intervals import Estimate, delong, effective_number, mean_of_limits, proportion, student
from polyclinic.statistics.jackknife import Jackknife, Spread, added, mean_of_dependent
from polyclinic.statistics.paired_tests import Difference, Question, paired
from polyclinic.statistics.undefined import Array, Ints, Undefined

MOST = 600  # patients above which groups of patients are left out
BATCH = 200
"""Number of cases up to which a metric is computed for several sites at once."""
Where = tuple[str, int]  # a site, and a seed


@dataclass(frozen=True)
class Sample:
    """A run's test cases.

    Attributes:
        cases: By (method label, seed), then site.
        patients: By site and seed, the patients that any method tested, ascending.
        shared: Whether a patient has the same number in every seed.
        level: Confidence level.
        images: Numbers of tested images and of cases by site, over all method runs.
        unit: What a case is: ``"patient"`` or ``"image"``.
    """

    cases: Mapping[tuple[str, int], Mapping[str, Cases]]
    patients: Mapping[Where, NDArray[np.int64]]
    shared: bool
    level: float
    images: Mapping[str, tuple[int, int]]
    unit: str = "patient"
    _known: dict[tuple[Any, ...], Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def one_split(self) -> bool:
        """Whether every seed tested the same patients, as far as the numbers show."""
        return self.shared and all(
            len({c.patient.tobytes() for c in (arm[site] for arm in self.cases.values() if site in arm)}) == 1
            for site in self.sites
        )

    @cached_property
    def sites(self) -> tuple[str, ...]:
        """The sites at which any method was tested."""
        return tuple(dict.fromkeys(site for site, _ in self.patients))

    @cached_property
    def _seeds(self) -> dict[str, tuple[int, ...]]:
        seeds: dict[str, tuple[int, ...]] = {}
        for (label, seed), sites in self.cases.items():
            if sites:
                seeds[label] = (*seeds.get(label, ()), seed)
        return seeds

    @cached_property
    def _most_patients(self) -> dict[str, int]:
        """The number of test patients of each site, the largest over seeds."""
        most: dict[str, int] = {}
        for (site, _), ids in self.patients.items():
            most[site] = max(most.get(site, 0), len(ids))
        return most

    def seeds(self, label: str) -> tuple[int, ...]:
        """Return the seeds for which ``label`` has predictions."""
        return self._seeds.get(label, ())

    def has(self, label: str, sites: Sequence[str]) -> bool:
        """Return whether every seed of ``label`` has cases at each of ``sites``."""
        seeds = self.seeds(label)
        return bool(seeds) and all(site in self.cases[label, seed] for seed in seeds for site in sites)

    def count(self, site: str) -> tuple[int, int, int]:
        """Return the numbers of test patients, images and cases of ``site``; the largest over seeds if not shared."""
        return self._most_patients[site], *self.images[site]

    # Values

    def value(self, label: str, seed: int, sites: Sequence[str], metric: Metric) -> float:
        """Return the metric of one seed over the pooled cases of ``sites``; NaN if undefined."""
        key = (label, seed, tuple(sites), metric)
        if key not in self._known:
            groups = self._batch((label,), (seed,), sites, metric)
            score, target = self._arrays(label, seed, groups, metric)
            sizes = [sum(len(c.patient) for c in self._cases(label, seed, group)) for group in groups]
            values = metric.kernel(score, target, np.repeat(np.eye(len(groups)), sizes, axis=1)).tolist()
            self._known.update({(label, seed, g, metric): v for g, v in zip(groups, values, strict=True)})
        value: float = self._known[key]
        return value

    def _batch(
        self, labels: tuple[str, ...], seeds: tuple[int, ...], sites: Sequence[str], metric: Metric
    ) -> Sequence[tuple[str, ...]]:
        """Return ``sites`` as one group, or if it is a single site, the single sites to compute the metric of at once.

        A kernel is then called once for all of them, with weights of 0 for the cases of the other sites.
        """
        arms = [self.cases[label, seed] for label in labels for seed in seeds]
        own = (
            metric.name if metric.name in arms[0][sites[0]].values else ""
        )  # a metric that is a mean of values by case
        if len(sites) != 1 or not (metric.by_case or own):
            return [tuple(sites)]
        key = ("batches", labels, seeds, metric.by_case, own)
        if key not in self._known:
            self._known[key] = _batches(arms, metric)
        found: Sequence[tuple[str, ...]] = self._known[key][sites[0]]
        return found

    def _arrays(
        self, label: str, seed: int, groups: Sequence[tuple[str, ...]], metric: Metric
    ) -> tuple[Array, NDArray[Any]]:
        """Return the first two arguments of the metric's kernel, for the cases of all groups of sites."""
        sites = tuple(site for group in groups for site in group)
        cases = self._cases(label, seed, sites)
        key = ("arrays", label, seed, sites, metric.name if metric.name in cases[0].values else "")
        if key not in self._known:
            self._known[key] = _together(cases, metric.name)
        found: tuple[Array, NDArray[Any]] = self._known[key]
        return found

    def by_seed(self, label: str, sites: Sequence[str], metric: Metric) -> Array:
        """Return the mean over those of ``sites`` for which the metric is defined in every seed. [seeds]"""
        seeds = self.seeds(label)
        known = self.defined(label, seeds, sites, metric)
        if not known:
            return np.full(len(seeds), np.nan)
        values = np.array([[self.value(label, seed, [s], metric) for s in known] for seed in seeds])
        return np.asarray(values.mean(1))

    def defined(self, label: str, seeds: Sequence[int], sites: Sequence[str], metric: Metric) -> list[str]:
        """Return those of ``sites`` at which the metric of ``label`` is defined in every seed."""
        return [s for s in sites if all(math.isfinite(self.value(label, seed, [s], metric)) for seed in seeds)]

    # Intervals

    def macro_estimate(self, label: str, sites: Sequence[str], metric: Metric, interval: bool = True) -> Estimate:
        """Return the mean over those of ``sites`` for which the metric is defined, with or without its interval.

        A mean over sites compares no patient of one site with a patient of another. An AUC of all patients together
        does, and rises if scores merely tell sites of different prevalence apart.
        """
        known = self.defined(label, self.seeds(label), sites, metric)
        defined = set(known)
        without = tuple(s for s in sites if s not in defined)
        n = self._patients(label, known)
        if not known:
            return Estimate(None, n=n, why="no site has a value", without=without)
        value = float(self.by_seed(label, known, metric).mean())
        if not interval:
            return Estimate(value, n=n, without=without)
        if not metric.has_interval:
            return Estimate(value, n=n, why=NO_INTERVAL, without=without)
        if metric.name != "auc" and metric.proportions is None:
            return replace(self._student(label, known, metric, value, n), without=without)
        each = [self.estimate(label, [s], metric, True) for s in known]
        if lacking := [f"{s}: {e.why}" for s, e in zip(known, each, strict=True) if e.low is None]:
            return Estimate(value, n=n, why="; ".join(lacking), without=without)
        how = each[0].how if len(known) == 1 else f"limits of the sites combined ({each[0].how})"
        return Estimate(value, *mean_of_limits(each), n, how, without=without)

    def _student(self, label: str, sites: Sequence[str], metric: Metric, value: float, n: int) -> Estimate:
        """Return the mean over ``sites`` with Student's limits."""
        try:
            parts = [self._spread(self._of(label, [s], metric)) for s in sites]
        except Undefined as reason:
            return Estimate(value, n=n, why=f"no interval: {reason}")
        spread = added(parts, [1 / len(sites)] * len(sites))
        if spread.variance <= 1e-14:
            return Estimate(value, n=n, why=f"no interval: no variance among {n} patients")
        return Estimate(value, *student(value, spread, metric.scale, self.level), n, STUDENT)

    def estimate(self, label: str, sites: Sequence[str], metric: Metric, interval: bool) -> Estimate:
        """Return the metric over the pooled cases of ``sites``, averaged over seeds, with or without its interval."""
        key = (label, tuple(sites), metric, interval)
        if key not in self._known:
            self._known[key] = self._estimate(label, sites, metric, interval)
        found: Estimate = self._known[key]
        return found

    def _estimate(self, label: str, sites: Sequence[str], metric: Metric, interval: bool) -> Estimate:
        n, seeds = self._patients(label, sites), self.seeds(label)
        values = [self.value(label, seed, sites, metric) for seed in seeds]
        value = sum(values) / len(values)
        if not math.isfinite(value):
            bad = seeds[int(np.flatnonzero(~np.isfinite(values))[0])]
            return Estimate(None, n=n, why=metric.why(_together(self._cases(label, bad, sites), metric.name)[1]))
        if not metric.has_interval:
            return Estimate(value, n=n, why=NO_INTERVAL if interval else "")
        if not interval:
            return Estimate(value, n=n)
        groups = [seeds] if self.shared else [(seed,) for seed in seeds]
        found = [self._interval(label, group, sites, metric) for group in groups]
        if any(e.low is None for e in found):
            return Estimate(value, n=n, why=next(e.why for e in found if e.low is None))
        if len(found) == 1:
            return Estimate(value, found[0].low, found[0].high, n, found[0].how)
        low, high = (float(np.mean([getattr(e, k) for e in found])) for k in ("low", "high"))
        return Estimate(value, low, high, n, f"{found[0].how}; mean of the seeds’ limits")

    def _interval(self, label: str, seeds: Sequence[int], sites: Sequence[str], metric: Metric) -> Estimate:
        """Return the interval of the mean over ``seeds``, which share their patients."""
        if metric.name == "auc" and (exact := self._delong(label, seeds, sites)) is not None:
            return exact
        if metric.proportions is not None and (counted := self._counted(label, seeds, sites, metric)) is not None:
            return counted
        value = sum(self.value(label, seed, sites, metric) for seed in seeds) / len(seeds)
        n = len(self._group(sites, seeds[0])[0])
        try:
            spread = self._jackknife([label], seeds, sites, metric).spread()
        except Undefined as reason:
            return Estimate(value, n=n, why=f"no interval: {reason}")
        if spread.variance <= 1e-14:
            return Estimate(value, n=n, why=f"no interval: no variance among {n} patients")
        return Estimate(value, *student(value, spread, metric.scale, self.level), n, STUDENT)

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

    def _counted(self, label: str, seeds: Sequence[int], sites: Sequence[str], metric: Metric) -> Estimate | None:
        """Return Clopper and Pearson's interval of a proportion, or of a mean of proportions; None if it is neither.

        A patient with several cases or in several seeds counts once: Kish's effective number of patients is used.
        """
        assert metric.proportions is not None
        size = len(self._group(sites, seeds[0])[0])
        shares, counts = list[list[float]](), list[Array]()
        for seed in seeds:
            score, target = _together(self._cases(label, seed, sites), metric.name)
            of = self._members(label, seed, sites)
            found = metric.proportions(score, target)
            if found is None:
                return None
            shares.append([float(right[among].mean()) if among.any() else np.nan for right, among in found])
            here = [np.bincount(of[among], minlength=size).astype(float) for _, among in found]
            counts = [a + b for a, b in zip(counts, here, strict=True)] if counts else here
        means = np.mean(shares, axis=0)
        parts = [
            Estimate(float(p), *proportion(float(p), effective_number(m), self.level))
            for p, m in zip(means, counts, strict=True)
            if np.isfinite(p)
        ]
        return Estimate(float(np.mean([p.value for p in parts])), *mean_of_limits(parts), how="Clopper-Pearson")

    # Differences

    def difference(
        self,
        a: str,
        b: str,
        sites: Sequence[str],
        metric: Metric,
        question: Question = "difference",
        margin: float | None = None,
    ) -> Difference:
        """Return method ``a`` minus ``b``, mean over the sites where both are defined; positive is better.

        With several seeds, the interval includes the variance between seeds.
        """
        asked = Difference(None, question=question, margin=margin)
        common = [s for s in self.seeds(a) if s in self.seeds(b)]
        if not sites or not common:
            return replace(asked, why="no seed or no site in common")
        if not metric.has_interval:
            return replace(asked, why="no test for this metric")
        known = [s for s in sites if all(self.defined(m, common, [s], metric) for m in (a, b))]
        n = self._patients(a, known)
        if not known:
            return replace(asked, n=n, why="undefined for one of the two")
        values = np.array(self.by_split(a, b, known, metric))
        each = [[self._jackknife([a, b], group, [s], metric) for group in self.groups(common)] for s in known]
        try:
            spread = added([self._spread(one) for one in each], [1 / len(known)] * len(known))
        except Undefined as reason:
            return replace(asked, value=float(values.mean()), n=n, why=str(reason))
        differing = sum(max(j.changing for j in one) for one in each)
        how = "paired t, jackknife over patients"
        how += f" and variance between {len(common)} seeds" if len(common) > 1 else ""
        return paired(values, spread, differing, n, self.level, how, question, margin)

    def difference_spreads(self, a: str, b: str, sites: Sequence[str], metric: Metric) -> dict[str, Spread]:
        """Return the variance over patients of method ``a`` minus ``b``, for each site where both are defined.

        Raises:
            Undefined: If no site determines it.
        """
        common = [s for s in self.seeds(a) if s in self.seeds(b)]
        known = [s for s in sites if common and all(self.defined(m, common, [s], metric) for m in (a, b))]
        if not known:
            raise Undefined("undefined for one of the two methods at every site")
        each = {s: [self._jackknife([a, b], group, [s], metric) for group in self.groups(common)] for s in known}
        return {s: self._spread(one) for s, one in each.items()}

    def by_split(self, a: str, b: str, sites: Sequence[str], metric: Metric) -> list[float]:
        """Return method ``a`` minus ``b`` in each split, averaged over those of ``sites`` at which both were tested."""
        found = []
        for seed in [s for s in self.seeds(a) if s in self.seeds(b)]:
            both = [s for s in sites if s in self.cases[a, seed] and s in self.cases[b, seed]]
            each = [[self.value(m, seed, [s], metric) for m in (a, b)] for s in both]
            known = [x - y for x, y in each if math.isfinite(x) and math.isfinite(y)]
            if known:
                found.append(metric.sign * float(np.mean(known)))
        return found

    # The jackknife

    def groups(self, seeds: Sequence[int]) -> list[Sequence[int]]:
        """Return the groups of seeds that share their patients."""
        return [seeds] if self.shared else [(seed,) for seed in seeds]

    def _of(self, label: str, sites: Sequence[str], metric: Metric) -> list[Jackknife]:
        return [self._jackknife([label], group, sites, metric) for group in self.groups(self.seeds(label))]

    def _spread(self, by_group: Sequence[Jackknife]) -> Spread:
        parts = [j.spread() for j in by_group]
        return parts[0] if len(parts) == 1 else mean_of_dependent(parts)

    def _jackknife(
        self, labels: Sequence[str], seeds: Sequence[int], sites: Sequence[str], metric: Metric
    ) -> Jackknife:
        """Return the metric, or its difference between two methods, averaged over ``seeds``, without each patient."""
        key = (tuple(labels), tuple(seeds), tuple(sites), metric)
        if key not in self._known:
            groups = self._batch(tuple(labels), tuple(seeds), sites, metric)
            each = self._without_each(labels, seeds, groups, metric)
            self._known.update({(*key[:2], group, metric): one for group, one in zip(groups, each, strict=True)})
        found: Jackknife = self._known[key]
        return found

    def _without_each(
        self, labels: Sequence[str], seeds: Sequence[int], groups: Sequence[tuple[str, ...]], metric: Metric
    ) -> list[Jackknife]:
        """Return the jackknife of each group of sites."""
        sizes = [int(self._group(sites, seeds[0])[0].max()) + 1 for sites in groups]
        starts = [0, *accumulate(size + 1 for size in sizes)]  # of the rows of each group
        rows, strata = np.zeros(starts[-1]), [np.zeros(size, np.int64) for size in sizes]
        signs = [1.0] if len(labels) == 1 else [metric.sign, -metric.sign]
        for seed in seeds:
            for label, sign in zip(labels, signs, strict=True):
                members = [self._members(label, seed, sites) for sites in groups]
                score, target = self._arrays(label, seed, groups, metric)
                weight, at = np.zeros((len(rows), len(target))), 0
                for sites, of, size, start, stratum in zip(groups, members, sizes, starts, strata, strict=False):
                    mine = slice(at, at := at + len(of))
                    weight[start, mine] = 1.0
                    weight[start + 1 : start + 1 + size, mine] = of != np.arange(size)[:, None]
                    if metric.by_class and target.ndim == 1 and len(self._group(sites, seed)[0]) == size:
                        stratum[of] = np.asarray(target[mine], np.int64)
                rows += sign * metric.kernel(score, target, weight) / len(seeds)
        parts = np.split(rows, starts[1:-1])
        return [Jackknife(float(part[0]), part[1:], stratum) for part, stratum in zip(parts, strata, strict=True)]

    def means_without_each(self, label: str, seed: int, site: str, values: Array) -> Array:
        """Return the means of per-case values [n, k] of a method at a site: of all cases, then without each patient.

        Returns:
            [1 + g, k], with g patients, or groups of patients as for other metrics.
        """
        of, total = self._members(label, seed, [site]), values.sum(0)
        size = int(self._group([site], seed)[0].max()) + 1
        sums = np.stack([np.bincount(of, column, size) for column in values.T], axis=1)
        left = len(of) - np.bincount(of, minlength=size)[:, None]
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.concatenate([total[None] / len(of), (total - sums) / left])

    def _members(self, label: str, seed: int, sites: Sequence[str]) -> Ints:
        """Return the number of the jackknife's group of each case of a method run, sites concatenated."""
        group, starts = self._group(sites, seed)
        parts = [
            group[starts[i] + np.searchsorted(self.patients[s, seed], self.cases[label, seed][s].patient)]
            for i, s in enumerate(sites)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _group(self, sites: Sequence[str], seed: int) -> tuple[Ints, list[int]]:
        """Return the group of each patient of ``sites``, and at which index each site starts."""
        sizes = [len(self.patients[s, seed]) for s in sites]
        return _groups_of(sum(sizes)), [0, *accumulate(sizes[:-1])]

    def _cases(self, label: str, seed: int, sites: Sequence[str]) -> list[Cases]:
        return [self.cases[label, seed][s] for s in sites]

    def _patients(self, label: str, sites: Sequence[str]) -> int:
        return sum(max(len(self.patients[s, seed]) for seed in self.seeds(label)) for s in sites)


@lru_cache(maxsize=1024)
def _groups_of(patients: int) -> Ints:
    """Return the number of the jackknife's group of each of ``patients``. Not writable."""
    groups = np.arange(patients) % min(patients, MOST)
    groups.setflags(write=False)
    return groups


STUDENT = "Student’s t, jackknife over patients"
NO_INTERVAL = "no interval: biased upwards in small samples"


def _batches(arms: Sequence[Mapping[str, Cases]], metric: Metric) -> dict[str, list[tuple[str, ...]]]:
    """Return for each site the single sites of its batch: up to ``BATCH`` cases with arrays of the same form."""
    found: dict[str, list[tuple[str, ...]]] = {}
    batch, left, form = list[tuple[str, ...]](), 0, None
    for site in (s for s in arms[0] if all(s in arm for arm in arms)):
        cases = [arm[site] for arm in arms]
        n, forms = (
            max(len(c.patient) for c in cases),
            [(c.score_for(metric.name).shape[1:], c.target.ndim) for c in cases],
        )
        alone = metric.by_case == "two classes" and set(forms) != {((2,), 1)}
        if alone or n > left or forms != form:
            batch, left, form = [], BATCH, None if alone else forms
        batch.append((site,))
        left -= n
        found[site] = batch
    return found


def _together(cases: Sequence[Cases], metric: str) -> tuple[Array, NDArray[Any]]:
    if len(cases) == 1:
        return cases[0].score_for(metric), cases[0].target
    return np.concatenate([c.score_for(metric) for c in cases]), np.concatenate([c.target for c in cases])


def sample(run: Run, level: float, unit: str = "patient") -> Sample:
    """Convert a run's predictions to cases.

    Raises:
        ValueError: If ``unit`` is neither ``"patient"`` nor ``"image"``.
    """
    regression = run.info.task in AVERAGED_TARGETS
    unit = unit_of([p for sites in run.arms.values() for p in sites.values()], run.info.task, unit)
    cases = {
        arm: {s: as_cases(p, unit, regression) for s, p in sites.items()} for arm, sites in run.arms.items() if sites
    }
    shared, patients = share_patients(cases), dict[Where, NDArray[np.int64]]()
    seeds = list(dict.fromkeys(s for _, s in cases))
    for site in (s.name for s in run.info.sites):
        for group in [seeds] if shared else [[s] for s in seeds]:
            here = [sites[site].patient for (_, s), sites in cases.items() if s in group and site in sites]
            if here:
                patients |= {(site, s): np.unique(np.concatenate(here)) for s in group}
    return Sample(cases, patients, shared, level, _images(run, cases, shared), unit)


def by_fold(run: Run, level: float) -> Sample:
    """Return the test cases of each fold separately, with folds in place of seeds."""
    numbers = {key: i for i, key in enumerate(sorted({(seed, fold) for _, seed, fold in run.splits}))}
    arms = {(label, numbers[seed, fold]): sites for (label, seed, fold), sites in run.splits.items()}
    return sample(replace(run, arms=arms, splits={}), level)


def _images(run: Run, cases: Mapping[tuple[str, int], Mapping[str, Cases]], shared: bool) -> dict[str, tuple[int, int]]:
    """Return the numbers of images and cases of each site, over all method runs; the largest if not shared."""
    found: dict[str, tuple[int, int]] = {}
    for site in (s.name for s in run.info.sites):
        tested = [(run.arms[arm][site], sites[site]) for arm, sites in cases.items() if site in sites]
        # method runs with the same images and cases count once
        here = {(p.patient.tobytes(), c.patient.tobytes(), c.target.tobytes()): (p, c) for p, c in tested}.values()
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
    found: dict[str, dict[int, Cases]] = {}
    for (_, seed), sites in cases.items():
        for site, c in sites.items():
            found.setdefault(site, {}).setdefault(seed, c)
    for seeds in found.values():
        first, *others = seeds.values()
        if all(_same_cases(first, c) for c in others):
            continue
        ids = [np.unique(c.patient) for c in seeds.values()]
        if all(np.array_equal(own, np.arange(len(own))) for own in ids):
            return False
    return True


def _same_cases(a: Cases, b: Cases) -> bool:
    """Return whether two arrays of cases have the same patients with the same targets."""
    return np.array_equal(a.patient, b.patient) and a.target.tobytes() == b.target.tobytes()
