"""Evaluation of a run: each method by site, averaged over sites, at the worst site, and compared with local training.

Every difference is paired by patient. A value over several seeds is the mean of the seeds' values; its interval is for
these models. The interval of a difference includes the variance between seeds if there are at least two, because
another seed would give another model.
The headline method is the federated one with the best mean over sites on *validation* data, never on test data.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from polyclinic.errors import ConfigError
from polyclinic.evaluation.baselines.constant_baseline import CONSTANT, Fault, compared, faults, with_constant
from polyclinic.evaluation.baselines.linear_baseline import below_linear, linear_labels, with_linear
from polyclinic.evaluation.calibration import CALIBRATION
from polyclinic.evaluation.method_comparison import Against, Declared, ranked
from polyclinic.evaluation.metric import Metric
from polyclinic.evaluation.metric_functions import CLASSIFICATION
from polyclinic.evaluation.own_metrics import metrics_of
from polyclinic.evaluation.records.predictions import Predictions
from polyclinic.evaluation.records.record_schema import MethodInfo
from polyclinic.evaluation.records.run_reader import Run, external_sites, training_sites
from polyclinic.evaluation.sample import Sample, sample
from polyclinic.evaluation.site_scores import worst_site
from polyclinic.evaluation.split_faults import Disagreement, Leak, disagreement, leak, uneven_classes
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
    "c_index",
    "uno_c",
)


@dataclass(frozen=True)
class Options:
    """Options of the evaluation.

    Attributes:
        level: Confidence level.
        min_cell: Sites with fewer test patients are not shown, and left out of means; 0 shows all.
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
        means: The mean over training sites of each metric.
        macro: The mean over training sites of the primary metric.
        external: The mean over external sites of each metric; empty without external sites.
        worst: The training site with the worst value, and that value; None if no site has a value.
        lowest: The training site with the worst shrunken value, and that value with its interval (``Pooled.shrunken``).
        spread: Standard deviation between training sites (τ of the random-effects model), without sampling variation.
        random: Random-effects mean over training sites.
        seed_sd: Standard deviation over seeds of the mean over sites; None if there is one seed.
        validation: The mean over sites on validation data, at the rounds whose models were tested.
        gains: Difference from local training at each site.
        by_class: For three or more classes or labels, the mean over sites of each one's AUC against the rest.
    """

    label: str
    baseline: bool
    seeds: tuple[int, ...]
    sites: Mapping[str, Mapping[str, Estimate]]
    means: Mapping[str, Estimate]
    macro: Estimate
    external: Mapping[str, Estimate] = field(default_factory=dict)
    worst: tuple[str, float] | None = None
    lowest: tuple[str, Estimate] | None = None
    spread: float | None = None
    random: Pooled | None = None
    seed_sd: float | None = None
    validation: float | None = None
    gains: Mapping[str, Difference] = field(default_factory=dict)
    by_class: Mapping[str, Estimate] = field(default_factory=dict)


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
        constant: The result of the constant baseline, by the metrics with which methods are compared with it; None if
            the records do not determine it.
        linear: The results of the linear baselines, by the same metrics; empty for images, and between hospitals.
        faults: Faults of methods: constant outputs, a class never predicted, scores below the constant or a linear
            baseline.
        declared: The comparisons that the study declared before the run.
        leak: What test data share with training or validation data; None if nothing is known to be shared.
        disagreement: The main method's validation result, if its test result contradicts it; otherwise None.
        uneven: Training sites whose test patients lack classes, with these classes, for three or more classes.
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
    linear: tuple[MethodResult, ...] = ()
    faults: tuple[Fault, ...] = ()
    declared: tuple[Declared, ...] = ()
    leak: Leak | None = None
    disagreement: Disagreement | None = None
    uneven: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def of(self, label: str) -> MethodResult:
        """Return the result of the method ``label``."""
        return next(m for m in self.methods if m.label == label)


def evaluate(run: Run, options: Options = Options()) -> Evaluation:
    """Evaluate a run, finished or not.

    Raises:
        ValueError: If the run's metric is not one of its task's.
    """
    table = metrics_of(run.info)
    if run.info.metric not in table:
        raise ConfigError(f"{run.path}/run.json: metric: {run.info.metric!r} is not one of {', '.join(table)}")
    metric = table[run.info.metric]
    data = sample(with_linear(with_constant(run)), options.level, options.unit)
    run = _without_small_sites(run, data, options)
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
    first = next((m for m in detailed if m.label == headline), None)
    counts = {s: data.count(s) for s in data.sites}
    constant = None
    if methods and data.seeds(CONSTANT) and (run.info.task != "segmentation" or metric.name == "dice"):
        constant = _method(run, MethodInfo(label=CONSTANT), data, compared(table, metric), options)
    linear = [MethodInfo(label=label) for label in linear_labels(run)] if methods else []
    labels = [m.label for m in methods]
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
        tuple(_method(run, info, data, compared(table, metric), options) for info in linear),
        (*faults(run, data, labels, table, metric), *below_linear(run, data, labels, metric)),
        against.declared(metric),
        leak(run),
        disagreement(run, headline, first.macro, metric, options.level, options.unit) if headline and first else None,
        dict(uneven_classes(run, data, headline)) if headline else {},
    )


def _without_small_sites(run: Run, data: Sample, options: Options) -> Run:
    """Return the run without the sites that are not shown: a mean over sites would reveal the value of a single one."""
    sites = tuple(s for s in run.info.sites if s.name not in data.sites or data.count(s.name)[0] >= options.min_cell)
    return replace(run, info=run.info.model_copy(update={"sites": sites}))


def _method(run: Run, info: MethodInfo, data: Sample, table: Mapping[str, Metric], options: Options) -> MethodResult:
    metric, training, external = table[run.info.metric], training_sites(run), external_sites(run)
    sites: dict[str, dict[str, Estimate]] = {}
    for site in [s for s in data.sites if data.has(info.label, [s])]:
        if data.count(site)[0] < options.min_cell:
            why = f"not shown: fewer than {options.min_cell} patients"
            sites[site] = {name: Estimate(None, why=why) for name in table}
            continue
        sites[site] = {k: data.estimate(info.label, [site], m, k == metric.name) for k, m in table.items()}
    own, away = ([s for s in group if s in sites] for group in (training, external))  # without hidden sites
    values = {s: e[metric.name].value for s, e in sites.items() if s in own}
    by_seed = [v for v in data.by_seed(info.label, own, metric) if np.isfinite(v)] if own else []
    random, lowest = _random(sites, own, metric, options.level)
    return MethodResult(
        info.label,
        info.baseline,
        data.seeds(info.label),
        sites,
        {k: data.macro_estimate(info.label, own, m, k == metric.name) for k, m in table.items()} if own else {},
        data.macro_estimate(info.label, own, metric),
        {k: data.macro_estimate(info.label, away, m, k == metric.name) for k, m in table.items()} if away else {},
        worst_site(values, metric.higher_is_better is not False),
        lowest,
        _between(random, metric),
        random,
        float(np.std(by_seed, ddof=1)) if len(by_seed) > 1 else None,
        validation_mean(run, info.label, metric.name),
    )


def _detailed(m: MethodResult, run: Run, data: Sample, table: Mapping[str, Metric], options: Options) -> MethodResult:
    """Return ``m`` with intervals for every metric, of calibration at every site, and with the AUC of every class."""
    own = [s for s in training_sites(run) if s in m.sites]
    away = [s for s in external_sites(run) if s in m.sites]
    sites = {
        site: {
            k: data.estimate(m.label, [site], table[k], True) if k in CALIBRATION and e.value is not None else e
            for k, e in found.items()
        }
        for site, found in m.sites.items()
    }
    means, external = (
        {k: data.macro_estimate(m.label, group, t) for k, t in table.items()} if group else {} for group in (own, away)
    )
    return replace(m, sites=sites, means=means, external=external, by_class=_by_class(m.label, own, run, options))


def _by_class(label: str, sites: Sequence[str], run: Run, options: Options) -> dict[str, Estimate]:
    """Return the mean over sites of each class's AUC against the rest, over the sites that have both.

    A mean over the classes that occur at a site is another quantity at every site. These means are for a fixed class.
    """
    if run.info.task not in ("classification", "multilabel") or not sites:
        return {}
    arms = {key: arm for key, arm in run.arms.items() if key[0] == label}
    columns = {p.score.shape[1] for arm in arms.values() for p in arm.values() if p.score is not None}
    if len(columns) != 1 or (run.info.task == "classification" and columns == {2}):
        return {}
    found: dict[str, Estimate] = {}
    for k in range(columns.pop()):
        one = {key: {s: _against_rest(p, k) for s, p in arm.items()} for key, arm in arms.items()}
        info = run.info.model_copy(update={"task": "classification"})
        data = sample(replace(run, info=info, arms=one, splits={}), options.level, options.unit)
        name = run.info.classes[k] if k < len(run.info.classes) else str(k)
        found[name] = data.macro_estimate(label, sites, CLASSIFICATION["auc"])
    return found


def _against_rest(p: Predictions, k: int) -> Predictions:
    """Return the predictions of class or label ``k`` against the rest."""
    assert p.score is not None
    assert p.target is not None
    target = p.target[:, k] if p.target.ndim == 2 else p.target == k
    return replace(p, score=np.stack([1 - p.score[:, k], p.score[:, k]], 1), target=target.astype(np.int64))


def _random(
    sites: Mapping[str, Mapping[str, Estimate]], own: Sequence[str], metric: Metric, level: float
) -> tuple[Pooled | None, tuple[str, Estimate] | None]:
    """Return the random-effects mean over sites, and the site with the worst shrunken value.

    Metrics between 0 and 1 are pooled as log odds.
    """
    known = {s: e for s in own if (e := sites[s][metric.name]).value is not None and e.low is not None}
    known = {s: e for s, e in known.items() if (e.high or 0.0) > (e.low or 0.0)}
    values = np.array([[e.value, e.low, e.high] for e in known.values()], float).reshape(-1, 3)
    odds = metric.name in BOUNDED and bool(np.all((values > 0) & (values < 1)))
    if odds:
        values = np.log(values / (1 - values))
    try:
        pooled = pool_sites(values[:, 0], ((values[:, 2] - values[:, 1]) / (2 * z_of(level))) ** 2, level)
    except Undefined:
        return None, None
    shrunken = [replace(e, n=k.n) for e, k in zip(pooled.shrunken, known.values(), strict=False)]
    if odds:
        estimate, *shrunken = (_from_odds(e) for e in (pooled.estimate, *shrunken))
        low, high = (float(1 / (1 + np.exp(-v))) for v in pooled.prediction or (0.0, 0.0))
        pooled = replace(pooled, estimate=estimate, prediction=(low, high) if pooled.prediction else None)
    pooled = replace(pooled, shrunken=tuple(shrunken))
    ranked = sorted(zip(known, pooled.shrunken, strict=False), key=lambda item: metric.sign * (item[1].value or 0.0))
    return pooled, (ranked[0] if ranked else None)


def _from_odds(e: Estimate) -> Estimate:
    value, low, high = (float(1 / (1 + np.exp(-v))) for v in (e.value, e.low, e.high) if v is not None)
    return replace(e, value=value, low=low, high=high)


def _between(random: Pooled | None, metric: Metric) -> float | None:
    """Return τ in units of the metric; of log odds by the delta method."""
    if random is None or random.estimate.value is None:
        return None
    mean, tau = random.estimate.value, float(np.sqrt(random.tau2))
    return tau * mean * (1 - mean) if metric.name in BOUNDED and 0 < mean < 1 else tau


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
    training, found = set(training_sites(run)), []
    for s in run.curves:
        value = s.metrics.get(metric)
        mine = s.method == label and s.role == "val" and s.site in training
        mine = mine and kept.get((label, s.seed, s.fold)) == s.round
        if mine and value is not None and np.isfinite(value):
            found.append(value)
    return float(np.mean(found)) if found else None
