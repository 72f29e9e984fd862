"""Calibration by hand and by law, and operating points by hand."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyclinic.evaluation import calibration as cal
from polyclinic.statistics.undefined import Undefined


def two(p: Any) -> Any:
    return np.stack([1 - np.asarray(p), np.asarray(p)], 1)


def honest(n: Any = 4000, seed: Any = 0) -> Any:
    """Probabilities that are true."""
    rng = np.random.default_rng(seed)
    p = 1 / (1 + np.exp(-rng.normal(0, 1.5, n)))
    return p, (rng.uniform(size=n) < p).astype(int)


ERROR = cal.CALIBRATION["calibration_error"]


def test_calibration_error_by_hand() -> None:
    # Bin 0.1-0.2: means 0.15 and 0.5, two cases, so that 0.5 x 0.5 / (2 - 1) is subtracted; a single case counts as 0.
    score, target = two([0.1, 0.19999, 0.95]), np.array([0, 1, 1])
    assert ERROR.of(score, target) == 0  # 0.35^2 < 0.25
    score, target = two([0.61, 0.62, 0.63, 0.95]), np.array([0, 0, 0, 1])
    assert ERROR.of(score, target) == pytest.approx((3 / 4 * 0.62**2) ** 0.5)


def test_calibration_error_of_three_classes_asks_whether_the_likeliest_is_right() -> None:
    score = np.array([[0.7, 0.2, 0.1], [0.72, 0.18, 0.1]])
    assert ERROR.of(score, np.array([1, 1])) == pytest.approx(0.71)


def test_calibration_error_is_not_biased_by_sampling() -> None:
    """The usual estimate of true probabilities is about 0.08 at 174 patients; half of the debiased ones are 0."""
    samples = [honest(174, seed) for seed in range(60)]
    errors = np.array([ERROR.of(two(p), y) for p, y in samples])
    usual = [sum(b.n / 174 * abs(b.predicted - b.observed) for b in cal.reliability(two(p), y)) for p, y in samples]
    assert np.mean(usual) > 0.07
    assert 0.3 < np.mean(errors == 0) < 0.8
    wrong = [ERROR.of(two(np.clip(p + 0.15, 0, 1)), y) for p, y in samples]
    assert np.median(wrong) == pytest.approx(0.14, abs=0.03)


def test_observed_to_expected_is_their_ratio() -> None:
    ratio = cal.CALIBRATION["observed_to_expected"]
    assert ratio.of(two([0.2, 0.4, 0.4]), np.array([0, 1, 1])) == pytest.approx(2.0)
    p, y = honest()
    assert ratio.of(two(p), y) == pytest.approx(1, abs=0.05)


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
    assert ERROR.of(two(p), y) < 0.03


@given(stretch=st.floats(0.3, 3), shift=st.floats(-1, 1))
@settings(max_examples=15, deadline=None)
def test_stretched_and_shifted_log_odds(stretch: Any, shift: Any) -> None:
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


def test_overconfident_predictions_have_a_slope() -> None:
    """Wide log odds that say little: from a slope of 1, Newton's method overshoots and does not converge."""
    rng = np.random.default_rng(1)
    for _ in range(20):
        x, y = 4 * rng.normal(size=40) + 3, (rng.uniform(size=40) < 0.4).astype(float)
        (a,), (b,) = cal.logistic_fit(x, y, np.ones((1, 40)))
        error = y - 1 / (1 + np.exp(-(a + b * x)))
        assert (error.sum(), error @ x) == (pytest.approx(0, abs=1e-6), pytest.approx(0, abs=1e-6))


def test_separated_classes_have_no_slope() -> None:
    with pytest.raises(Undefined):
        cal.CALIBRATION["calibration_slope"].of(two([0.1, 0.2, 0.8, 0.9]), np.array([0, 0, 1, 1]))


@given(seed=st.integers(0, 1000), wanted=st.sampled_from([0.8, 0.9, 0.95, 1.0]))
@settings(max_examples=25, deadline=None)
def test_the_threshold_reaches_the_sensitivity_and_no_higher_one_does(seed: int, wanted: Any) -> None:
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
    """A root of a difference that is cut at 0 has no limits by Student's t."""
    assert not ERROR.has_interval
