"""Comparison of several runs: paired if they tested the same patients, by ranks otherwise."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from polyclinic.core import atomic
from polyclinic.errors import ConfigError
from polyclinic.evaluation.records.predictions import Predictions
from polyclinic.evaluation.records.record_schema import MethodInfo
from polyclinic.evaluation.records.run_reader import Run, read_run
from polyclinic.evaluation.run_evaluation import Evaluation, Options, evaluate
from polyclinic.statistics.intervals import Estimate
from polyclinic.statistics.paired_tests import BETTER, WORSE, Difference, Ranking, rank_methods
from polyclinic.statistics.undefined import Undefined


class NotComparable(ConfigError):
    """Runs that cannot be compared patient by patient. The message lists every reason."""


@dataclass(frozen=True)
class Row:
    """One method of one run.

    Attributes:
        run: The run's folder name.
        method: Its label there.
        mean: The mean over training sites of the primary metric.
        difference: Paired difference from the reference, Holm-corrected over all rows; None for the reference itself.
        verdict: The verdict as text.
        reference: The method that it is compared with, ``<run>/<method>``.
        declared: Whether the run's study declared this comparison, of two methods of that run, before the run. Declared
            comparisons are corrected for those of their run.
    """

    run: str
    method: str
    mean: Estimate
    difference: Difference | None
    verdict: str
    reference: str = ""
    declared: bool = False


@dataclass(frozen=True)
class Panel:
    """Methods over data sets, with one run per data set.

    Attributes:
        runs: The runs' names, in order.
        methods: The methods that occur in every run.
        values: Mean over sites of each run's own primary metric, [runs, methods].
        ranking: Mean ranks, with the critical difference; None with fewer than three runs or methods.
        gains: For each method, the numbers of sites at which it is significantly better and worse than local training.
        metrics: Each run's primary metric.
        rest: The methods that do not occur in every run.
        estimates: Estimates by run and method, including ``rest``.
        named: By run and method, the numbers of attackers and honest sites that alarms name, as text, if sites were
            simulated as attackers or a robust rule inspected them.
    """

    runs: tuple[str, ...]
    methods: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    ranking: Ranking | None
    gains: Mapping[str, tuple[int, int]]
    metrics: tuple[str, ...] = ()
    rest: tuple[str, ...] = ()
    estimates: Mapping[tuple[str, str], Estimate] = field(default_factory=dict)
    named: Mapping[tuple[str, str], str] = field(default_factory=dict)


def compare(run_dirs: Sequence[str | Path], reference: str = "", options: Options = Options()) -> list[Row]:
    """Compare every method of every run with one reference, on the same patients; then list declared comparisons.

    Args:
        run_dirs: Run folders with the same task, metric and test patients.
        reference: ``"<run>/<method>"``; by default the headline method of the first run.
        options: Options of the evaluation.

    Raises:
        NotARun: If a folder is not a run.
        NotComparable: If tasks, metrics or test patients differ.
    """
    runs = {Path(d).resolve().name: read_run(d) for d in run_dirs}
    if len(runs) < 2:
        raise NotComparable("give at least two run folders with different names")
    _require_same_patients(runs)
    first = next(iter(runs))
    reference = reference or f"{first}/{evaluate(runs[first], options).headline}"
    merged = _merged(runs)
    labels = [m.label for m in merged.info.methods]
    if reference not in labels:
        raise NotComparable(f"no method {reference!r} in these runs; there are {', '.join(labels)}")
    result = evaluate(merged, replace(options, reference=reference))
    rows = []
    for m in result.methods:
        run, _, method = m.label.partition("/")
        d = result.comparisons.get(m.label)
        rows.append(Row(run, method, m.macro, d, d.verdict() if d else "reference", reference))
    for name, one in runs.items():
        alone = evaluate(one, options)
        means = {m.label: m.macro for m in alone.methods}
        for c in alone.declared:
            mean, verdict = means.get(c.method, Estimate(None, why="not tested")), c.difference.verdict()
            rows.append(Row(name, c.method, mean, c.difference, verdict, f"{name}/{c.reference}", True))
    return rows


def panel(run_dirs: Sequence[str | Path], options: Options = Options(), names: Sequence[str] = ()) -> Panel:
    """Compare methods over data sets by ranks. The metric may differ between runs.

    Args:
        run_dirs: Run folders.
        options: Options of the evaluation.
        names: Names of the runs; by default those of their folders.

    Raises:
        NotARun: If a folder is not a run.
        NotComparable: If the runs have no method in common.
    """
    called = names or [Path(d).resolve().name for d in run_dirs]
    runs = {name: read_run(d) for name, d in zip(called, run_dirs, strict=True)}
    results = {name: evaluate(run, options) for name, run in runs.items()}
    every = list(dict.fromkeys(m.label for r in results.values() for m in r.methods))
    common = [k for k in every if all(k in {m.label for m in r.methods} for r in results.values())]
    if not common:
        raise NotComparable("these runs have no method in common")
    rest = [k for k in every if k not in common]
    estimates = {
        (name, k): r.of(k).macro for name, r in results.items() for k in every if k in {m.label for m in r.methods}
    }
    values = [[r.of(k).macro.value for k in common] for r in results.values()]
    alone = any(r.of(k).gains for r in results.values() for k in common)
    gains = {k: _against_single(k, results.values()) for k in common if k != "local"} if alone else {}
    named = {(name, k): text for name, run in runs.items() for k in every if (text := _named(run, k))}
    rows = tuple(tuple(row) for row in values)
    ranking = _ranks(common, values, list(results.values()))
    metrics = tuple(r.metric.label for r in results.values())
    return Panel(tuple(results), tuple(common), rows, ranking, gains, metrics, tuple(rest), estimates, named)


def write_panel(found: Panel, folder: Path) -> Path:
    """Write a panel to panel.md and panel.json in ``folder``, and return the path of the first."""
    named = dict(zip(found.runs, found.metrics, strict=True))
    methods = (*found.methods, *found.rest)
    lines = ["| data | metric | " + " | ".join(methods) + " |", "|---|---|" + "---|" * len(methods)]
    for run in found.runs:
        cells = [_cell(found.estimates.get((run, k))) for k in methods]
        lines.append(f"| {run} | {named[run]} | " + " | ".join(cells) + " |")
    text = ["Mean over training sites, with 95 % intervals over patients (and of the mean over seeds). ", ""]
    if found.ranking is not None:
        r = found.ranking
        ranks = ", ".join(f"{m} {rank:.2f}" for m, rank in zip(r.methods, r.ranks, strict=True))
        text.append(f"Mean ranks over {r.blocks} data sets, 1 is best: {ranks}.")
        text.append(
            f"Methods whose ranks differ by less than {r.critical:.2f} are not distinguished (Nemenyi); "
            f"Friedman's p = {r.p:.3g}."
        )
        text.append("")
    for k, (better, worse) in found.gains.items():
        text.append(f"- {k}: significantly better than local training at {better} sites, worse at {worse}.")
    if found.named:
        lines += ["", "Attackers and honest sites that alarms or refusals name, over seeds.", ""]
        lines += ["| data | " + " | ".join(methods) + " |", "|---|" + "---|" * len(methods)]
        lines += [
            "| " + " | ".join([run, *(found.named.get((run, k), "") for k in methods)]) + " |" for run in found.runs
        ]
    atomic.write(folder / "panel.md", "\n".join([*text, "", *lines, ""]))
    facts = [
        {"data": run, "metric": named[run], "method": k, "patients": e.n}
        | {"value": e.value, "low": e.low, "high": e.high}
        for (run, k), e in found.estimates.items()
    ]
    atomic.write_json(folder / "panel.json", facts)
    return folder / "panel.md"


def _named(run: Run, label: str) -> str:
    """Return ``2 of 2 attackers, 1 of 8 honest``; an empty text if no site was inspected."""
    groups = ((True, "attackers"), (False, "honest"))
    mine = {
        hostile: [s.named for s in run.standings if s.method == label and s.hostile == hostile] for hostile, _ in groups
    }
    return ", ".join(f"{sum(mine[h])} of {len(mine[h])} {who}" for h, who in groups if mine[h])


def _cell(e: Estimate | None) -> str:
    if e is None:
        return ""
    if e.value is None:
        return "—"
    return f"{e.value:.3f}" + (f" ({e.low:.3f} to {e.high:.3f})" if e.low is not None and e.high is not None else "")


def _ranks(methods: Sequence[str], values: list[list[float | None]], results: Sequence[Evaluation]) -> Ranking | None:
    whole = [i for i, row in enumerate(values) if all(v is not None for v in row)]
    signs = [results[i].metric.sign for i in whole]
    table = np.array([values[i] for i in whole], float).reshape(len(whole), len(methods))
    try:
        return rank_methods(methods, table * np.array(signs)[:, None])
    except Undefined:
        return None


def _against_single(label: str, results: Iterable[Evaluation]) -> tuple[int, int]:
    """Return the numbers of sites at which ``label`` is significantly better and worse than local training."""
    verdicts = [g.verdict() for r in results for g in r.of(label).gains.values()]
    return verdicts.count(BETTER), verdicts.count(WORSE)


def _require_same_patients(runs: Mapping[str, Run]) -> None:
    (first, base), *others = runs.items()
    problems = []
    for name, run in others:
        for key in ("task", "metric"):
            ours, theirs = getattr(base.info, key), getattr(run.info, key)
            if ours != theirs:
                problems.append(f"{key}: {first} has {ours!r}, {name} has {theirs!r}")
        for site, seed in sorted(_tested(base).keys() | _tested(run).keys()):
            ours, theirs = _tested(base).get((site, seed)), _tested(run).get((site, seed))
            if ours is not None and theirs is not None and ours != theirs:
                problems.append(f"test patients at {site} (seed {seed}) differ between {first} and {name}")
        if not _tested(base).keys() & _tested(run).keys():
            problems.append(f"{first} and {name} have no site and seed in common")
    if problems:
        raise NotComparable("\n".join([*problems, "These runs cannot be compared patient by patient."]))


def _tested(run: Run) -> dict[tuple[str, int], bytes]:
    """Return the identity of the test set (patients and targets) by site and seed."""
    found: dict[tuple[str, int], bytes] = {}
    for (_, seed), sites in run.arms.items():
        for site, p in sites.items():
            found.setdefault((site, seed), _identity(p))
    return found


def _identity(p: Predictions) -> bytes:
    order = np.argsort(p.patient, kind="stable")
    truth = b"" if p.target is None else np.ascontiguousarray(p.target[order]).tobytes()
    return p.patient[order].tobytes() + truth


def _merged(runs: Mapping[str, Run]) -> Run:
    """Return one run with the methods of all runs, labeled ``<run>/<method>``."""
    base = next(iter(runs.values()))
    methods: list[MethodInfo] = []
    arms: dict[tuple[str, int], Mapping[str, Predictions]] = {}
    for name, run in runs.items():
        for m in run.info.methods:
            methods.append(m.model_copy(update={"label": f"{name}/{m.label}", "name": m.name or m.label}))
        arms |= {(f"{name}/{label}", seed): sites for (label, seed), sites in run.arms.items()}
    return replace(base, info=base.info.model_copy(update={"methods": tuple(methods)}), arms=arms, lines=())
