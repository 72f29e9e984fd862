"""Figures of a membership attack: exact tests, intervals that cover, and words where patients are too few."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, mannwhitneyu, norm

from polyclinic.attacks.membership import Verdict
from polyclinic.attacks.separation import detectable, found, tail
from polyclinic.statistics.auc import newcombe
from polyclinic.statistics.intervals import delong
from tests.support.known import known


def normal(n: Any, rng: Any, shift: Any = 0.0) -> Any:
    return torch.randn(n, generator=rng, dtype=torch.float64) + shift


def dice(seed: Any = 0) -> Any:
    return torch.Generator().manual_seed(seed)


CONTROL = found(torch.arange(16.0) + 20, torch.arange(16.0))


def test_a_model_that_tells_nothing_is_called_leaky_in_at_most_five_per_cent() -> None:
    """Five sites of 20 + 20 patients: the old verdict, AUC > 0.6 at the worst site, was positive in 55 %."""
    rng, trials = dice(), 250
    leaky = [
        Verdict(CONTROL, {f"s{i}": {"loss": found(normal(20, rng), normal(20, rng))} for i in range(5)}).leaky
        for _ in range(trials)
    ]
    assert sum(leaky) / trials <= 0.05 + 3 * (0.05 * 0.95 / trials) ** 0.5


@pytest.mark.parametrize("sites", [1, 5])
def test_a_few_members_exposed_with_certainty_are_found(sites: int) -> None:
    """5 % of 200: the AUC is that of chance, and the old verdict said 'little can be told'."""
    rng = dice(1)
    for _ in range(20):
        members = normal(200, rng)
        members[:10] += 20
        one = {"a": {"loss": found(members, normal(200, rng))}}
        rest = {f"s{i}": {"loss": found(normal(200, rng), normal(200, rng))} for i in range(sites - 1)}
        verdict = Verdict(CONTROL, one | rest)
        assert verdict.leaky
        assert "of 200 score above every patient not trained on" in verdict.says


def test_the_tail_by_counting_all_orders() -> None:
    """Of all orders of 3 members and 4 others, in how many are that many members above all but k others?"""
    orders = list(itertools.combinations(range(7), 3))  # the ranks of the members, 0 is the highest
    for allowed, exposed in itertools.product(range(3), range(4)):
        above = [sum(r < sorted(set(range(7)) - set(members))[allowed] for r in members) for members in orders]
        wanted = sum(count >= exposed for count in above) / len(orders)
        assert tail(exposed, allowed, 3, 4) == pytest.approx(wanted)


def test_ties_count_for_nobody() -> None:
    """Members who share the highest non-member's score are not above it."""
    one = found(torch.tensor([1.0, 1.0, 2.0]), torch.tensor([1.0, 0.0]))
    assert one.exposed == 1
    assert one.auc == pytest.approx((0.75 + 0.75 + 1) / 3)
    assert found(torch.ones(5), torch.ones(5)).p_auc == 1.0


def test_the_auc_and_its_interval_are_those_of_the_evaluation() -> None:
    rng = dice(2)
    for shift in (0.0, 1.0):
        members, others = normal(40, rng, shift), normal(25, rng)
        truth = np.r_[np.ones(40), np.zeros(25)]
        wanted = delong(torch.cat([members, others]).numpy(), truth)
        one = found(members, others)
        assert (one.auc, one.low, one.high) == pytest.approx((wanted.value, wanted.low, wanted.high))
    perfect = found(normal(12, rng, 50.0), normal(9, rng))
    assert (perfect.auc, perfect.low, perfect.high) == pytest.approx((1.0, *newcombe(1.0, 12, 9)))


def test_the_test_of_the_auc_is_one_sided_and_exact_for_a_few() -> None:
    """3 members above 3 others: one order in 20."""
    up, down = torch.tensor([4.0, 5.0, 6.0]), torch.tensor([1.0, 2.0, 3.0])
    assert found(up, down).p_auc == pytest.approx(1 / 20)
    assert found(down, up).p_auc == 1.0
    rng = dice(5)
    for n, m in ((30, 20), (9, 300), (8, 9), (4, 4)):
        for round_ in (False, True):  # with ties
            x, y = normal(n, rng, 0.3), normal(m, rng)
            x, y = (x.round(), y.round()) if round_ else (x, y)
            wanted = mannwhitneyu(x.numpy(), y.numpy(), alternative="greater").pvalue
            assert found(x, y).p_auc == pytest.approx(wanted)


