"""Comparison: published examples, second implementations, and the will to say no."""

import numpy as np
import pytest
from scipy import stats

from polyclinic.statistics import paired_tests as cmp
from polyclinic.statistics.undefined import Undefined


def test_the_critical_difference_is_demsars() -> None:
    """k = 4 methods on N = 14 data sets: q = 2.569 and CD = 1.25 in Demšar, JMLR 2006, section 3.2.2."""
    values = np.random.default_rng(7).normal(size=(14, 4))
    ranking = cmp.rank_methods("abcd", values)
    assert ranking.critical == pytest.approx(2.569 * (4 * 5 / (6 * 14)) ** 0.5, rel=1e-3)
    assert ranking.critical == pytest.approx(1.25, abs=0.005)
    ranks = (values[:, :, None] <= values[:, None, :]).sum(2).mean(0)  # 1 + how many are larger
    assert dict(zip(ranking.methods, ranking.ranks, strict=True)) == pytest.approx(
        dict(zip("abcd", ranks, strict=True))
    )
    assert ranking.p == pytest.approx(stats.friedmanchisquare(*values.T).pvalue)
    assert list(ranking.ranks) == sorted(ranking.ranks)


def test_lower_is_better_turns_the_ranks_round() -> None:
    up = cmp.rank_methods("abc", np.random.default_rng(0).normal(size=(6, 3)))
    down = cmp.rank_methods("abc", -np.random.default_rng(0).normal(size=(6, 3)), higher_is_better=False)
    assert up.ranks == down.ranks
    assert up.methods == down.methods


def test_ranking_needs_three_of_each() -> None:
    with pytest.raises(Undefined):
        cmp.rank_methods("ab", np.zeros((9, 2)))
    with pytest.raises(Undefined):
        cmp.rank_methods("abc", np.zeros((2, 3)))
    assert cmp.rank_methods("abc", np.zeros((4, 3))).p == 1


def test_cliques_overlap_where_the_ends_differ() -> None:
    values = np.tile([3.0, 2.0, 1.0], (12, 1))
    values[:6] = [3, 1, 2]
    ranking = cmp.rank_methods("abc", values)
    assert ranking.cliques == (("b", "c"),)


def test_corrected_t_by_hand_and_its_limits() -> None:
    d = [0.02, 0.05, 0.01, 0.03]
    found = cmp.corrected_t(d, test=20, train=80)
    se = ((1 / 4 + 20 / 80) * np.var(d, ddof=1)) ** 0.5
    assert found.p == pytest.approx(2 * stats.t.sf(np.mean(d) / se, 3))
    plain = stats.ttest_1samp(d, 0).pvalue
    assert found.p > plain
    assert cmp.corrected_t(d, test=1, train=10**9).p == pytest.approx(plain, rel=1e-6)
    assert cmp.corrected_t([0.1, 0.1], 1, 1).p == 0
    with pytest.raises(Undefined):
        cmp.corrected_t([0.1], 1, 1)
    with pytest.raises(ValueError, match="positive"):
        cmp.corrected_t([0.1, 0.2], 0, 1)


def test_signed_ranks() -> None:
    d = [0.1, 0.2, 0.15, 0.3, 0.05, 0.12, 0.4]
    assert cmp.signed_ranks(d).p == pytest.approx(2 / 2**7)
    with pytest.raises(Undefined, match="six"):
        cmp.signed_ranks([0.1] * 5 + [0.0])


def test_a_verdict_needs_the_interval_and_the_corrected_p() -> None:
    assert cmp.Difference(0.1, 0.01, 0.2, 0.02).verdict() == cmp.BETTER
    assert cmp.Difference(-0.1, -0.2, -0.01, 0.02).verdict() == cmp.WORSE
    assert cmp.Difference(0.1, 0.01, 0.2, 0.02, adjusted=0.08).verdict() == cmp.UNDECIDED
    assert cmp.Difference(0.1, -0.01, 0.2, 0.04).verdict() == cmp.UNDECIDED
    assert cmp.Difference(0.1).verdict() == cmp.UNDECIDED
    assert cmp.Difference(None, why="x").verdict() == cmp.UNDECIDED


def seeded(count, luck, rng, patients=0.02, draws=200):
    """Differences of ``count`` seeds that share their patients, with bootstrap draws of their mean."""
    values = patients * rng.normal() + luck * rng.normal(size=count)
    return values, values.mean() + patients * rng.normal(size=draws)


@pytest.mark.parametrize(("count", "luck"), [(2, 0.01), (3, 0.02), (5, 0.05), (10, 0.05)])
def test_differences_over_seeds_keep_their_level(count: int, luck: float) -> None:
    rng = np.random.default_rng(count)
    p = [cmp.over_seeds(*seeded(count, luck, rng), n=200).p for _ in range(1500)]
    assert np.mean(np.array(p) < 0.05) < 0.05 + 3 * (0.05 * 0.95 / 1500) ** 0.5 + 0.02


def test_patients_alone_would_not_keep_it() -> None:
    rng = np.random.default_rng(0)
    p = [cmp.two_sided(seeded(3, 0.05, rng)[1]) for _ in range(500)]
    assert np.mean(np.array(p) < 0.05) > 0.2


def test_seeds_that_agree_leave_the_patients_interval() -> None:
    draws = 0.1 + 0.02 * np.random.default_rng(1).normal(size=5000)
    d, plain = cmp.over_seeds(np.full(4, 0.1), draws, n=10_000), cmp.difference(0.1, draws)
    assert (d.low, d.high) == (pytest.approx(plain.low, abs=0.002), pytest.approx(plain.high, abs=0.002))
    assert cmp.over_seeds(np.zeros(3), np.zeros(100)).verdict() == cmp.UNDECIDED
    assert cmp.over_seeds(np.array([0.1, np.nan]), draws).value is None
    assert cmp.over_seeds(np.array([0.1, 0.1]), np.full(100, np.nan)).low is None


def test_two_sided_p_is_never_zero_and_one_in_the_middle() -> None:
    assert cmp.two_sided(np.ones(99)) == pytest.approx(0.02)
    assert cmp.two_sided(np.linspace(-1, 1, 100)) == pytest.approx(1.0, abs=0.02)
    assert cmp.two_sided(np.zeros(50)) == 1.0
