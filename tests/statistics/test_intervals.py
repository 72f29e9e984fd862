"""Intervals: published numbers, a second implementation, laws, and coverage by simulation."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from polyclinic.statistics import intervals as iv
from polyclinic.statistics.auc import auc_of, delong_parts
from polyclinic.statistics.jackknife import Jackknife, Spread
from polyclinic.statistics.undefined import Undefined


def delong_covariance(scores: Any, positive: Any, patient: Any = None) -> tuple[Any, Any]:
    auc, parts, _ = delong_parts(scores, positive, patient)
    return auc, parts.sum(0)


def test_delong_on_hanley_and_mcneils_ct_ratings() -> None:
    """109 CT images rated 1 to 5 (Radiology 1982); Stata's manual (roctab) prints 0.8932 and DeLong's 0.0307."""
    normal, abnormal = [33, 6, 6, 11, 2], [3, 2, 2, 11, 33]
    score = np.repeat(np.tile(np.arange(1, 6), 2), normal + abnormal).astype(float)
    positive = np.repeat([0, 1], [58, 51])
    auc, covariance = delong_covariance(score[None], positive)
    assert auc[0] == pytest.approx(0.8932, abs=5e-5)
    assert covariance[0, 0] ** 0.5 == pytest.approx(0.0307, abs=5e-5)


def ratings(seed: Any, m: Any = 15, n: Any = 20, scores: Any = 2) -> Any:
    rng = np.random.default_rng(seed)
    y = np.r_[np.ones(m), np.zeros(n)]
    common = rng.normal(size=m + n)
    return np.stack([(y + common + rng.normal(size=m + n)).round(1) for _ in range(scores)]), y


@given(seed=st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_delong_equals_its_definition(seed: int) -> None:
    scores, y = ratings(seed)
    auc, covariance = delong_covariance(scores, y)
    psi = [np.sign(s[y == 1][:, None] - s[y == 0][None]) / 2 + 0.5 for s in scores]  # 1, 1/2 or 0 for each pair
    v10, v01 = np.stack([p.mean(1) for p in psi]), np.stack([p.mean(0) for p in psi])
    np.testing.assert_allclose(auc, [p.mean() for p in psi])
    np.testing.assert_allclose(covariance, np.cov(v10) / 15 + np.cov(v01) / 20, atol=1e-12)
    assert auc[0] == pytest.approx(auc_of(scores[0], y, np.ones((1, 35)))[0])


def test_a_case_given_three_times_is_still_one_patient() -> None:
    scores, y = ratings(4)
    plain = delong_covariance(scores, y)[1]
    patient = np.repeat(np.arange(35), 3)
    tripled = delong_covariance(np.repeat(scores, 3, axis=1), np.repeat(y, 3), patient)[1]
    np.testing.assert_allclose(tripled, plain)
    ignored = delong_covariance(np.repeat(scores, 3, axis=1), np.repeat(y, 3))[1]
    assert ignored[0, 0] < 0.4 * plain[0, 0]  # what it would have been to count slices


def test_delong_interval_over_seeds_lies_within_zero_and_one() -> None:
    scores, y = ratings(1)
    e = iv.delong(scores, y)
    assert e.low is not None
    assert e.high is not None
    assert e.value is not None
    assert 0 < e.low < e.value < e.high < 1
    assert e.value == pytest.approx(np.mean(delong_covariance(scores, y)[0]))
    same = iv.delong(np.stack([scores[0]] * 3), y)
    one = iv.delong(scores[0], y)
    assert [same.low, same.high] == pytest.approx([one.low, one.high])


def test_perfect_separation_still_has_a_lower_limit() -> None:
    e = iv.delong(np.arange(20.0), np.arange(20) >= 10)
    assert e.value == 1
    assert e.low is not None
    assert e.high == 1
    assert 0.6 < e.low < 0.95
    assert "Newcombe" in e.how
    wider = iv.delong(np.arange(8.0), np.arange(8) >= 4)
    assert wider.low is not None
    assert wider.low < e.low


def test_one_class_is_undefined_and_one_patient_a_class_has_no_interval() -> None:
    with pytest.raises(Undefined, match="one class"):
        iv.delong(np.arange(4.0), np.ones(4))
    e = iv.delong(np.array([0.1, 0.9]), np.array([0, 1]))
    assert e.value == 1
    assert e.low is None
    assert "fewer than two patients" in e.why


def test_random_effects_on_the_bcg_trials() -> None:
    """13 trials of BCG vaccine (Colditz et al. 1994); metafor's manual prints mean, τ² and I²."""
    treated = [4, 6, 3, 62, 33, 180, 8, 505, 29, 17, 186, 5, 27]
    of_treated = [123, 306, 231, 13598, 5069, 1541, 2545, 88391, 7499, 1716, 50634, 2498, 16913]
    control = [11, 29, 11, 248, 47, 372, 10, 499, 45, 65, 141, 3, 29]
    of_control = [139, 303, 220, 12867, 5808, 1451, 629, 88391, 7277, 1665, 27338, 2341, 17854]
    a, n1, c, n2 = (np.array(x, float) for x in (treated, of_treated, control, of_control))
    pooled = iv.pool_sites(np.log((a / n1) / (c / n2)), 1 / a - 1 / n1 + 1 / c - 1 / n2)
    assert pooled.estimate.value == pytest.approx(-0.7141, abs=5e-5)
    low, high = pooled.estimate.low, pooled.estimate.high  # Hartung and Knapp, by the weights of the published τ²
    v = 1 / a - 1 / n1 + 1 / c - 1 / n2
    w = 1 / (v + 0.3088)
    se = (w @ (np.log((a / n1) / (c / n2)) + 0.7141) ** 2 / 12 / w.sum()) ** 0.5
    half = stats.t.ppf(0.975, 12) * max(se, w.sum() ** -0.5)
    assert [low, high] == pytest.approx([-0.7141 - half, -0.7141 + half], abs=1e-3)
    assert pooled.prediction is not None
    assert pooled.prediction[0] < -1.9  # metafor's prediction interval is -1.87 to 0.44 with normal quantiles
    assert pooled.prediction[1] > 0.44
    assert pooled.tau2 == pytest.approx(0.3088, abs=5e-5)
    assert pooled.i2 == pytest.approx(0.9212, abs=5e-5)


