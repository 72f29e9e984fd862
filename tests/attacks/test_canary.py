"""The bound on ε: known values, never above the truth, and above 0 if nothing is hidden."""

import math
from typing import Any

import pytest
import torch

from polyclinic.attacks.canary import SHARES, Guesses, Verdict, audit, guess, lower_bound, needed, one_run
from polyclinic.core.aggregates import WeightedMean
from polyclinic.core.site import Site
from polyclinic.learning.training.dp_sgd import Spend
from polyclinic.privacy.accounting import epsilon_rdp
from polyclinic.privacy.gaussian import Gaussian
from tests.support.known import known


def dice(seed: Any = 0) -> Any:
    return Site("auditor", seed=seed).rng("canaries")


@pytest.mark.parametrize(
    ("m", "r", "v", "delta", "wanted"),
    [
        (1000, 1000, 1000, 1e-5, 5.782),
        (100, 100, 95, 0.0, 2.172),
        (1000, 1000, 982, 0.0, 3.60),  # as many right as randomized response of ε = 4 has on average
        (1000, 100, 75, 1e-4, 0.673),  # appendix D of the paper
        (100_000, 1510, 1439, 1e-5, 2.675),  # section 7 of the paper
    ],
)
def test_known_values(m: int, r: int, v: int, delta: float, wanted: float) -> None:
    assert Guesses(m, r, v).at_least(delta) == pytest.approx(wanted, abs=0.006)


def test_the_p_value_sum_by_sum() -> None:
    """The theorem's formula with Python's loops."""
    for m, r, v, epsilon, delta in ((30, 12, 10, 0.7, 1e-3), (200, 60, 60, 2.0, 1e-5), (200, 60, 41, 0.1, 1e-3)):
        q = 1 / (1 + math.exp(-epsilon))
        chance = [math.comb(r, k) * q**k * (1 - q) ** (r - k) for k in range(r + 1)]
        alpha = max(sum(chance[v - i : v]) / i for i in range(1, v + 1))
        wanted = sum(chance[v:]) + 2 * m * delta * alpha
        assert Guesses(m, r, v).p_value(epsilon, delta) == pytest.approx(min(1.0, wanted))
    assert Guesses(10, 5, 0).p_value(0.0, 0.0) == 1.0
    assert Guesses(1000, 10, 10).p_value(5.0, 0.5) == 1.0  # a probability all the same


def test_more_right_guesses_show_more_and_chance_shows_nothing() -> None:
    bounds = [Guesses(200, 40, v).at_least(1e-5) for v in range(41)]
    assert bounds == sorted(bounds)
    assert bounds[20] == 0 < bounds[40]
    assert Guesses(200, 40, 38).at_least(0.0) >= Guesses(200, 40, 38).at_least(1e-3)
    assert Guesses(10, 0, 0).at_least(0.0) == 0


def gaussian(sigma: Any) -> Any:
    """What our own transform adds to a clipped sum, with the operating system's dice."""
    site = Site("a")

    def release(total: Any) -> Any:
        notes = {"clip": {"bound": torch.tensor(1.0, dtype=torch.float64)}}
        sent, _ = Gaussian(sigma).encode(WeightedMean({"x": total}, 1.0), notes, {}, site, 0)
        return sent.total["x"].float()

    return release


def test_in_twenty_runs_the_bound_is_never_above_the_truth() -> None:
    true = epsilon_rdp([Spend(multiplier=1.0, rate=1.0, steps=1, unit="site")], 1e-5)
    found = [one_run(gaussian(1.0), 8000, 200, dice(k)).at_least(1e-5) for k in range(20)]
    assert max(found) <= true
    assert max(found) > 0
    assert one_run(lambda total: total, 8000, 200, dice()).at_least(1e-5) > 2


def test_a_release_that_forgot_its_noise_is_caught() -> None:
    """Claimed ε = 1, but hardly any noise."""
    verdict = audit(gaussian(0.05), 1.0, 1e-5, 8000, 200, dice())
    assert verdict.at_least > 1
    assert "less private than the claimed" in verdict.says
    assert verdict.holds is False
    honest = audit(gaussian(1.0), 2.0, 1e-5, 8000, 200, dice())
    assert "does not contradict" in honest.says
    assert honest.holds is True


