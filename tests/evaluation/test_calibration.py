"""Calibration by hand and by law; operating points and net benefit by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyclinic.evaluation import calibration as cal
from polyclinic.statistics.undefined import Undefined


def two(p):
    return np.stack([1 - np.asarray(p), np.asarray(p)], 1)


def honest(n=4000, seed=0):
    """Probabilities that are true."""
    rng = np.random.default_rng(seed)
    p = 1 / (1 + np.exp(-rng.normal(0, 1.5, n)))
    return p, (rng.uniform(size=n) < p).astype(int)


def test_ece_by_hand() -> None:
    # Bins 0.1-0.2: mean 0.15, observed 0.5, two cases; 0.9-1.0: mean 0.95, observed 1, one case.
    score, target = two([0.1, 0.19999, 0.95]), np.array([0, 1, 1])
    expected = (2 / 3) * abs(0.5 - 0.149995) + (1 / 3) * 0.05
    assert cal.CALIBRATION["ece"].of(score, target) == pytest.approx(expected)


def test_ece_of_three_classes_asks_whether_the_likeliest_is_right() -> None:
    score = np.array([[0.7, 0.2, 0.1], [0.72, 0.18, 0.1]])
    assert cal.CALIBRATION["ece"].of(score, np.array([0, 1])) == pytest.approx(abs(0.5 - 0.71))


def test_reliability_points_hold_all_cases() -> None:
    p, y = honest(500)
    bins = cal.reliability(two(p), y)
    assert sum(b.n for b in bins) == 500
    assert all(b.low <= b.predicted <= b.high for b in bins)
    assert sum(b.n * b.observed for b in bins) == pytest.approx(y.sum())
    assert [b.n for b in cal.reliability(two([1.0, 0.0]), np.array([1, 0]))] == [1, 1]


def test_true_probabilities_have_slope_one_and_intercept_zero() -> None:
    p, y = honest()
    assert cal.CALIBRATION["calibration_slope"].of(two(p), y) == pytest.approx(1, abs=0.08)
    assert cal.CALIBRATION["calibration_intercept"].of(two(p), y) == pytest.approx(0, abs=0.1)
    assert cal.CALIBRATION["ece"].of(two(p), y) < 0.03


@given(stretch=st.floats(0.3, 3), shift=st.floats(-1, 1))
@settings(max_examples=15, deadline=None)
def test_stretched_and_shifted_log_odds(stretch, shift) -> None:
    p, y = honest(400, 2)
    p = np.clip(p, 0.02, 0.98)
    x = np.log(p / (1 - p))
    slope = cal.CALIBRATION["calibration_slope"]
    moved = 1 / (1 + np.exp(-stretch * x))
    assert slope.of(two(moved), y) * stretch == pytest.approx(slope.of(two(p), y), rel=1e-4)
    intercept = cal.CALIBRATION["calibration_intercept"]
    moved = 1 / (1 + np.exp(-(x + shift)))
    assert intercept.of(two(moved), y) + shift == pytest.approx(intercept.of(two(p), y), abs=1e-5)


def test_logistic_fit_equals_scikit_learn() -> None:
    linear = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is the second implementation")
    p, y = honest(300, 5)
    x = np.log(p / (1 - p))
    weight = np.random.default_rng(0).integers(0, 4, 300).astype(float)
    fit = linear.LogisticRegression(C=1e10, tol=1e-10, max_iter=1000).fit(x[:, None], y, weight)
    a, b = cal.logistic_fit(x, y.astype(float), weight[None])
    assert (a[0], b[0]) == (pytest.approx(fit.intercept_[0], abs=1e-4), pytest.approx(fit.coef_[0, 0], abs=1e-4))


def test_separated_classes_have_no_slope() -> None:
    with pytest.raises(Undefined):
        cal.CALIBRATION["calibration_slope"].of(two([0.1, 0.2, 0.8, 0.9]), np.array([0, 0, 1, 1]))


@given(seed=st.integers(0, 1000), wanted=st.sampled_from([0.8, 0.9, 0.95, 1.0]))
@settings(max_examples=25, deadline=None)
def test_the_threshold_reaches_the_sensitivity_and_no_higher_one_does(seed, wanted) -> None:
    p, y = honest(60, seed)
    p, y = p.round(2), y.astype(bool)
    t = cal.threshold_at(p, y, wanted)
    assert (p[y] >= t).mean() >= wanted - 1e-9
    higher = p[p > t]
    if len(higher):
        assert (p[y] >= higher.min()).mean() < wanted


def test_no_positive_case_has_no_threshold() -> None:
    with pytest.raises(Undefined, match="no positive"):
        cal.threshold_at(np.array([0.5]), np.array([0]), 0.9)


def test_the_calibration_error_has_no_interval() -> None:
    """The estimate is biased: true probabilities have a mean error of 0.08 at 174 patients, and 0 never in an interval."""
    assert not cal.CALIBRATION["ece"].has_interval
    errors = [cal.CALIBRATION["ece"].of(two(p), y) for p, y in (honest(174, seed) for seed in range(20))]
    assert np.mean(errors) > 0.05


def test_net_benefit_by_hand() -> None:
    (point,) = cal.decision_curve(np.array([0.1, 0.6, 0.7, 0.3]), np.array([0, 0, 1, 1]), [0.2])
    assert point.model == pytest.approx(2 / 4 - 1 / 4 * 0.25)  # 0.6 and 0.7 and 0.3 acted on: TP 2, FP 1
    assert point.treat_all == pytest.approx(0.5 - 0.5 * 0.25)


def test_net_benefit_of_everybody_is_zero_at_the_prevalence() -> None:
    p, y = honest(1000, 3)
    (point,) = cal.decision_curve(p, y, [float(y.mean())])
    assert point.treat_all == pytest.approx(0, abs=1e-12)
    perfect = cal.decision_curve(y.astype(float), y)
    assert all(b.model == pytest.approx(y.mean()) for b in perfect)
    with pytest.raises(Undefined):
        cal.decision_curve(np.zeros(0), np.zeros(0))
