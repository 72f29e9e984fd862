"""ε as others compute it, and plans that keep it."""

import math

import pytest

pytest.importorskip("dp_accounting", reason="needs polyclinic[privacy]")

from scipy import stats
from scipy.optimize import brentq

from polyclinic.learning.training.dp_sgd import Spend
from polyclinic.privacy.accounting import HUGE, curve, epsilon, epsilon_rdp, plan, statement

# q, σ, steps; ε at δ = 1e-5 by dp-accounting 0.6.0's PLD at 1e-4 and RDP, and by Opacus 1.6.0's RDP and PRV
TABLE = [
    (0.01, 1.0, 1000, 1.8282, 2.1014, 2.1014, 1.8384),
    (0.01, 1.1, 6000, 3.8998, 4.2466, 4.2466, 3.9100),
    (0.004266, 1.1, 14063, 2.3814, 2.5962, 2.5962, 2.3914),
    (0.02, 0.8, 2000, 9.1427, 10.0828, 10.0828, 9.1532),
    (0.1, 1.0, 100, 7.0466, 7.9039, 7.8993, 7.0571),
    (0.25, 2.0, 60, 4.8889, 5.3671, 5.3632, 4.8992),
    (0.5, 2.0, 40, 8.3395, 9.0875, 9.0667, 8.3499),
    (1.0, 5.0, 50, 6.5730, 7.0774, 7.0774, 6.5833),
    (1.0, 1.0, 1, 4.3772, 4.7285, 4.7285, 4.3874),
    (0.001, 0.6, 10000, 2.4562, 3.3220, 3.3219, 2.4664),
]


@pytest.mark.parametrize(
    ("q", "sigma", "steps", "pld", "rdp", "opacus_rdp", "opacus_prv"),
    [pytest.param(*row, marks=pytest.mark.slow) if row[1] < 1 or row[2] > 5000 else row for row in TABLE],
)
def test_epsilon_is_that_of_two_libraries(
    q: float, sigma: float, steps: int, pld: float, rdp: float, opacus_rdp: float, opacus_prv: float
) -> None:
    spend = [Spend(sigma, q, steps)]
    ours, upper = epsilon(spend, 1e-5), epsilon_rdp(spend, 1e-5)
    assert ours == pytest.approx(pld, abs=2e-4)
    assert ours == pytest.approx(opacus_prv, abs=0.012)
    assert upper == pytest.approx(rdp, rel=1e-4)
    assert upper == pytest.approx(opacus_rdp, rel=3e-3)
    assert ours <= upper


def exact(sigma: float, steps: int, delta: float, also: tuple[float, int] | None = None) -> float:
    """ε of composed normal noise in closed form: Balle and Wang, ICML 2018, theorem 8."""
    mu = (steps / sigma**2 + (also[1] / also[0] ** 2 if also else 0.0)) ** 0.5

    def excess(eps: float) -> float:
        return float(stats.norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * stats.norm.cdf(-mu / 2 - eps / mu)) - delta

    return float(brentq(excess, 0, 500))


@pytest.mark.parametrize(("sigma", "steps"), [(5.0, 50), (1.0, 1), (2.0, 10), (20.0, 3)])
def test_without_sampling_it_is_the_closed_form(sigma: float, steps: int) -> None:
    assert epsilon([Spend(sigma, 1.0, steps)], 1e-5) == pytest.approx(exact(sigma, steps, 1e-5), abs=1e-3)


def test_how_steps_are_counted_does_not_matter() -> None:
    many, one = [Spend(2.0, 0.1, 5)] * 4 + [Spend(3.0)], [Spend(3.0), Spend(2.0, 0.1, 20)]
    assert epsilon(many, 1e-5) == epsilon(one, 1e-5)
    assert epsilon([], 1e-5) == 0
    assert epsilon([Spend(2.0, 0.1, 0)], 1e-5) == 0
    assert epsilon([Spend(0.0, pure=0.5, steps=3)], 1e-5) == epsilon_rdp([Spend(0.0, pure=0.5, steps=3)], 1e-5) == 1.5
    both = epsilon([Spend(3.0), Spend(0.0, pure=0.5)], 1e-5)
    assert both == pytest.approx(epsilon([Spend(3.0)], 1e-5) + 0.5)
    assert epsilon([Spend(0.0)], 1e-5) == math.inf


