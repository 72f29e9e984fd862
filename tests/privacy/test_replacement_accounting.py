"""The privacy loss of a replaced unit, against its definition: one step in both directions, and several composed."""

import math
from typing import Any

import numpy as np
import pytest

pytest.importorskip("dp_accounting", reason="needs polyclinic[privacy]")

from scipy import stats

from polyclinic.learning.training.dp_sgd import Spend
from polyclinic.privacy.accounting import epsilon
from polyclinic.privacy.replacement_accounting import LARGEST, loss_distribution, profile

CASES = [(0.5, 0.3), (1.0, 0.02), (2.0, 0.9), (0.25, 0.6)]


def bound(eps: float, multiplier: float, rate: float) -> float:
    """q · H(N(0, σ²), N(1, σ²)) at log(1 + (exp(ε) - 1) / q), which bounds the divergence at ``eps`` >= 0 in both directions."""
    inner = math.log(1 + math.expm1(eps) / rate)
    at = inner * multiplier
    far = 1 / (2 * multiplier)
    return rate * float(stats.norm.cdf(far - at) - math.exp(inner) * stats.norm.cdf(-far - at))


def both_ways(eps: float, multiplier: float, rate: float) -> float:
    """The bound at any ε: below 0 it is that of the two outputs exchanged."""
    if eps >= 0:
        return bound(eps, multiplier, rate)
    return 1 - math.exp(eps) + math.exp(eps) * bound(-eps, multiplier, rate)


@pytest.mark.parametrize(("multiplier", "rate"), CASES)
def test_the_profile_is_that_of_the_definition(multiplier: float, rate: float) -> None:
    eps = np.array([0.0, 0.01, 0.5, 1.3, 3.0])
    found = profile(eps, multiplier, rate)
    assert found.shape == eps.shape
    assert found == pytest.approx([bound(float(e), multiplier, rate) for e in eps], rel=1e-9, abs=1e-15)


def test_a_profile_is_a_probability_where_numbers_would_overflow() -> None:
    found = profile(np.array([0.0, 50.0, 1000.0]), 0.02, 0.5)
    assert found[0] == pytest.approx(0.5), "next to no noise: as likely as to be sampled"
    assert np.isfinite(found).all()
    assert (found >= 0).all()
    assert found[-1] == pytest.approx(0.5 * stats.norm.cdf(25 - (1000 - math.log(0.5)) * 0.02))
    assert profile(np.array([40.0]), 1.0, 0.5)[0] == 0.0


def deltas(found: Any, eps: np.ndarray) -> np.ndarray:
    return np.array([found.get_delta_for_epsilon(float(e)) for e in eps])


@pytest.mark.parametrize(("multiplier", "rate"), CASES)
def test_one_step_loses_what_the_bound_says_in_both_directions(multiplier: float, rate: float) -> None:
    """On the grid it is the bound; between its points it is above, and by next to nothing."""
    interval = 1 / 64
    found = loss_distribution(multiplier, rate, 1, interval)
    assert found is not None
    grid = np.arange(-96, 97, 4) * interval
    exact = [both_ways(float(e), multiplier, rate) for e in grid]
    assert deltas(found, grid) == pytest.approx(exact, rel=1e-6, abs=1e-9)
    between = grid + interval / 3
    exact = [both_ways(float(e), multiplier, rate) for e in between]
    assert (deltas(found, between) >= np.array(exact) - 1e-12).all(), "never too small"
    assert deltas(found, between) == pytest.approx(exact, abs=5e-4)


@pytest.mark.parametrize(("multiplier", "rate"), CASES)
def test_steps_add_up_as_independent_losses_do(multiplier: float, rate: float) -> None:
    one, three = (loss_distribution(multiplier, rate, steps, 1 / 32) for steps in (1, 3))
    assert one is not None
    assert three is not None
    eps = np.array([-1.0, 0.0, 0.5, 2.0])
    assert deltas(three, eps) == pytest.approx(deltas(one.compose(one).compose(one), eps), abs=1e-9)
    assert (deltas(three, eps) > deltas(one, eps)).all()


