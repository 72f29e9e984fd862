"""Evaluation of a run: each method by site, pooled, averaged, at the worst site, and compared with local training.

Every difference is paired by patient. A value over several seeds is the mean of the seeds' values; its interval is for
these models. The interval of a difference includes the variance between seeds if there are at least two, because
another seed would give another model.
The headline method is the federated one with the best mean over sites on *validation* data, never on test data.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from polyclinic.errors import ConfigError
from polyclinic.evaluation.constant_baseline import CONSTANT, Fault, faults, with_constant
from polyclinic.evaluation.method_comparison import Against, ranked
from polyclinic.evaluation.metric import Metric
from polyclinic.evaluation.metric_functions import metrics_for
from polyclinic.evaluation.records.record_schema import MethodInfo
from polyclinic.evaluation.records.run_reader import Run, external_sites, training_sites
from polyclinic.evaluation.sample import Sample, sample
from polyclinic.evaluation.site_scores import worst_site
from polyclinic.statistics.intervals import Estimate, Pooled, pool_sites, z_of
from polyclinic.statistics.paired_tests import Difference, Ranking
from polyclinic.statistics.undefined import Undefined

BOUNDED = (
    "auc",
    "accuracy",
    "balanced_accuracy",
    "sensitivity",
    "specificity",
    "f1",
    "average_precision",
    "dice",
    "nsd",
)


@dataclass(frozen=True)
class Options:
    """Options of the evaluation.

    Attributes:
        level: Confidence level.
        min_cell: Sites with fewer test patients are not shown individually; 0 shows all.
        unit: ``"patient"``, or ``"image"`` to count each image as a case. Variances are by patient in either case.
        few: Number of test patients below which a site is reported as small.
        reference: The method with which others are compared; by default FedAvg, or the first federated one.
    """

    level: float = 0.95
    min_cell: int = 0
    unit: str = "patient"
    few: int = 30
    reference: str = ""


@dataclass(frozen=True)
class MethodResult:
    """Results of one method on test data.

    Attributes:
        label: The method.
        baseline: Whether it is Local, Pooled or Cross.
        seeds: The seeds with predictions.
        sites: Estimates by site, then by metric. The primary metric has intervals everywhere.
        pooled: Estimates over the pooled patients of all training sites, by metric.
        macro: The mean over training sites of the primary metric.
        external: Estimates over the pooled patients of the external sites, by metric; empty without external sites.
        worst: The training site with the worst value, and that value; None if no site has a value.
        spread: Standard deviation over training sites; None if there are fewer than two.
        random: Random-effects mean over training sites.
        seed_sd: Standard deviation over seeds of the mean over sites; None if there is one seed.
        validation: The mean over sites on validation data, at the rounds whose models were tested.
        gains: Difference from local training at each site.
    """

    label: str
    baseline: bool
    seeds: tuple[int, ...]
    sites: Mapping[str, Mapping[str, Estimate]]
    pooled: Mapping[str, Estimate]
    macro: Estimate
    external: Mapping[str, Estimate] = field(default_factory=dict)
    worst: tuple[str, float] | None = None
    spread: float | None = None
    random: Pooled | None = None
    seed_sd: float | None = None
    validation: float | None = None
    gains: Mapping[str, Difference] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """Results of a run's evaluation, as reported.

    Attributes:
        metric: The primary metric.
        methods: In the study's order, those with predictions.
        headline: The method reported first; None if no method has predictions.
        reference: The method with which the others are compared.
        comparisons: Each other method minus the reference, mean over sites, Holm-corrected.
        over_splits: The same by Nadeau and Bengio's corrected t over at least three splits: folds, or seeds with
            different splits.
        over_sites: The same by Wilcoxon's signed ranks over at least six sites.
        ranking: Mean ranks over sites; None with fewer than three methods or sites.
        patients: Test patients by site.
        images: Test images by site.
        cases: Test cases by site; more than patients if a patient has images of several labels.
        shared: Whether patients have the same numbers in all seeds.
        unit: What a case is: ``"patient"`` or ``"image"``.
        options: The options of the evaluation.
        chosen_by: Description of how the headline method was chosen.
        constant: The result of the constant baseline; None if the records do not determine it.
        faults: Faults of methods: constant outputs, a class never predicted, scores below the constant baseline.
    """

    metric: Metric
    methods: tuple[MethodResult, ...]
    headline: str | None
    reference: str | None
    comparisons: Mapping[str, Difference]
    over_splits: Mapping[str, Difference]
    over_sites: Mapping[str, Difference]
    ranking: Ranking | None
    patients: Mapping[str, int]
    images: Mapping[str, int]
    cases: Mapping[str, int]
    shared: bool
    unit: str
    options: Options
    chosen_by: str
    constant: MethodResult | None = None
    faults: tuple[Fault, ...] = ()

    def of(self, label: str) -> MethodResult:
        """Return the result of the method ``label``."""
        return next(m for m in self.methods if m.label == label)


def evaluate(run: Run, options: Options = Options()) -> Evaluation:
    """Evaluate a run, finished or not.

    Raises:
        ValueError: If the run's metric is not one of its task's.
    """
    table = metrics_for(run.info.task, len(run.info.classes) or 2)
    if run.info.metric not in table:
        raise ConfigError(f"{run.path}/run.json: metric: {run.info.metric!r} is not one of {', '.join(table)}")
    metric = table[run.info.metric]
    data = sample(with_constant(run), options.level, options.unit)
    methods = tuple(_method(run, info, data, table, options) for info in run.info.methods if data.seeds(info.label))
    methods = tuple(_with_gains(m, run, data, metric, options) for m in methods)
    headline, how = _headline(methods, metric)
    shown = {m.label for m in methods}
    federated = [m.label for m in methods if not m.baseline]
    usual = [k for k in (options.reference, "fedavg", *federated, *(m.label for m in methods)) if k in shown]
    reference = usual[0] if usual else None
    against = Against(run, data, [m.label for m in methods if m.label != reference], reference or "")
    by_site = [[m.sites[s][metric.name].value if s in m.sites else None for m in methods] for s in training_sites(run)]
    ranking = ranked([m.label for m in methods], by_site, metric)
    detailed = tuple(_detailed(m, run, data, table, options) if m.label == headline else m for m in methods)
    counts = {s: data.count(s) for s in data.sites}
    constant = None
    if methods and data.seeds(CONSTANT) and (run.info.task != "segmentation" or metric.name == "dice"):
        constant = _method(run, MethodInfo(label=CONSTANT), data, table, options)
    return Evaluation(
        metric,
        detailed,
        headline,
        reference,
        against.holm_corrected(metric),
        against.over_splits(metric),
        against.over_sites(metric),
        ranking,
        {s: c[0] for s, c in counts.items()},
        {s: c[1] for s, c in counts.items()},
        {s: c[2] for s, c in counts.items()},
        data.shared,
        data.unit,
        options,
        how,
        constant,
        faults(run, data, [m.label for m in methods], table, metric),
    )


def _method(run: Run, info: MethodInfo, data: Sample, table: Mapping[str, Metric], options: Options) -> MethodResult:
    metric, training, external = table[run.info.metric], training_sites(run), external_sites(run)
    sites: dict[str, dict[str, Estimate]] = {}
    for site in [s for s in data.sites if data.has(info.label, [s])]:
        if data.count(site)[0] < options.min_cell:
            why = f"not shown: fewer than {options.min_cell} patients"
            sites[site] = {name: Estimate(None, why=why) for name in table}
            continue
        sites[site] = {k: data.estimate(info.label, [site], m, k == metric.name) for k, m in table.items()}
    own = [s for s in training if s in sites]
    pooled = {k: data.estimate(info.label, own, m, k == metric.name) for k, m in table.items()} if own else {}
    away = [s for s in external if s in sites]
    beyond = {k: data.estimate(info.label, away, m, k == metric.name) for k, m in table.items()} if away else {}
    values = {s: e[metric.name].value for s, e in sites.items() if s in own}
    known = [v for v in values.values() if v is not None]
    by_seed = [v for v in data.by_seed(info.label, own, metric) if np.isfinite(v)] if own else []
    return MethodResult(
        info.label,
        info.baseline,
        data.seeds(info.label),
        sites,
        pooled,
        data.macro_estimate(info.label, own, metric),
        beyond,
        worst_site(values, metric.higher_is_better is not False),
        float(np.std(known, ddof=1)) if len(known) > 1 else None,
        _random(sites, own, metric, options.level),
        float(np.std(by_seed, ddof=1)) if len(by_seed) > 1 else None,
        validation_mean(run, info.label, metric.name),
    )


def _detailed(m: MethodResult, run: Run, data: Sample, table: Mapping[str, Metric], options: Options) -> MethodResult:
    """Return ``m`` with intervals for every metric, pooled and external."""
    own = [s for s in training_sites(run) if s in m.sites]
    away = [s for s in external_sites(run) if s in m.sites]
    pooled = {k: data.estimate(m.label, own, t, True) for k, t in table.items()} if own else {}
    external = {k: data.estimate(m.label, away, t, True) for k, t in table.items()} if away else {}
    return replace(m, pooled=pooled, external=external)


def _random(
    sites: Mapping[str, Mapping[str, Estimate]], own: Sequence[str], metric: Metric, level: float
) -> Pooled | None:
    """Return the random-effects mean over sites. Metrics between 0 and 1 are pooled as log odds."""
    known = [e for s in own if (e := sites[s][metric.name]).value is not None and e.low is not None]
    known = [e for e in known if (e.high or 0.0) > (e.low or 0.0)]
    values = np.array([[e.value, e.low, e.high] for e in known], float).reshape(-1, 3)
    odds = metric.name in BOUNDED and bool(np.all((values > 0) & (values < 1)))
    if odds:
        values = np.log(values / (1 - values))
    try:
        pooled = pool_sites(values[:, 0], ((values[:, 2] - values[:, 1]) / (2 * z_of(level))) ** 2, level)
    except Undefined:
        return None
    if not odds:
        return pooled
    e = pooled.estimate
    back = [float(1 / (1 + np.exp(-v))) for v in (e.value, e.low, e.high, *(pooled.prediction or ())) if v is not None]
    prediction = (back[3], back[4]) if pooled.prediction else None
    return replace(pooled, estimate=replace(e, value=back[0], low=back[1], high=back[2]), prediction=prediction)


def _with_gains(m: MethodResult, run: Run, data: Sample, metric: Metric, options: Options) -> MethodResult:
    if m.label == "local" or not data.seeds("local"):
        return m
    gains = {}
    for site in [s for s in training_sites(run) if s in m.sites and data.has("local", [s])]:
        if data.count(site)[0] >= options.min_cell:
            gains[site] = data.difference(m.label, "local", [site], metric)
    return replace(m, gains=gains)


def _headline(methods: Sequence[MethodResult], metric: Metric) -> tuple[str | None, str]:
    federated = [m for m in methods if not m.baseline] or list(methods)
    if not federated:
        return None, ""
    scored = [(m.validation, m.label) for m in federated if m.validation is not None]
    if len(scored) < len(federated):
        return federated[0].label, "the study's first federated method, because validation scores are incomplete"
    pick = max if metric.higher_is_better is not False else min
    best = pick(v for v, _ in scored)
    label = next(label for v, label in scored if v == best)
    if len(federated) == 1:
        return label, "the only federated method" if not federated[0].baseline else "the only method"
    return label, f"the federated method with the best mean {metric.label} over sites on validation data"


def validation_mean(run: Run, label: str, metric: str) -> float | None:
    """Return the mean over seeds, folds and sites of a validation metric, at the round whose model was tested."""
    kept = {(t.method, t.seed, t.fold): t.round for t in run.lines if t.kind == "test"}
    training, found = training_sites(run), []
    for s in run.curves:
        value = s.metrics.get(metric)
        mine = s.method == label and s.role == "val" and s.site in training
        mine = mine and kept.get((label, s.seed, s.fold)) == s.round
        if mine and value is not None and np.isfinite(value):
            found.append(value)
    return float(np.mean(found)) if found else None
