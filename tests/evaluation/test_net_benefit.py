"""Net benefit by hand and by law, as a mean over sites and seeds with its interval."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from polyclinic.evaluation import net_benefit as nb
from polyclinic.evaluation.records.run_reader import read_run
from polyclinic.evaluation.sample import sample
from tests.support.synthetic_run import write_run

SITES = {"ada": ("training", 40, 0.4, 0.0, 0.0), "bo": ("training", 30, 0.2, 0.2, 0.1)}


def two(p: Any) -> Any:
    return np.stack([1 - np.asarray(p), np.asarray(p)], 1)


def test_net_benefit_by_hand() -> None:
    score, target = two([0.1, 0.6, 0.7, 0.3]), np.array([0, 0, 1, 1])
    assert nb.of_model(0.2).of(score, target) == pytest.approx(2 / 4 - 1 / 4 * 0.25)  # 0.6, 0.7 and 0.3: TP 2, FP 1
    assert nb.of_all(0.2).of(score, target) == pytest.approx(0.5 - 0.5 * 0.25)
    assert nb.gain(0.2).of(score, target) == pytest.approx(0.4375 - 0.375)
    assert nb.gain(0.8).of(score, target) == 0  # no patient is treated, which is the better default


def test_treating_all_gains_nothing_at_the_prevalence_and_a_perfect_model_gains_the_prevalence() -> None:
    rng = np.random.default_rng(3)
    y = (rng.uniform(size=200) < 0.3).astype(int)
    assert nb.of_all(float(y.mean())).of(two(y * 1.0), y) == pytest.approx(0, abs=1e-12)
    assert all(nb.of_model(t).of(two(y * 1.0), y) == pytest.approx(y.mean()) for t in nb.THRESHOLDS)


def test_the_curve_is_a_mean_over_sites_and_seeds_with_welchs_interval(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "r", sites=SITES, methods=("fedavg",), seeds=(0, 1)))
    data, t = sample(run, 0.95), 0.3
    (point,) = nb.decision_curve(data, "fedavg", list(SITES), [t])
    each = []
    for site in SITES:
        arms = [run.arms["fedavg", seed][site] for seed in (0, 1)]
        worth = np.where(arms[0].target == 1, 1, -t / (1 - t))
        each.append(np.mean([worth * (p.score[:, 1] >= t) for p in arms], axis=0))
    assert point.model.value == pytest.approx(np.mean([x.mean() for x in each]))
    var = np.array([x.var(ddof=1) / len(x) for x in each]) / 4
    df = var.sum() ** 2 / sum(v**2 / (len(x) - 1) for v, x in zip(var, each, strict=True))
    half = stats.t.ppf(0.975, df) * var.sum() ** 0.5
    assert (point.model.low, point.model.high) == pytest.approx(
        (point.model.value - half, point.model.value + half), rel=1e-6
    )
