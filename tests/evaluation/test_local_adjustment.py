"""Recalibration and prediction sets at every site, from validation patients only."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit

from polyclinic.evaluation.operating_points import share_of_patients
from polyclinic.evaluation.prediction_sets import prediction_sets, threshold_of
from polyclinic.evaluation.recalibration import intercept_of, recalibration
from polyclinic.evaluation.records.predictions import Predictions
from polyclinic.evaluation.records.run_reader import Run, read_run
from tests.support.known import known
from tests.support.synthetic_run import write_run

SITES = {"ada": ("training", 200, 0.4, 0.0, 0.0), "bo": ("training", 160, 0.4, 0.2, 0.1)}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return read_run(write_run(tmp_path / "r", sites=SITES, methods=("fedavg",), seeds=(0, 1)))


def two(p: np.ndarray) -> np.ndarray:
    return np.stack([1 - p, p], 1)


def shifted(p: Predictions, by: float) -> Predictions:
    assert p.score is not None
    return replace(p, score=two(expit(logit(np.clip(p.score[:, 1], 1e-6, 1 - 1e-6)) + by)))


def test_the_intercept_maximizes_the_penalized_likelihood() -> None:
    rng = np.random.default_rng(0)
    p = rng.uniform(0.05, 0.95, 60)
    y = (rng.uniform(size=60) < expit(logit(p) + 0.8)).astype(float)

    def loss(a: float) -> float:
        q = expit(logit(p) + a)
        return float(-(y * np.log(q) + (1 - y) * np.log(1 - q)).sum() + a * a / 2)

    assert intercept_of(p, y) == pytest.approx(minimize_scalar(loss).x, abs=1e-5)
    assert 0 < intercept_of(p, np.ones(60)) < 10  # one class has no maximum without the penalty


def test_a_site_with_a_shift_is_corrected_and_a_site_without_is_not_changed_much(run: Any) -> None:
    held = {k: {**v, "ada": shifted(v["ada"], 2.5)} for k, v in run.validation.items()}
    tested = {k: {**v, "ada": shifted(v["ada"], 2.5)} for k, v in run.arms.items()}
    found = known(recalibration(replace(run, arms=tested, validation=held), "fedavg", 0.95, "patient"))
    before, after = ({s: known(of[s]["accuracy"].value) for s in SITES} for of in (found.before, found.after))
    assert known(found.before["ada"]["observed_to_expected"].value) < 0.7
    assert found.after["ada"]["observed_to_expected"].value == pytest.approx(1, abs=0.12)
    assert after["ada"] > before["ada"] + 0.05
    assert after["bo"] == pytest.approx(before["bo"], abs=0.05)
    assert found.differences["brier"].verdict() == "better"
    assert known(found.differences["brier"].adjusted) >= known(found.differences["brier"].p)


def test_test_patients_do_not_determine_the_correction(run: Any) -> None:
    assert run.arms["fedavg", 0]["ada"].target is not None
    other = {k: {s: replace(p, target=1 - p.target) for s, p in v.items()} for k, v in run.arms.items()}
    ours, theirs = (known(recalibration(replace(run, arms=a), "fedavg", 0.95, "patient")) for a in (run.arms, other))
    for site in SITES:  # accuracy of the opposite classes is 1 minus accuracy if the decisions are the same
        a, b = (known(of.after[site]["accuracy"].value) for of in (ours, theirs))
        assert a + b == pytest.approx(1)


def test_sites_with_few_validation_patients_are_left_out_and_named(run: Any) -> None:
    def first(p: Predictions, n: int) -> Predictions:
        return Predictions(p.patient[:n], known(p.score)[:n], known(p.target)[:n])

    few = {k: {"ada": v["ada"], "bo": first(v["bo"], 9)} for k, v in run.validation.items()}
    found = known(recalibration(replace(run, validation=few), "fedavg", 0.95, "patient"))
    assert list(found.after) == ["ada"]
    assert found.without == {"bo": 9}
    assert recalibration(replace(run, validation={}), "fedavg", 0.95, "patient") is None
    assert recalibration(run, "fedavg", 0.95, "patient", min_cell=1000) is None


def test_the_conformal_threshold_by_hand() -> None:
    scores = np.array([0.5, 0.1, 0.9, 0.3, 0.7, 0.2, 0.4, 0.8, 0.6])
    assert threshold_of(scores, 0.9) == 0.9  # the 9th of 9
    assert threshold_of(scores, 0.5) == 0.5  # the 5th of 9
    assert threshold_of(scores[:8], 0.9) == np.inf


def test_sets_cover_exchangeable_patients_at_their_stated_rate() -> None:
    rng, covered = np.random.default_rng(0), []
    for _ in range(300):
        p = rng.beta(2, 2, 120)
        y = (rng.uniform(size=120) < p).astype(int)
        excluded = 1 - two(p)[np.arange(120), y]
        covered.append((excluded[60:] <= threshold_of(excluded[:60], 0.9)).mean())
    assert 0.89 < np.mean(covered) < 0.93


def test_a_common_threshold_covers_on_average_and_a_sites_own_one_there(run: Any) -> None:
    found = known(prediction_sets(run, "fedavg", list(SITES), "patient"))
    assert found.needed == 9
    for sets in (*found.common.values(), *found.own.values()):
        assert known(sets.coverage.low) < known(sets.coverage.value) < known(sets.coverage.high)
        assert 0.75 < known(sets.coverage.value) <= 1
        assert 0.8 < known(sets.size) <= 2
    odd = {k: {**v, "ada": shifted(v["ada"], 3.0)} for k, v in run.validation.items()}
    tested = {k: {**v, "ada": shifted(v["ada"], 3.0)} for k, v in run.arms.items()}
    worse = known(prediction_sets(replace(run, arms=tested, validation=odd), "fedavg", list(SITES), "patient"))
    common = {site: known(worse.common[site].coverage.value) for site in SITES}
    assert common["bo"] > common["ada"] + 0.03
    assert known(worse.own["ada"].coverage.value) > common["ada"] + 0.03
    assert prediction_sets(replace(run, validation={}), "fedavg", list(SITES), "patient") is None
    one_seed = {key: sites for key, sites in run.validation.items() if key != ("fedavg", 1)}
    assert prediction_sets(replace(run, validation=one_seed), "fedavg", list(SITES), "patient") is None


def test_a_set_contains_a_class_if_it_is_not_excluded() -> None:
    score = np.array([[0.7, 0.2, 0.1], [0.45, 0.45, 0.1], [0.1, 0.1, 0.8]])
    assert (1 - score <= 0.6).sum(1).tolist() == [1, 2, 1]
    e = share_of_patients([np.array([1.0, 0.0, 1.0])], [np.array([[1.0], [1.0], [2.0]])], 0.95, True)
    assert e.value == pytest.approx(2 / 3)
    assert e.n == 2
