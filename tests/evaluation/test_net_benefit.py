"""Net benefit by hand and by law, as a mean over sites and seeds with its interval."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from polyclinic.evaluation import net_benefit as nb
from polyclinic.evaluation.metric import Metric
from polyclinic.evaluation.records.run_reader import read_run
from polyclinic.evaluation.sample import sample
from tests.support.known import known
from tests.support.synthetic_run import write_run

SITES = {"ada": ("training", 40, 0.4, 0.0, 0.0), "bo": ("training", 30, 0.2, 0.2, 0.1)}


def two(p: Any) -> Any:
    return np.stack([1 - np.asarray(p), np.asarray(p)], 1)


def test_net_benefit_by_hand() -> None:
    model, treat_all = nb.benefits(two([0.1, 0.6, 0.7, 0.3]), np.array([0, 0, 1, 1]), np.array([0.2, 0.8]))
    assert model[:, 0] == pytest.approx([0, -0.25, 1, 1])  # 0.6, 0.7 and 0.3 are treated: TP 2, FP 1
    assert treat_all[:, 0] == pytest.approx([-0.25, -0.25, 1, 1])
    assert not model[:, 1].any()  # no patient is treated
    assert treat_all[:, 1] == pytest.approx([-4, -4, 1, 1])


def test_treating_all_gains_nothing_at_the_prevalence_and_a_perfect_model_gains_the_prevalence() -> None:
    rng = np.random.default_rng(3)
    y = (rng.uniform(size=200) < 0.3).astype(int)
    prevalence = np.array([y.mean()])
    assert nb.benefits(two(y * 1.0), y, prevalence)[1].mean() == pytest.approx(0, abs=1e-12)
    assert nb.benefits(two(y * 1.0), y, np.array(nb.THRESHOLDS))[0].mean(0) == pytest.approx(y.mean())


def test_the_curve_is_a_mean_over_sites_and_seeds_with_welchs_interval(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "r", sites=SITES, methods=("fedavg",), seeds=(0, 1)))
    data, t = sample(run, 0.95), 0.3
    (point,) = nb.decision_curve(data, "fedavg", list(SITES), [t])
    each = []
    for site in SITES:
        arms = [run.arms["fedavg", seed][site] for seed in (0, 1)]
        worth = np.where(arms[0].target == 1, 1, -t / (1 - t))
        each.append(np.mean([worth * (known(p.score)[:, 1] >= t) for p in arms], axis=0))
    assert point.model.value == pytest.approx(np.mean([x.mean() for x in each]))
    var = np.array([x.var(ddof=1) / len(x) for x in each]) / 4
    df = var.sum() ** 2 / sum(v**2 / (len(x) - 1) for v, x in zip(var, each, strict=True))
    half = stats.t.ppf(0.975, df) * var.sum() ** 0.5
    assert (point.model.low, point.model.high) == pytest.approx(
        (point.model.value - half, point.model.value + half), rel=1e-6
    )
    gains = [
        x.mean() - max(np.where(run.arms["fedavg", 0][s].target == 1, 1, -t / (1 - t)).mean(), 0)
        for s, x in zip(SITES, each, strict=True)
    ]
    assert point.gain.value == pytest.approx(np.mean(gains))


def test_seeds_with_other_patients_share_a_site_with_the_mean_of_their_standard_errors(tmp_path: Path) -> None:
    run, t = read_run(write_run(tmp_path / "r", sites=SITES, methods=("fedavg",), seeds=(0, 1))), 0.3
    arms = {key: dict(arm) for key, arm in run.arms.items()}
    for site, p in arms[
        "fedavg", 1
    ].items():  # numbers from 0 on, one patient less: other patients than those of seed 0
        arms["fedavg", 1][site] = replace(
            p, patient=p.patient[:-1], score=known(p.score)[:-1], target=known(p.target)[:-1]
        )
    data = sample(replace(run, arms=arms), 0.95)
    assert not data.shared
    (point,) = nb.decision_curve(data, "fedavg", list(SITES), [t])
    variances, df = [], []
    for site in SITES:
        errors, least = [], []
        for seed in (0, 1):
            p = arms["fedavg", seed][site]
            worth = np.where(p.target == 1, 1, -t / (1 - t)) * (known(p.score)[:, 1] >= t)
            errors.append((worth.var(ddof=1) / len(worth)) ** 0.5)
            least.append(len(worth) - 1)
        variances.append(np.mean(errors) ** 2 / 4)
        df.append(min(least))
    total = sum(variances)
    half = stats.t.ppf(0.975, total**2 / sum(v**2 / k for v, k in zip(variances, df, strict=True))) * total**0.5
    assert known(point.model.high) - known(point.model.value) == pytest.approx(half, rel=1e-6)


def test_the_curve_is_that_of_a_metric_at_every_threshold(tmp_path: Path) -> None:
    """All thresholds at once give what the jackknife of any metric gives for one."""
    run = read_run(write_run(tmp_path / "r", sites=SITES, methods=("fedavg",), seeds=(0, 1), images=2))
    data = sample(run, 0.95)

    def kernel(t: float, score: Any, target: Any, weight: Any) -> Any:
        model, treat_all = (
            weight @ x / weight.sum(1, keepdims=True) for x in nb.benefits(score, target, np.array([t]))
        )
        return (model - np.maximum(treat_all, 0))[:, 0]

    for point in nb.decision_curve(data, "fedavg", list(SITES)):
        expected = data.macro_estimate("fedavg", list(SITES), Metric("gain", "Gain", partial(kernel, point.threshold)))
        assert (point.gain.value, point.gain.low, point.gain.high) == pytest.approx(
            (expected.value, expected.low, expected.high), rel=1e-9
        )
        assert (point.gain.n, point.gain.how) == (expected.n, expected.how)


def test_one_patient_has_no_interval(tmp_path: Path) -> None:
    sites = {**SITES, "cy": ("training", 1, 1.0, 0.0, 0.0)}
    data = sample(read_run(write_run(tmp_path / "r", sites=sites, methods=("fedavg",), seeds=(0,))), 0.95)
    (point,) = nb.decision_curve(data, "fedavg", list(sites), [0.3])
    assert point.model.low is None
    assert point.model.why == "no interval: fewer than two patients"
