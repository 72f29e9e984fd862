"""Comparison: published examples, second implementations, and the will to say no."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from polyclinic.statistics import paired_tests as cmp
from polyclinic.statistics.jackknife import Jackknife, Spread, added
from polyclinic.statistics.undefined import Undefined
from tests.support.known import known


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
    for equal in ([0.1, 0.1], [0.3] * 3):
        same = cmp.corrected_t(equal, 1, 1)
        assert same.p is None
        assert same.low is None
        assert same.verdict() == f"not tested: no variance among {len(equal)} splits"
    with pytest.raises(Undefined):
        cmp.corrected_t([0.1], 1, 1)
    with pytest.raises(ValueError, match="positive"):
        cmp.corrected_t([0.1, 0.2], 0, 1)


def test_signed_ranks() -> None:
    d = [0.1, 0.2, 0.15, 0.3, 0.05, 0.12, 0.4]
    assert cmp.signed_ranks(d).p == pytest.approx(2 / 2**7)
    with pytest.raises(Undefined, match="six"):
        cmp.signed_ranks([0.1] * 5 + [0.0])


@pytest.mark.parametrize("pairs", [6, 10, 13, 14, 50, 51])
@pytest.mark.parametrize("kind", ["no ties", "ties", "zeros", "ties and zeros"])
def test_signed_ranks_are_those_of_scipy(pairs: int, kind: str) -> None:
    for seed in range(1 if pairs == 13 else 3):  # SciPy takes a second for 13 pairs with ties
        d = np.random.default_rng([pairs, seed]).normal(0.3, 1.0, pairs)
        d = np.round(d, 1) if kind.startswith("ties") else d
        d[d == 0] = 0.1
        if kind.endswith("zeros") and pairs > 6:
            d[0] = 0.0
        assert cmp.signed_ranks(d.tolist()).p == pytest.approx(float(stats.wilcoxon(d).pvalue), rel=1e-9)


def test_a_verdict_needs_the_interval_and_the_corrected_p() -> None:
    assert cmp.Difference(0.1, 0.01, 0.2, 0.02).verdict() == cmp.BETTER
    assert cmp.Difference(-0.1, -0.2, -0.01, 0.02).verdict() == cmp.WORSE
    assert cmp.Difference(0.1, 0.01, 0.2, 0.02, adjusted=0.08).verdict() == cmp.UNDECIDED
    assert cmp.Difference(0.1, -0.01, 0.2, 0.04).verdict() == cmp.UNDECIDED
    assert cmp.Difference(0.1).verdict() == cmp.NOT_TESTED
    assert cmp.Difference(None, why="x").verdict() == "not tested: x"


def jackknife_of(d: np.ndarray) -> Jackknife:
    """The jackknife of a mean of patients' differences."""
    n = len(d)
    return Jackknife(float(d.mean()), (d.sum() - d) / (n - 1), np.zeros(n, np.int64))


def compared(d: np.ndarray) -> cmp.Difference:
    one = jackknife_of(d)
    return cmp.paired(np.array([one.value]), one.spread(), one.changing, len(d))


def test_one_seed_is_scipys_paired_t_test() -> None:
    d = np.random.default_rng(0).normal(0.3, 1, 12)
    found, theirs = compared(d), stats.ttest_1samp(d, 0)
    assert found.p == pytest.approx(theirs.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(theirs.confidence_interval()))