def test_shrunken_sites_are_closer_to_the_truth_and_their_worst_is_not_too_low() -> None:
    rng, errors, lowest, covered = np.random.default_rng(0), [], [], []
    for _ in range(150):
        v = rng.uniform(0.05, 0.3, 8)
        truth = rng.normal(0, 0.3, 8)
        y = truth + rng.normal(0, v**0.5)
        found = iv.pool_sites(y, v).shrunken
        values = np.array([e.value for e in found])
        errors.append([((values - truth) ** 2).mean(), ((y - truth) ** 2).mean()])
        worst = found[int(values.argmin())]
        lowest.append([worst.value - truth[values.argmin()], y.min() - truth[y.argmin()]])
        covered.append(worst.low <= truth[values.argmin()] <= worst.high)
    ours, raw = np.mean(errors, axis=0)
    assert ours < 0.6 * raw
    bias, selected = np.mean(lowest, axis=0)
    assert abs(bias) < 0.12 < 0.2 < abs(selected)
    assert np.mean(covered) > 0.93


def test_a_difference_of_two_estimates_has_the_limits_of_both() -> None:
    a, b = iv.Estimate(0.8, 0.7, 0.85), iv.Estimate(0.6, 0.5, 0.75)
    low, high = iv.mean_of_limits([a, b], [1, -1])
    assert (low, high) == pytest.approx((0.2 - np.hypot(0.1, 0.15), 0.2 + np.hypot(0.05, 0.1)))


def test_random_effects_of_equal_sites_is_their_mean() -> None:
    pooled = iv.pool_sites([0.8, 0.8, 0.8], [0.01, 0.02, 0.04])
    assert pooled.estimate.value == pytest.approx(0.8)
    assert pooled.tau2 == 0
    with pytest.raises(Undefined):
        iv.pool_sites([0.8], [0.01])
    with pytest.raises(ValueError, match="positive"):
        iv.pool_sites([0.8, 0.9], [0.01, 0.0])


def test_proportion_is_scipys_exact_interval() -> None:
    for hits, n in ((0, 5), (3, 10), (20, 20)):
        theirs = stats.binomtest(hits, n).proportion_ci(method="exact")
        assert iv.proportion(hits / n, n) == pytest.approx((theirs.low, theirs.high))