def test_verdicts_in_words() -> None:
    told = Verdict(0.5, 3.0, 2.0, 1e-5, 400, "patient", 10)
    assert told.says == (
        "ε for every patient is at least 0.50 (95 % confidence, 400 canaries, δ = 1e-05, after 10 rounds; at least 3.00 "
        "without noise). This does not contradict the claimed ε = 2.00, and proves no privacy."
    )
    wrong = Verdict(2.01, 3.0, 2.0, 1e-5, 400, "patient", 1)
    assert "after 1 round;" in wrong.says
    assert wrong.says.endswith("training is less private than the claimed ε = 2.00.")
    blind = Verdict(0.5, 3.0, 3.0, 1e-5, 400)
    assert blind.holds is None
    assert "after" not in blind.says
    assert blind.says.endswith("more than this audit shows even without noise, so it says nothing about the claim.")
    assert Verdict(0.5, 3.0, 3.0, 1e-5, 100).says.endswith("the claim; about 200 canaries would be enough.")
    assert "at δ = 0.001 no number of canaries would be enough" in Verdict(0.5, 2.0, 3.0, 1e-3, 400).says
    nothing = Verdict(0.0, 0.0, 1.0, 1e-5, 4)
    assert nothing.holds is None
    assert "so it shows nothing" in nothing.says
    assert Verdict(1.0, 3.0, 1.0, 1e-5, 4).holds is True  # a bound at the claim does not exceed it


def test_the_bound_is_the_best_of_fixed_shares_at_a_divided_error() -> None:
    rng = torch.Generator().manual_seed(0)
    inside = torch.rand(200, generator=rng) < 0.5
    scores = inside + 0.8 * torch.randn(200, generator=rng)
    each = [guess(scores, inside, share).at_least(1e-5, 1 - 0.05 / 3) for share in SHARES]
    assert lower_bound(scores, inside, 1e-5) == max(each) > 0
    assert lower_bound(scores, inside, 1e-5) < max(guess(scores, inside, share).at_least(1e-5) for share in SHARES)
    assert lower_bound(scores, inside, 1e-5, 0.5) > lower_bound(scores, inside, 1e-5)


def test_false_alarms_of_the_best_share_are_as_few_as_promised() -> None:
    """Randomized response at ε = 1, whose bound is as tight as any: above the truth in at most 5 % of audits."""
    rng, epsilon, above = torch.Generator().manual_seed(0), 1.0, 0
    q = math.exp(epsilon) / (1 + math.exp(epsilon))
    for _ in range(200):
        inside = torch.rand(300, generator=rng) < 0.5
        told = torch.where(torch.rand(300, generator=rng) < q, inside, ~inside)
        scores = told + 0.1 * torch.rand(300, generator=rng)
        above += any(guess(scores, inside, share).p_value(epsilon, 0.0) < 0.05 / 3 for share in SHARES)
    assert above / 200 <= 0.05 + 2 * (0.05 * 0.95 / 200) ** 0.5


def test_so_many_canaries_are_needed() -> None:
    for epsilon, delta in ((1.0, 1e-5), (2.0, 1e-5), (4.0, 1e-6)):
        count = known(needed(epsilon, delta))
        right = 2 * int(0.45 * count)
        assert Guesses(count, right, right).at_least(delta, 1 - 0.05 / 3) > 1.1 * epsilon
        if count > 50:
            right = 2 * int(0.45 * count / 2)
            assert Guesses(count // 2, right, right).at_least(delta, 1 - 0.05 / 3) <= 1.1 * epsilon
    assert needed(1.0, 1e-5) == 50
    assert needed(3.0, 1e-3) is None  # δ counts once for each canary


def test_guesses_are_about_the_surest() -> None:
    scores, inside = torch.arange(10.0), torch.arange(10) >= 5
    assert guess(scores, inside, 0.4) == Guesses(10, 4, 4)
    assert guess(-scores, inside, 0.4) == Guesses(10, 4, 0)


@pytest.mark.parametrize("wrong", [(10, 11, 3), (10, 5, 6), (10, 5, -1)])
def test_impossible_counts_are_refused(wrong: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="invalid counts"):
        Guesses(*wrong)
    with pytest.raises(ValueError, match="must be probabilities"):
        Guesses(10, 5, 3).at_least(1.5)