@pytest.mark.parametrize(("multiplier", "rate"), CASES)
def test_no_loss_is_dropped_at_the_end_of_the_grid(multiplier: float, rate: float) -> None:
    """δ far out, where it is tiny, is still that of the bound, or above it."""
    found = loss_distribution(multiplier, rate, 1, 1 / 16)
    assert found is not None
    mu = 1 / multiplier
    for eps in np.floor(np.array([mu * mu / 2 + away * mu for away in (3.0, 4.5, 5.5)]) * 16) / 16:
        exact = bound(float(eps), multiplier, rate)
        assert exact * (1 - 1e-3) <= found.get_delta_for_epsilon(float(eps)) <= exact * (1 + 1e-3) + 5e-15


@pytest.mark.parametrize("interval", [0.01, 0.2, 0.5])
def test_a_grid_wider_than_all_losses_is_still_never_below(interval: float) -> None:
    multiplier, rate = 400.0, 0.25
    found = loss_distribution(multiplier, rate, 1, interval)
    assert found is not None
    for eps in (0.0, 0.001, 0.003):
        assert (
            bound(eps, multiplier, rate) - 1e-12
            <= found.get_delta_for_epsilon(eps)
            <= bound(0.0, multiplier, rate) + 1e-9
        )


def test_a_step_that_may_lose_too_much_has_no_distribution_and_no_finite_epsilon() -> None:
    """The limit is on the loss of one step: about μ²/2 + 9 μ for noise of 1/μ, less log(1 / q) for a sample."""
    reach = math.sqrt(81 + 2 * LARGEST) - 9  # μ at the limit, if everyone were in the sample
    assert loss_distribution(1 / (0.999 * reach), 0.999, 1, 0.5) is not None
    assert loss_distribution(1 / (1.001 * reach), 0.999, 1, 0.5) is None
    rare = math.sqrt(81 + 2 * (LARGEST + math.log(100))) - 9
    assert loss_distribution(1 / (0.999 * rare), 0.01, 1, 0.5) is not None
    assert loss_distribution(1 / (1.001 * rare), 0.01, 1, 0.5) is None
    assert epsilon([Spend(2 / (1.001 * reach), 0.999, unit="patient")], 1e-5, "record") == math.inf


def test_replaced_units_are_counted_together_with_others() -> None:
    """Of one budget: sampled steps for a patient, a step on everyone, and both, for a record."""
    sampled, whole = Spend(6.0, 0.2, 4, "patient"), Spend(6.0, unit="record")
    apart = [epsilon([spend], 1e-3, "record") for spend in (sampled, whole)]
    assert max(apart) < epsilon([sampled, whole], 1e-3, "record") < sum(apart)


def test_the_last_point_of_a_short_grid_and_the_mass_beyond_it_are_counted_once() -> None:
    """With two points above 0, δ at the first is the profile to the last digit, and all probabilities sum to 1."""
    multiplier, rate, interval = 4.0, 0.6, 0.92
    found = loss_distribution(multiplier, rate, 1, interval)
    assert found is not None
    assert found.get_delta_for_epsilon(interval) == pytest.approx(bound(interval, multiplier, rate), rel=1e-6)
    assert found.get_delta_for_epsilon(2 * interval) == pytest.approx(bound(2 * interval, multiplier, rate), rel=1e-4)
    assert found.get_delta_for_epsilon(-60.0) == pytest.approx(1.0, abs=1e-13)


def test_a_profile_is_not_negative_where_rounding_would_make_it_so() -> None:
    """Far out, the two terms of δ are equal to the last digit."""
    found = profile(np.linspace(0.0, 60.0, 4001), 3.0, 0.5)
    assert found.min() == 0.0
