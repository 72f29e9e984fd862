"""Survival statistics against scikit-survival 0.28.0 and lifelines 0.30.3, whose results are written here."""

import numpy as np
import pytest

from polyclinic.evaluation.metric_functions import measure
from polyclinic.evaluation.survival_metrics import SURVIVAL
from polyclinic.statistics import survival as s
from polyclinic.statistics.undefined import Array

TIME = np.array([2, 3, 3, 5, 6, 6, 8, 9, 11, 12, 12, 14, 15, 17, 20.0])  # with ties
EVENT = np.array([1, 1, 0, 1, 1, 0, 1, 0, 1, 1, 1, 0, 1, 0, 0.0])
SCORE = np.array([0.1, 0.3, 0.2, 0.3, 0.5, 0.2, 0.4, 0.9, 0.6, 0.5, 0.8, 0.7, 0.6, 0.9, 0.8])
APART = np.array([2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 17, 20.0])  # without ties
ONE = np.ones((1, 15))
CUTS = np.array([4.0, 8.5, 13.5])
CURVES = np.stack([1 - (1 - SCORE) * 0.5, 1 - (1 - SCORE) * 0.8, SCORE * 0.9], 1)


def targets(time: Array = APART, event: Array = EVENT, cuts: Array = CUTS) -> Array:
    return np.column_stack([time, event, np.tile(cuts, (len(time), 1))])


def test_kaplan_meier_with_limits_equals_lifelines() -> None:
    assert s.survival_curve(TIME, EVENT, ONE, np.array([5.0]))[0, 0] == pytest.approx(14 / 15 * 13 / 14 * 11 / 12)
    value, low, high = s.curve_limits(TIME, EVENT, np.array([4.0, 7, 13, 16]))
    np.testing.assert_allclose(value, [0.8666666667, 0.7222222222, 0.3668430335, 0.2445620223], atol=1e-10)
    np.testing.assert_allclose(low, [0.5639120057, 0.4171751699, 0.1192242862, 0.0462308834], atol=1e-10)
    np.testing.assert_allclose(high, [0.9648844959, 0.8859168082, 0.6232184968, 0.5245821229], atol=1e-10)


def test_concordance_equals_scikit_survival() -> None:
    assert s.concordance(SCORE, TIME, EVENT, ONE)[0] == pytest.approx(0.8611111111, abs=1e-10)
    assert s.weighted_concordance(SCORE, APART, EVENT, ONE, 14.5)[0] == pytest.approx(0.8452647834, abs=1e-10)


def test_brier_scores_equal_scikit_survival() -> None:
    got = s.brier_scores(CURVES, APART, EVENT, ONE, CUTS)
    np.testing.assert_allclose(got[0], [0.0934722222, 0.1188464198, 0.1710092240], atol=1e-10)
    area = (
        4 * 0.0934722222 / 2 + 4.5 * (0.0934722222 + 0.1188464198) / 2 + 5 * (0.1188464198 + 0.1710092240) / 2
    ) / 13.5
    assert s.integrated(got, CUTS)[0] == pytest.approx(area)
    assert SURVIVAL["ibs"].of(CURVES, targets()) == pytest.approx(area)


def test_an_event_precedes_a_censoring_at_the_same_time() -> None:
    """At 3, one of 14 patients has the event and one of the other 13 is censored."""
    steps, curve, _ = s._censoring(TIME, EVENT, ONE)
    assert curve[0, steps.tolist().index(3)] == pytest.approx(12 / 13)


def test_observed_to_expected_is_by_kaplan_meier() -> None:
    observed = 1 - s.survival_curve(APART, EVENT, ONE, CUTS[-1:])[0, 0]
    got = SURVIVAL["observed_to_expected"].of(CURVES, targets())
    assert got == pytest.approx(observed / (1 - CURVES[:, -1]).mean())


@pytest.mark.parametrize("seed", range(5))
def test_a_weight_of_two_is_a_case_twice(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.integers(0, 3, size=15)
    weight[[0, -1]] = 1
    score, target = CURVES.round(1), targets(TIME)
    for name, metric in SURVIVAL.items():
        once = metric.kernel(score, target, weight[None].astype(float))[0]
        twice = metric.kernel(np.repeat(score, weight, 0), np.repeat(target, weight, 0), np.ones((1, weight.sum())))[0]
        assert once == pytest.approx(twice, rel=1e-9), name
        both = metric.kernel(score, target, np.stack([weight, np.ones(15)]).astype(float))
        assert both[0] == pytest.approx(once, rel=1e-12), name


def test_a_score_of_one_column_is_only_an_order() -> None:
    got = measure("survival", SCORE[:, None], targets())
    assert got["c_index"] == pytest.approx(s.concordance(SCORE, APART, EVENT, ONE)[0])
    assert isinstance(got["ibs"], str)
    assert isinstance(got["observed_to_expected"], str)


def test_what_follow_up_does_not_determine_is_undefined() -> None:
    """No value is made up: without events, and up to a horizon that no patient was followed to."""
    none = measure("survival", CURVES, targets(event=np.zeros(15)))
    assert isinstance(none["c_index"], str)
    assert isinstance(none["uno_c"], str)
    far = measure("survival", CURVES, targets(cuts=np.array([4.0, 8.5, 30.0])))
    assert isinstance(far["ibs"], str)
    assert isinstance(far["observed_to_expected"], str)
    assert isinstance(far["c_index"], float)


def test_many_cases_are_compared_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = s.concordance(SCORE, TIME, EVENT, ONE)
    monkeypatch.setattr(s, "ROWS", 2)
    np.testing.assert_allclose(s.concordance(SCORE, TIME, EVENT, ONE), whole, rtol=1e-12)