def test_rates_by_hand() -> None:
    """Of 1000 non-members with scores 0 ... 999, 10 may be taken for members at 1 %, and 1 at 0.1 %."""
    others, members = (
        torch.arange(1000.0),
        torch.tensor([989.5] * 6 + [995.5] * 3 + [998.5] * 2 + [2000.0] * 9 + [0.0] * 30),
    )
    one = found(members, others)
    assert one.rate(0.01).value == 20 / 50
    assert (one.rate(0.001).value, one.exposed, one.allowed) == (11 / 50, 11, 1)
    # P[Binomial(1000, 0.01) ≤ 3] = 0.0101 ≤ 0.0125 < P[≤ 4]; P[≥ 19] = 0.0069 ≤ 0.0125 < P[≥ 18]
    low = binomtest(11, 50).proportion_ci(0.975).low
    high = binomtest(20, 50).proportion_ci(0.975).high
    assert (one.rate(0.01).low, one.rate(0.01).high) == pytest.approx((low, high))
    assert one.rate(0.001).low == 0.0  # 1000 non-members cannot fix a threshold for 0.1 %
    tied = found(torch.cat([members, torch.tensor([996.0] * 3 + [981.0] * 2)]), others)  # at the two thresholds
    low, high = binomtest(11, 55).proportion_ci(0.975).low, binomtest(25, 55).proportion_ci(0.975).high
    assert (tied.rate(0.01).low, tied.rate(0.01).high) == pytest.approx((low, high))


def test_rates_are_covered() -> None:
    """The interval holds the true rate at the true false-positive rate in at least 95 %, thresholds estimated."""
    rng, trials, shift, hit, low = dice(3), 150, 2.0, 0, []
    true = norm.sf(norm.isf(0.01) - shift)
    for _ in range(trials):
        rate = found(normal(100, rng, shift), normal(1000, rng)).rate(0.01)
        hit += rate.low <= true <= rate.high
        low.append(rate.low)
    assert hit / trials >= 0.95 - 2 * (0.05 * 0.95 / trials) ** 0.5
    assert np.mean(low) > 0.1  # and it says something: the truth is 0.37


def test_too_few_others_for_a_rate_give_words_and_no_figure() -> None:
    one = found(torch.arange(99.0), torch.arange(99.0))
    assert [rate.value for rate in one.rates] == [None, None]
    assert "TPR at 0.1 % FPR needs 1,000 others; TPR at 1 % FPR needs 100 others" in one.says
    assert found(torch.arange(99.0), torch.arange(100.0)).rate(0.01).value is not None
    assert found(torch.arange(99.0), torch.arange(999.0)).rate(0.001).value is None
    assert found(torch.arange(99.0), torch.arange(1000.0)).rate(0.001).value is not None


def test_what_cannot_be_judged_is_refused() -> None:
    with pytest.raises(ValueError, match="other patients"):
        found(torch.ones(3), torch.ones(0))
    with pytest.raises(ValueError, match="other patients"):
        found(torch.ones(0), torch.ones(3))
    with pytest.raises(ValueError, match="NaN"):
        found(torch.tensor([1.0, float("nan")]), torch.ones(3))


def test_what_would_be_found_is_found() -> None:
    """At the AUC that is named, four of five comparisons are significant; so many exposed always are, one fewer not."""
    rng, alpha, n, m = dice(4), 0.01, 40, 60
    can = detectable(n, m, alpha)
    exposed = known(can.exposed)
    assert tail(exposed, 0, n, m) <= alpha < tail(exposed - 1, 0, n, m)
    shift = norm.ppf(can.auc) * 2**0.5
    power = np.mean([found(normal(n, rng, shift), normal(m, rng)).p_auc <= alpha for _ in range(300)])
    assert power == pytest.approx(0.8, abs=0.08)
    nothing = detectable(3, 3, 0.01)
    assert (nothing.auc, nothing.exposed) == (None, None)
    assert detectable(3, 3, 0.051).exposed == 3  # 1 in 20 orders
    more, fewer = (known(detectable(1000, others, alpha).exposed) for others in (1000, 999))
    assert more > fewer  # one other may be above
