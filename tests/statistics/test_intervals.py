"""Intervals: published numbers, a second implementation, laws, and coverage by simulation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from polyclinic.statistics import intervals as iv
from polyclinic.statistics.auc import auc_of, delong_covariance
from polyclinic.statistics.undefined import Undefined


def test_delong_on_hanley_and_mcneils_ct_ratings() -> None:
    """109 CT images rated 1 to 5 (Radiology 1982); Stata's manual (roctab) prints 0.8932 and DeLong's 0.0307."""
    normal, abnormal = [33, 6, 6, 11, 2], [3, 2, 2, 11, 33]
    score = np.repeat(np.tile(np.arange(1, 6), 2), normal + abnormal).astype(float)
    positive = np.repeat([0, 1], [58, 51])
    auc, covariance = delong_covariance(score[None], positive)
    assert auc[0] == pytest.approx(0.8932, abs=5e-5)
    assert covariance[0, 0] ** 0.5 == pytest.approx(0.0307, abs=5e-5)


def ratings(seed, m=15, n=20, scores=2):
    rng = np.random.default_rng(seed)
    y = np.r_[np.ones(m), np.zeros(n)]
    common = rng.normal(size=m + n)
    return np.stack([(y + common + rng.normal(size=m + n)).round(1) for _ in range(scores)]), y


@given(seed=st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_delong_equals_its_definition(seed) -> None:
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
    assert (same.low, same.high) == (
        pytest.approx(iv.delong(scores[0], y).low),
        pytest.approx(iv.delong(scores[0], y).high),
    )


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
    """13 trials of BCG vaccine (Colditz et al. 1994); metafor's manual prints the DerSimonian-Laird result."""
    treated = [4, 6, 3, 62, 33, 180, 8, 505, 29, 17, 186, 5, 27]
    of_treated = [123, 306, 231, 13598, 5069, 1541, 2545, 88391, 7499, 1716, 50634, 2498, 16913]
    control = [11, 29, 11, 248, 47, 372, 10, 499, 45, 65, 141, 3, 29]
    of_control = [139, 303, 220, 12867, 5808, 1451, 629, 88391, 7277, 1665, 27338, 2341, 17854]
    a, n1, c, n2 = (np.array(x, float) for x in (treated, of_treated, control, of_control))
    pooled = iv.pool_sites(np.log((a / n1) / (c / n2)), 1 / a - 1 / n1 + 1 / c - 1 / n2)
    assert pooled.estimate.value == pytest.approx(-0.7141, abs=5e-5)
    assert pooled.estimate.low == pytest.approx(-1.0644, abs=2e-4)
    assert pooled.estimate.high == pytest.approx(-0.3638, abs=2e-4)
    assert pooled.tau2 == pytest.approx(0.3088, abs=5e-5)
    assert pooled.i2 == pytest.approx(0.9212, abs=5e-5)


def test_random_effects_of_equal_sites_is_their_mean() -> None:
    pooled = iv.pool_sites([0.8, 0.8, 0.8], [0.01, 0.02, 0.04])
    assert pooled.estimate.value == pytest.approx(0.8)
    assert pooled.tau2 == 0
    with pytest.raises(Undefined):
        iv.pool_sites([0.8], [0.01])
    with pytest.raises(ValueError, match="positive"):
        iv.pool_sites([0.8, 0.9], [0.01, 0.0])


def mean_of(x):
    return lambda w: (w @ x) / np.maximum(w.sum(1), 1)


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_bootstrap_equals_scipys(method: str) -> None:
    x = np.random.default_rng(3).exponential(size=50)
    ours = iv.bootstrap(mean_of(x), 50, count=20_000, method=method)
    name = {"bca": "BCa", "percentile": "percentile"}[method]
    theirs = stats.bootstrap(
        (x,), np.mean, n_resamples=20_000, method=name, rng=np.random.default_rng(1)
    ).confidence_interval
    assert ours.low == pytest.approx(theirs.low, abs=0.01)
    assert ours.high == pytest.approx(theirs.high, abs=0.01)


def test_bootstrap_is_reproducible_and_says_how() -> None:
    x = np.random.default_rng(0).normal(size=20)
    assert iv.bootstrap(mean_of(x), 20) == iv.bootstrap(mean_of(x), 20)
    assert "BCa bootstrap over patients, 2000 draws, seed 0" in iv.bootstrap(mean_of(x), 20).how


def test_bootstrap_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="unknown bootstrap interval 'bc'"):
        iv.bootstrap(mean_of(np.ones(3)), 3, method="bc")
    e = iv.bootstrap(lambda w: np.full(len(w), np.nan), 5)
    assert e.value is None
    assert "5 patients" in e.why
    one = iv.bootstrap(mean_of(np.ones(1)), 1)
    assert one.value == 1
    assert one.low is None


def test_undefined_draws_are_left_out_unless_they_are_most() -> None:
    draws = np.r_[np.full(40, np.nan), np.linspace(0, 1, 60)]
    assert iv.percentile(draws) == (pytest.approx(0.025), pytest.approx(0.975))
    assert iv.percentile(np.r_[draws, np.full(40, np.nan)]) is None


def covered(trials, seed, interval, truth):
    rng = np.random.default_rng(seed)
    hits = sum(low <= truth <= high for low, high in (interval(rng) for _ in range(trials)))
    return hits / trials


def test_coverage_of_the_bootstrap() -> None:
    """Nominal 95 % at n = 40 is slightly less for the bootstrap of a mean; within three errors of 93 to 96 %."""

    def interval(rng):
        x = rng.normal(size=40)
        e = iv.bootstrap(mean_of(x), 40, count=400, seed=int(rng.integers(1 << 30)))
        return e.low, e.high

    assert 0.90 < covered(400, 1, interval, 0.0) < 0.98


def test_coverage_of_delong() -> None:
    truth = float(stats.norm.cdf(1 / 2**0.5))

    def interval(rng):
        e = iv.delong(np.r_[rng.normal(1, 1, 40), rng.normal(0, 1, 40)], np.r_[np.ones(40), np.zeros(40)])
        return e.low, e.high

    assert 0.92 < covered(600, 2, interval, truth) < 0.98


def test_coverage_with_several_cases_a_patient() -> None:
    """Four correlated cases a patient: the clustered interval covers, one that ignores patients does not."""
    truth = float(stats.norm.cdf(1 / 2**0.5))

    def scores(rng):
        y, patient = np.repeat([1, 0], 80), np.repeat(np.arange(40), 4)
        return y + 0.9 * rng.normal(size=40)[patient] + (1 - 0.81) ** 0.5 * rng.normal(size=160), y, patient

    def clustered(rng):
        e = iv.delong(*scores(rng))
        return e.low, e.high

    def ignoring(rng):
        e = iv.delong(*scores(rng)[:2])
        return e.low, e.high

    assert 0.90 < covered(400, 3, clustered, truth) < 0.985
    assert covered(400, 3, ignoring, truth) < 0.85