def test_several_sites_are_welchs_test() -> None:
    """A difference of two sites' means has Welch's degrees of freedom."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(1, 1, 9), rng.normal(0, 3, 14)
    spread = added([jackknife_of(a).spread(), jackknife_of(b).spread()], [1.0, -1.0])
    found = cmp.paired(np.array([a.mean() - b.mean()]), spread, 23, 23)
    assert found.p == pytest.approx(stats.ttest_ind(a, b, equal_var=False).pvalue)


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_a_handful_of_patients_is_not_tested(n: int) -> None:
    found = compared(0.1 + 0.001 * np.arange(n))
    assert found.p is None
    assert found.low is None
    assert found.verdict() == f"not tested: {n} patients, fewer than 6"


def test_patients_with_equal_results_do_not_count() -> None:
    found = compared(np.r_[np.zeros(20), np.ones(5)])
    assert found.verdict() == "not tested: 5 of 25 patients differ, fewer than 6"
    assert compared(np.r_[np.zeros(20), np.ones(6)]).p is not None


def test_no_variance_gives_no_p_and_no_interval_of_zero_width() -> None:
    found = compared(np.full(8, 0.1))
    assert (found.p, found.low) == (None, None)
    assert found.verdict() == "not tested: no variance among 8 patients"
    equal = compared(np.zeros(8))
    assert (equal.p, equal.low) == (1.0, None)
    assert equal.verdict() == cmp.UNDECIDED


def test_an_undefined_difference_is_not_tested() -> None:
    found = cmp.paired(np.array([0.1, np.nan]), Spread(1.0, 5.0), 20, 20)
    assert found.verdict() == "not tested: undefined for one of the two"


@pytest.mark.parametrize(("count", "luck"), [(2, 0.01), (3, 0.02), (5, 0.05), (10, 0.05)])
def test_differences_over_seeds_keep_their_level(count: int, luck: float) -> None:
    rng = np.random.default_rng(count)
    p = []
    for _ in range(1500):
        values = 0.02 * rng.normal() + luck * rng.normal(size=count)
        p.append(cmp.paired(values, Spread(0.02**2, 199.0), 200, 200).p)
    assert np.mean(np.array(p) < 0.05) < 0.05 + 3 * (0.05 * 0.95 / 1500) ** 0.5 + 0.02


def test_patients_alone_would_not_keep_it() -> None:
    rng = np.random.default_rng(0)
    values = 0.05 * rng.normal(size=(500, 3)).mean(1) + 0.02 * rng.normal(size=500)
    p = [cmp.paired(np.array([v]), Spread(0.02**2, 199.0), 200, 200).p for v in values]
    assert np.mean(np.array(p) < 0.05) > 0.2


def with_margin(d: np.ndarray, question: cmp.Question, margin: float) -> cmp.Difference:
    one = jackknife_of(d)
    return cmp.paired(np.array([one.value]), one.spread(), one.changing, len(d), question=question, margin=margin)


def test_non_inferiority_is_scipys_one_sided_t_test() -> None:
    d = np.random.default_rng(0).normal(-0.01, 0.05, 40)
    found = with_margin(d, "non-inferiority", 0.03)
    assert found.p == pytest.approx(stats.ttest_1samp(d, -0.03, alternative="greater").pvalue)
    assert found.verdict() == "non-inferior"
    assert (found.low, found.high) == pytest.approx(tuple(stats.ttest_1samp(d, 0).confidence_interval(0.95)))
    assert with_margin(d, "non-inferiority", 0.005).verdict() == "non-inferiority not shown"
    assert with_margin(d - 0.1, "non-inferiority", 0.03).verdict() == "worse by more than the margin"
    assert with_margin(d + 0.1, "non-inferiority", 0.03).verdict() == "non-inferior"


def test_equivalence_is_two_one_sided_tests() -> None:
    """statsmodels 0.15: ttost_paired(d, 0, -0.03, 0.03) has p = 0.005178487756467463 for these differences."""
    d = np.random.default_rng(0).normal(-0.01, 0.05, 40)
    found = with_margin(d, "equivalence", 0.03)
    sides = [stats.ttest_1samp(d, m, alternative=a).pvalue for m, a in ((-0.03, "greater"), (0.03, "less"))]
    assert found.p == pytest.approx(max(sides))
    assert found.p == pytest.approx(0.005178487756467463)
    assert found.verdict() == "equivalent"
    assert with_margin(d + 0.1, "equivalence", 0.03).verdict() == "different by more than the margin"
    assert with_margin(d, "equivalence", 0.012).verdict() == "equivalence not shown"


def test_a_margin_verdict_and_the_interval_agree() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        d = rng.normal(rng.normal(0, 0.03), 0.05, 12)
        one, both = with_margin(d, "non-inferiority", 0.03), with_margin(d, "equivalence", 0.03)
        assert (one.verdict() == "non-inferior") == (known(one.low) > -0.03)
        assert (both.verdict() == "equivalent") == (known(both.low) > -0.03 and known(both.high) < 0.03)


def test_a_corrected_p_can_take_a_verdict_away() -> None:
    found = with_margin(np.random.default_rng(0).normal(-0.01, 0.05, 40), "non-inferiority", 0.03)
    assert replace(found, adjusted=0.026).verdict() == "non-inferiority not shown"


def test_equal_results_and_few_patients_are_no_evidence_of_equivalence() -> None:
    assert with_margin(np.zeros(30), "equivalence", 0.1).verdict().startswith("not tested: equal results")
    few = np.zeros(200)
    few[:3] = 1.0
    assert with_margin(few, "equivalence", 0.1).verdict() == "not tested: 3 of 200 patients differ, fewer than 6"
    assert (
        with_margin(np.array([0.01, 0.02, -0.01, 0.0]), "equivalence", 0.5).verdict().startswith("not tested: 3 of 4")
    )
