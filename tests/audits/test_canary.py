"""The bound on ε: known values, never above the truth, and above 0 where nothing is hidden."""

import math

import pytest
import torch
from scipy.stats import binom

from polyclinic.audits.canary import Guesses, Verdict, audit, guess, one_run
from polyclinic.core.site import Site
from polyclinic.core.stats import Mean
from polyclinic.tasks.dpsgd import Spend
from polyclinic.transforms.accounting import epsilon_rdp
from polyclinic.transforms.privacy import Gaussian


def dice(seed=0):
    return Site("auditor", seed=seed).rng("canaries")


@pytest.mark.parametrize(
    ("m", "r", "v", "delta", "wanted"),
    [
        (1000, 1000, 1000, 1e-5, 5.782),
        (100, 100, 95, 0.0, 2.172),
        (1000, 1000, 982, 0.0, 3.60),  # as many right as randomised response of ε = 4 has on average
    ],
)
def test_known_values(m, r, v, delta, wanted):
    assert Guesses(m, r, v).at_least(delta) == pytest.approx(wanted, abs=0.006)


def test_the_p_value_sum_by_sum():
    """The theorem's formula with Python's loops."""
    m, r, v, epsilon, delta = 30, 12, 10, 0.7, 1e-3
    q = 1 / (1 + math.exp(-epsilon))
    chance = [binom.pmf(k, r, q) for k in range(r + 1)]
    alpha = max(sum(chance[v - i : v]) / i for i in range(1, v + 1))
    wanted = sum(chance[v:]) + 2 * m * delta * alpha
    assert Guesses(m, r, v).p_value(epsilon, delta) == pytest.approx(wanted)


def test_more_right_guesses_show_more_and_chance_shows_nothing():
    bounds = [Guesses(200, 40, v).at_least(1e-5) for v in range(41)]
    assert bounds == sorted(bounds)
    assert bounds[20] == 0 < bounds[40]
    assert Guesses(200, 40, 38).at_least(0.0) >= Guesses(200, 40, 38).at_least(1e-3)
    assert Guesses(10, 0, 0).at_least(0.0) == 0


def gaussian(sigma):
    """What our own transform adds to a clipped sum, with the operating system's dice."""
    site = Site("a")

    def release(total):
        notes = {"clip": {"bound": torch.tensor(1.0, dtype=torch.float64)}}
        sent, _ = Gaussian(sigma).encode(Mean({"x": total}, 1.0), notes, {}, site, 0)
        return sent.total["x"].float()

    return release


def test_in_twenty_runs_the_bound_is_never_above_the_truth():
    true = epsilon_rdp([Spend(multiplier=1.0, rate=1.0, steps=1, unit="site")], 1e-5)
    found = [one_run(gaussian(1.0), 8000, 200, dice(k)).at_least(1e-5) for k in range(20)]
    assert max(found) <= true
    assert max(found) > 0
    assert one_run(lambda total: total, 8000, 200, dice()).at_least(1e-5) > 2


def test_a_release_that_forgot_its_noise_is_caught():
    """Claimed ε = 1, but hardly any noise."""
    verdict = audit(gaussian(0.05), 1.0, 1e-5, 8000, 200, dice())
    assert verdict.at_least > 1
    assert "less private than the claimed" in verdict.says
    honest = audit(gaussian(1.0), 5.3, 1e-5, 8000, 200, dice())
    assert "does not contradict" in honest.says
    assert "shows nothing" in Verdict(0.0, 0.5, 1.0).says


def test_guesses_are_about_the_surest():
    scores, inside = torch.arange(10.0), torch.arange(10) >= 5
    assert guess(scores, inside, 0.4) == Guesses(10, 4, 4)
    assert guess(-scores, inside, 0.4) == Guesses(10, 4, 0)


@pytest.mark.parametrize("wrong", [(10, 11, 3), (10, 5, 6), (10, 5, -1)])
def test_impossible_counts_are_refused(wrong):
    with pytest.raises(ValueError, match="cannot be"):
        Guesses(*wrong)
    with pytest.raises(ValueError, match="must be probabilities"):
        Guesses(10, 5, 3).at_least(1.5)
