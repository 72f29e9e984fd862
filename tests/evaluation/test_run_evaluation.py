"""Parts of an evaluation that are not of one metric: each class against the rest, and sites that a method misses."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from polyclinic.evaluation.records.predictions import Predictions
from polyclinic.evaluation.records.run_reader import read_run
from polyclinic.evaluation.run_evaluation import Options, evaluate
from tests.support.known import known
from tests.support.synthetic_run import write_run

SITES = {"ada": ("training", 40, 0.5, 0.0, 0.0), "bo": ("training", 30, 0.5, 0.0, 0.0)}


def auc(score: np.ndarray, positive: np.ndarray) -> float:
    above = score[positive][:, None] - score[~positive][None]
    return float(np.mean((above > 0) + 0.5 * (above == 0)))


def test_each_of_three_classes_against_the_rest(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "r", sites=SITES, methods=("fedavg",), seeds=(0,)))
    rng, arm = np.random.default_rng(1), dict[str, Predictions]()
    for site, n in (("ada", 40), ("bo", 30)):
        target = np.arange(n) % 3
        logits = rng.normal(size=(n, 3)) + np.eye(3)[target]
        shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        arm[site] = Predictions(np.arange(n), shares, target)
    run = replace(
        run,
        info=run.info.model_copy(update={"classes": ("cyst", "benign", "malignant")}),
        arms={("fedavg", 0): arm},
        validation={},
    )
    (method,) = evaluate(run, Options()).methods
    assert list(method.by_class) == ["cyst", "benign", "malignant"]
    for k, found in enumerate(method.by_class.values()):
        expected = [auc(known(p.score)[:, k], np.asarray(p.target) == k) for p in arm.values()]
        assert found.value == pytest.approx(np.mean(expected))


def test_a_site_that_a_method_was_not_tested_at_has_no_row(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "r", sites=SITES, methods=("local", "fedavg"), seeds=(0,)))
    arms = {key: dict(arm) for key, arm in run.arms.items()}
    del arms["local", 0]["bo"]
    by_label = {m.label: m for m in evaluate(replace(run, arms=arms), Options()).methods}
    assert list(by_label["local"].sites) == ["ada"]
    assert list(by_label["fedavg"].sites) == ["ada", "bo"]
