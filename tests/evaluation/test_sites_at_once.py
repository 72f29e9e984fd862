"""Metrics of many small sites are computed together: the results are those of each site alone."""

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyclinic.evaluation import sample as samples
from polyclinic.evaluation.calibration import logistic_fit
from polyclinic.evaluation.metric import Metric
from polyclinic.evaluation.metric_functions import metrics_for
from polyclinic.evaluation.own_metrics import metrics_of
from polyclinic.evaluation.records.run_reader import NotARun, read_run
from polyclinic.evaluation.sample import Sample, sample
from polyclinic.report import build_report
from tests.support.synthetic_run import write_run

TASKS = ("classification", "multilabel", "segmentation", "regression", "survival", "reconstruction")
CLAIMS = [
    (task, classes, m)
    for task, classes in (("classification", 2), ("classification", 3), ("multilabel", 3), ("regression", 1))
    for m in metrics_for(task).values()
    if m.by_case == "always" or (m.by_case and task == "classification" and classes == 2)
]


def invented(task: str, n: int, seed: int, classes: int = 2) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    if task == "regression":
        return rng.normal(size=(n, 1)), rng.normal(size=(n, 1))
    if task == "multilabel":
        return rng.uniform(size=(n, 3)), rng.integers(0, 2, (n, 3))
    score = rng.uniform(size=(n, classes)).round(1) + 0.01  # equal scores occur
    return score / score.sum(1, keepdims=True), rng.integers(0, classes, n)


@pytest.mark.parametrize(("task", "classes", "metric"), CLAIMS, ids=lambda v: getattr(v, "name", v))
def test_cases_of_weight_0_do_not_count_where_a_metric_says_so(task: str, classes: int, metric: Metric) -> None:
    score, target = invented(task, 21, 0, classes)
    if target.ndim == 2 and task == "multilabel":
        target[:, 2] = 0  # the other cases have this label
    elif classes == 3:
        target %= 2  # and this class
    other, others = invented(task, 17, 1, classes)
    rng = np.random.default_rng(2)
    weight = rng.integers(0, 3, (5, 21)).astype(float)
    weight[0] = target.ravel()[:21] == 0 if target.ndim == 1 else 1.0  # a row with one class
    alone = metric.kernel(score, target, weight)
    together = metric.kernel(
        np.concatenate([score, other]), np.concatenate([target, others]), np.pad(weight, ((0, 0), (0, 17)))
    )
    np.testing.assert_allclose(together, alone, rtol=1e-9, atol=1e-12)


def results(data: Sample, table: dict[str, Metric]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, metric in table.items():
        for site in data.sites:
            found[f"{name}/{site}"] = data.estimate("fedavg", [site], metric, True)
            found[f"{name}/{site}/gain"] = data.difference("fedavg", "local", [site], metric)
        found[name] = data.macro_estimate("fedavg", data.sites, metric)
    return found


@pytest.mark.parametrize("task", TASKS)
def test_sites_together_have_the_results_of_sites_alone(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sites of 1 to 30 patients, one of a single class, and one that a method did not test in one seed."""
    sites = {f"s{i}": ("training", n, share, 0.0, 0.0) for i, (n, share) in enumerate([(30, 0.5), (1, 0.5), (9, 0.0)])}
    sites |= {f"t{i}": ("training", 5 + i, 0.4, 0.1 * i, 0.0) for i in range(9)}
    run = read_run(write_run(tmp_path / "r", task, sites=sites, methods=("local", "fedavg"), seeds=(0, 1)))
    arms = {k: dict(v) for k, v in run.arms.items()}
    del arms["local", 1]["t3"]
    table = dict(metrics_of(run.info))
    together = results(sample(run, 0.95), table)
    monkeypatch.setattr(samples, "BATCH", 0)
    alone = results(sample(run, 0.95), table)
    assert any(e.low is not None for e in alone.values())
    for key, e in alone.items():
        mine = together[key]
        for k in ("value", "low", "high", "p"):
            a, b = getattr(e, k, None), getattr(mine, k, None)
            assert a == b or a == pytest.approx(b, rel=1e-9, abs=1e-12), (key, k)
        assert (mine.n, mine.how, mine.why) == (e.n, e.how, e.why), key


def test_a_metric_of_which_nothing_is_known_sees_one_site(tmp_path: Path) -> None:
    sites = {f"s{i}": ("training", n, 0.5, 0.0, 0.0) for i, n in enumerate([7, 5, 9])}
    data = sample(read_run(write_run(tmp_path / "r", sites=sites, methods=("fedavg",), seeds=(0,))), 0.95)
    count = Metric("cases", "Cases", lambda score, target, weight: np.full(len(weight), float(len(target))))
    assert [data.value("fedavg", 0, [site], count) for site in ("s0", "s1", "s2")] == [7.0, 5.0, 9.0]


def test_a_small_site_is_computed_with_others_and_a_large_one_alone(tmp_path: Path) -> None:
    sites = {f"s{i}": ("training", n, 0.5, 0.0, 0.0) for i, n in enumerate([40, 50, 90, 300, 20, 30])}
    run = read_run(write_run(tmp_path / "r", sites=sites, methods=("fedavg",), seeds=(0,)))
    data, table = sample(run, 0.95), metrics_of(run.info)
    batches = {s: [g for (g,) in data._batch(("fedavg",), (0,), [s], table["auc"])] for s in data.sites}
    assert batches["s0"] == batches["s2"] == ["s0", "s1", "s2"]
    assert batches["s3"] == ["s3"]
    assert batches["s4"] == ["s4", "s5"]
    assert data._batch(("fedavg",), (0,), ["s0", "s1"], table["auc"]) == [("s0", "s1")]


def test_fits_at_once_are_those_of_each_alone() -> None:
    """Of groups with leave-one-out rows; one is separated by a threshold, and one has a single class."""
    rng, parts = np.random.default_rng(0), []
    for i, n in enumerate([12, 20, 7, 9]):
        x = rng.normal(size=n)
        y = (x > 0).astype(float) if i == 2 else np.ones(n) if i == 3 else (rng.uniform(size=n) < 0.5).astype(float)
        parts.append((x, y, np.concatenate([np.ones((1, n)), 1 - np.eye(n)])))
    x, y = (np.concatenate([p[k] for p in parts]) for k in (0, 1))
    weight, at, row = np.zeros((sum(len(p[2]) for p in parts), len(x))), 0, 0
    for _, mine, w in parts:
        weight[row : row + len(w), at : at + len(mine)] = w
        at, row = at + len(mine), row + len(w)
    for slope in (True, False):
        together = logistic_fit(x, y, weight, slope)
        alone = [logistic_fit(*p, slope) for p in parts]
        for k in (0, 1):
            np.testing.assert_allclose(together[k], np.concatenate([a[k] for a in alone]), rtol=1e-8, atol=1e-10)
        assert np.isnan(together[0]).any()
        assert np.isfinite(together[0]).sum() >= 30


def test_a_report_leaves_the_garbage_collector_as_it_was(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", methods=("fedavg",), seeds=(0,))
    build_report(run)
    assert gc.isenabled()
    (run / "run.json").write_text("{")
    with pytest.raises(NotARun):
        build_report(run)
    assert gc.isenabled()
    gc.disable()
    try:
        with pytest.raises(NotARun):
            build_report(run)
        assert not gc.isenabled()
    finally:
        gc.enable()
