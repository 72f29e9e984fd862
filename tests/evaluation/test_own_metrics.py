"""Metrics of packages in the evaluation of a run: the same values and intervals as the task's own."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import polyclinic as pc
from polyclinic.errors import ConfigError
from polyclinic.evaluation.records.run_reader import read_run
from polyclinic.evaluation.run_evaluation import Evaluation, evaluate
from tests.support.synthetic_run import write_run


def squared(scores: NDArray[Any], target: NDArray[Any]) -> float:
    """The Brier score of two classes."""
    return float(((scores[:, 1] - target) ** 2).mean())


def evaluated(folder: Path, entry: dict[str, Any], metric: str) -> Evaluation:
    """The evaluation of a run that names one metric of a package, with ``metric`` as its main one."""
    write_run(folder, methods=("local", "fedavg"), seeds=(0, 1))
    info = json.loads((folder / "run.json").read_text())
    info |= {"metrics": [entry], "metric": metric, "higher_is_better": False}
    (folder / "run.json").write_text(json.dumps(info))
    return evaluate(read_run(folder))


def test_values_intervals_and_differences_are_those_of_the_same_metric_of_the_task(tmp_path: Path) -> None:
    name = pc.metric(squared, label="Squared error", higher_is_better=False)
    entry = {"name": name, "label": "Squared error", "higher_is_better": False}
    own = evaluated(tmp_path / "own", entry, name)
    assert own.metric.label == "Squared error"
    for method in own.methods:
        assert method.macro.value is not None
        for site, found in method.sites.items():
            assert found[name].value == pytest.approx(found["brier"].value), site
    usual = evaluated(tmp_path / "usual", entry, "brier")
    for a, b in zip(own.methods, usual.methods, strict=True):
        assert a.macro.value == pytest.approx(b.macro.value)
        assert a.worst == pytest.approx(b.worst)
    mine, theirs = own.comparisons["local"], usual.comparisons["local"]
    assert (mine.value, mine.low, mine.high) == pytest.approx((theirs.value, theirs.low, theirs.high))


def test_a_metric_that_is_not_here_is_said_and_never_silently_left_out(tmp_path: Path) -> None:
    entry = {"name": "acme-lost", "label": "Lost"}
    found = evaluated(tmp_path / "run", entry, "brier")
    (method, *_) = found.methods
    lost = method.means["acme-lost"]
    assert lost.value is None
    site = next(iter(method.sites.values()))
    assert site["acme-lost"].why == "no package that provides acme-lost is installed here"
    with pytest.raises(ConfigError, match="'acme-lost' of the run made-up is of a package, or a program"):
        evaluated(tmp_path / "main", entry, "acme-lost")


def test_a_metric_of_images_needs_no_package_to_be_reported(tmp_path: Path) -> None:
    """Its values are among the predictions."""
    from polyclinic.evaluation.own_metrics import metrics_of
    from polyclinic.evaluation.records.record_schema import OwnMetricInfo, RunInfo

    own = OwnMetricInfo(name="acme-overlap", label="Overlap")
    info = RunInfo(name="x", task="segmentation", metric="acme-overlap", sites=(), methods=(), metrics=(own,))
    kernel = metrics_of(info)["acme-overlap"].kernel
    values = np.array([[0.5, np.nan], [1.0, 0.0]])
    assert kernel(values, np.zeros(2), np.ones((1, 2))) == pytest.approx([0.5])