def test_a_patient_tested_often_counts_once() -> None:
    assert iv.effective_number(np.full(7, 3.0)) == pytest.approx(7)
    assert iv.effective_number(np.array([1.0, 1.0, 4.0])) == pytest.approx(2)


def test_students_limits_on_three_scales() -> None:
    spread = Spread(0.01, 8.0)
    t = stats.t.ppf(0.975, 8) * 0.1
    assert iv.student(0.5, spread) == pytest.approx((0.5 - t, 0.5 + t))
    low, high = iv.student(0.9, spread, "logit")
    assert np.log(high / (1 - high)) - np.log(low / (1 - low)) == pytest.approx(2 * t / 0.09)
    assert 0 < low < 0.9 < high < 1
    low, high = iv.student(0.2, spread, "log")
    assert low * high == pytest.approx(0.04)
    assert np.log(high / 0.2) == pytest.approx(stats.t.ppf(0.975, 7) * 0.1 / 0.2)


def test_one_degree_of_freedom_is_deducted_on_the_log_scale_while_two_are_left() -> None:
    for df, used in ((1.0, 1.0), (2.0, 2.0), (2.5, 2.0), (3.0, 2.0), (4.0, 3.0)):
        _, high = iv.student(1.0, Spread(0.01, df), "log")
        assert np.log(high) == pytest.approx(stats.t.ppf(0.975, used) * 0.1)


def test_limits_of_a_mean_are_those_of_one_site_or_of_normal_sites() -> None:
    one = iv.Estimate(0.8, 0.7, 0.85)
    assert iv.mean_of_limits([one]) == pytest.approx((0.7, 0.85))
    assert iv.mean_of_limits([iv.Estimate(0.5, 0.4, 0.6)] * 4) == pytest.approx((0.45, 0.55))


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    x = np.random.default_rng(3).exponential(size=11)
    spread = Jackknife(x.mean(), (x.sum() - x) / 10, np.zeros(11, np.int64)).spread()
    assert spread.variance == pytest.approx(stats.sem(x) ** 2)
    assert spread.df == pytest.approx(10)
    with pytest.raises(Undefined, match="in a class"):
        Jackknife(0.0, np.zeros(3), np.array([0, 0, 1])).spread()
    with pytest.raises(Undefined, match="fewer than two patients"):
        Jackknife(0.0, np.zeros(1), np.zeros(1, np.int64)).spread()
    with pytest.raises(Undefined, match="undefined without"):
        Jackknife(0.0, np.array([0.0, np.nan]), np.zeros(2, np.int64)).spread()


def covered(trials: Any, seed: Any, interval: Any, truth: Any) -> Any:
    rng = np.random.default_rng(seed)
    hits = sum(low <= truth <= high for low, high in (interval(rng) for _ in range(trials)))
    return hits / trials


def test_coverage_of_delong() -> None:
    truth = float(stats.norm.cdf(1 / 2**0.5))

    def interval(rng: Any) -> Any:
        e = iv.delong(np.r_[rng.normal(1, 1, 40), rng.normal(0, 1, 40)], np.r_[np.ones(40), np.zeros(40)])
        return e.low, e.high

    assert 0.92 < covered(600, 2, interval, truth) < 0.98


def test_coverage_with_several_cases_a_patient() -> None:
    """Four correlated cases a patient: the clustered interval covers, one that ignores patients does not."""
    truth = float(stats.norm.cdf(1 / 2**0.5))

    def scores(rng: Any) -> Any:
        y, patient = np.repeat([1, 0], 80), np.repeat(np.arange(40), 4)
        return y + 0.9 * rng.normal(size=40)[patient] + (1 - 0.81) ** 0.5 * rng.normal(size=160), y, patient

    def clustered(rng: Any) -> Any:
        e = iv.delong(*scores(rng))
        return e.low, e.high

    def ignoring(rng: Any) -> Any:
        e = iv.delong(*scores(rng)[:2])
        return e.low, e.high

    assert 0.90 < covered(400, 3, clustered, truth) < 0.985
    assert covered(400, 3, ignoring, truth) < 0.85