@pytest.mark.slow
def test_small_consortia_are_told_the_truth() -> None:
    """Five hospitals in every round with σ = 1 for 50 rounds: close to meaningless, and reported as such."""
    said = statement([Spend(1.0, 1.0, 50)], 1e-3)
    assert said.epsilon == pytest.approx(46.0, abs=0.1)
    assert str(said) == (
        "ε = 46.024 at δ = 0.001 for every site (adjacency: add or remove one site), by PLD; 49.406 by RDP: 50 steps on "
        "everyone with noise σ = 1. Assumed: the number of sites counts as public. Covers training data only: scores of "
        "validation and test patients that a site sends are not covered."
    )
    sampled = str(statement([Spend(1.0, 0.01, 10, "patient"), Spend(0.0, pure=2.0, unit="patient")], 1e-3))
    assert "for every patient" in sampled
    assert "10 steps on a Poisson sample of q = 0.01 with noise σ = 1" in sampled
    assert "1 release of ε = 2 each" in sampled
    assert "nothing was released" in str(statement([], 1e-5))


def test_units_do_not_add_up_unless_it_is_said_for_whom() -> None:
    both = [Spend(1.0), Spend(1.0, unit="patient")]
    with pytest.raises(ValueError, match=r"different units \(patient, site\).*specify the unit"):
        epsilon(both, 1e-5)
    with pytest.raises(ValueError, match="hides each patient does not protect a site"):
        epsilon(both, 1e-5, "site")
    mixed = epsilon(both, 1e-5, "patient")
    assert mixed == pytest.approx(exact(1.0, 1, 1e-5, also=(0.5, 1)), abs=2e-3)
    assert statement(both, 1e-5, "patient").epsilon == mixed <= epsilon_rdp(both, 1e-5, "patient")
    assert statement(both, 1e-5, "patient").unit == "patient"
    assert (statement([Spend(3.0, unit="record")], 1e-5).unit, statement([], 1e-5).unit) == ("record", "site")
    for delta in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="delta must be between 0 and 1"):
            epsilon([Spend(1.0)], delta)


@pytest.mark.parametrize(
    ("wanted", "rate", "rounds", "steps"), [pytest.param(8.0, 1.0, 10, 1, marks=pytest.mark.slow), (1.0, 0.1, 5, 8)]
)
def test_a_plan_keeps_what_it_promises_and_wastes_nothing(wanted: float, rate: float, rounds: int, steps: int) -> None:
    found = plan(wanted, 1e-5, rate, rounds, steps=steps, batch=4)
    assert 0.998 * wanted <= found.epsilon <= wanted
    assert found.epsilon == epsilon([Spend(found.noise, rate, rounds * steps)], 1e-5)
    assert found.epsilon < found.epsilon_rdp
    assert found.deviation == found.noise / 4


def test_more_privacy_costs_more_noise() -> None:
    plans = curve([0.5, 1.0], 1e-5, 1.0, 2)
    assert [p.noise for p in plans] == sorted((p.noise for p in plans), reverse=True)


def test_a_huge_epsilon_takes_no_memory_and_is_renyis_bound() -> None:
    """The tight figure's memory is in proportion to ε, and a method may meter next to no noise."""
    assert epsilon([Spend(2.0**-10)], 1e-5) == epsilon_rdp([Spend(2.0**-10)], 1e-5) > 5e5
    assert epsilon([Spend(0.4)], 1e-5) < epsilon_rdp([Spend(0.4)], 1e-5) < HUGE
    assert epsilon([Spend(2.0**-10, 0.1, 1, "patient")], 1e-5, "record") == math.inf


def test_a_plan_lists_all_that_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"epsilon must be .*; delta must be .*; rate must be .*; rounds and steps"):
        plan(0, 0, 0, 0)
