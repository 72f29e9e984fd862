"""Plans of noise: how the least noise is found, with ε in closed form in place of an accountant's; and what spends come to."""

import logging
import math
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("dp_accounting", reason="needs polyclinic[privacy]")

from polyclinic.tasks.dpsgd import Spend
from polyclinic.transforms import accounting
from polyclinic.transforms.accounting import BadPlan, curve, epsilon, epsilon_rdp, plan, rounds_within, statement


class Accountant:
    """ε = q √steps / σ by losses, a tenth more by Rényi's bound, and a hundredth more on a coarse grid; it counts."""

    def __init__(self) -> None:
        self.asked: dict[str, int] = {"pld": 0, "rdp": 0, "coarse": 0}

    def __call__(self, costs: Any, delta: float, by: str) -> float:
        assert delta == 1e-5
        self.asked[by] += 1
        return float(sum(c.rate * c.steps**0.5 / c.multiplier for c in costs)) * {"pld": 1.0, "rdp": 1.1, "coarse": 1.01}[by]


@pytest.fixture
def accountant(monkeypatch: pytest.MonkeyPatch) -> Accountant:
    made = Accountant()
    monkeypatch.setattr(accounting, "_epsilon", made)
    return made


@pytest.mark.parametrize("wanted", [0.02, 0.1, 0.11, 1.0, 2.0, 8.0, 500.0])
@pytest.mark.parametrize(("rate", "rounds", "steps"), [(1.0, 1, 1), (1.0, 9, 4), (0.01, 100, 1), (0.5, 1, 50)])
def test_the_least_noise_is_found_to_a_thousandth(wanted: float, rate: float, rounds: int, steps: int, accountant: Accountant) -> None:
    exact = rate * (rounds * steps) ** 0.5 / wanted
    found = plan(wanted, 1e-5, rate, rounds, steps=steps, batch=8.0)
    assert exact <= found.noise <= max(1.0012 * exact, exact + 1e-4)
    assert found.noise == pytest.approx(round(found.noise, 4), abs=1e-12), "four decimals, rounded up"
    assert found.epsilon == pytest.approx(rate * (rounds * steps) ** 0.5 / found.noise)
    assert found.epsilon_rdp == pytest.approx(1.1 * found.epsilon)
    assert (found.delta, found.rate, found.rounds, found.steps) == (1e-5, rate, rounds, rounds * steps)
    assert found.deviation == found.noise / 8
    assert accountant.asked["pld"] < (25 if wanted > 0.1 else 50), "each may take seconds"


def test_a_small_epsilon_is_not_looked_for_on_a_coarse_grid(accountant: Accountant) -> None:
    plan(0.1, 1e-5, 1.0, 3)
    assert accountant.asked["coarse"] == 0
    plan(0.2, 1e-5, 1.0, 3)
    assert accountant.asked["coarse"] > 0


def test_by_itself_a_plan_is_one_step_a_round_and_a_batch_of_one(accountant: Accountant) -> None:
    found = plan(1.0, 1e-5, 1.0, 4)
    assert found.steps == 4
    assert found.deviation == found.noise


def test_a_curve_is_a_plan_for_each(accountant: Accountant) -> None:
    assert curve([1.0, 2.0], 1e-5, 0.5, 4, steps=3, batch=2.0) == [
        plan(wanted, 1e-5, 0.5, 4, steps=3, batch=2.0) for wanted in (1.0, 2.0)
    ]
    assert curve([1.0], 1e-5, 0.5, 4) == [plan(1.0, 1e-5, 0.5, 4)]
    assert curve([], 1e-5, 1.0, 1) == []


def test_a_hopeless_wish_is_refused(accountant: Accountant) -> None:
    with pytest.raises(BadPlan, match=r"no noise makes 9 steps as private as ε = 1e-06 at δ = 1e-05"):
        plan(1e-6, 1e-5, 1.0, 3, steps=3)
    assert plan(1e-5, 1e-5, 1.0, 1).noise == pytest.approx(1e5, rel=2e-3), "noise of a hundred thousand can be had"


@pytest.mark.parametrize(("change", "said"), [
    ({"epsilon": 0.0}, "epsilon must be above 0, not 0.0"), ({"epsilon": -1.0}, "epsilon must"), ({"epsilon": math.inf}, "epsilon must"),
    ({"epsilon": math.nan}, "epsilon must"), ({"delta": 0.0}, "delta must be between 0 and 1, not 0.0"), ({"delta": 1.0}, "delta must"),
    ({"rate": 0.0}, "rate must be above 0 and at most 1, not 0.0"), ({"rate": 1.001}, "rate must"), ({"rounds": 0}, "rounds and steps must"),
    ({"steps": 0}, "rounds and steps must be at least 1"),
])  # fmt: skip
def test_what_is_out_of_range_is_told(change: dict[str, Any], said: str, accountant: Accountant) -> None:
    with pytest.raises(BadPlan, match=said):
        plan(**{"epsilon": 1.0, "delta": 1e-5, "rate": 1.0, "rounds": 1, **change})
    assert not any(accountant.asked.values())


@pytest.mark.parametrize("noise", [0.5, 1.0, 3.7, 40.0])
@pytest.mark.parametrize("steps", [1, 5])
def test_rounds_are_counted_until_one_more_is_too_many(noise: float, steps: int, accountant: Accountant) -> None:
    """√(rounds · steps) / σ ≤ ε, exactly at the limit."""
    wanted = 2.0
    expected = math.floor((wanted * noise) ** 2 / steps + 1e-9)
    assert rounds_within(wanted, 1e-5, noise, 1.0, steps=steps) == expected
    if steps == 1:
        assert rounds_within(wanted, 1e-5, noise, 1.0) == expected


def test_no_round_at_all_may_fit_and_a_search_ends(accountant: Accountant) -> None:
    assert rounds_within(0.5, 1e-5, 1.0, 1.0) == 0
    assert rounds_within(1.0, 1e-5, 1.0, 1.0) == 1
    assert 2**23 <= rounds_within(1e9, 1e-5, 1.0, 1.0) <= 2**25
    with pytest.raises(ValueError, match="delta must be between 0 and 1"):
        rounds_within(1.0, 0.0, 1.0, 1.0)


def test_the_quick_bound_is_enough_if_it_fits(accountant: Accountant) -> None:
    rounds_within(2.0, 1e-5, 10.0, 1.0)
    assert 0 < accountant.asked["pld"] < accountant.asked["rdp"]


@pytest.fixture
def absl() -> Iterator[logging.Logger]:
    log = logging.getLogger("absl")
    before = log.level
    log.setLevel(logging.INFO)
    yield log
    log.setLevel(before)


def test_the_accountants_warnings_are_silenced_for_no_longer_than_it_counts(absl: logging.Logger) -> None:
    levels: list[int] = []

    class Watch(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            levels.append(record.levelno)
            return False

    watch = Watch()
    absl.addFilter(watch)
    epsilon_rdp([Spend(0.731, 0.013, 1000)], 1e-5)
    absl.removeFilter(watch)
    assert absl.level == logging.INFO
    assert all(level >= logging.ERROR for level in levels)


def test_a_step_on_everyone_costs_more_than_on_a_sample_and_two_more_than_one() -> None:
    """The order of costs, by both accountants: what any accountant must say."""
    for by in (epsilon, epsilon_rdp):
        cheap, base, twice, pure = (by(spends, 1e-5) for spends in (
            [Spend(5.0, 0.1)], [Spend(5.0)], [Spend(5.0), Spend(5.0)], [Spend(5.0), Spend(0.0, pure=0.25, steps=2)]
        ))  # fmt: skip
        assert 0 < cheap < base < twice
        assert pure == pytest.approx(base + 0.5)
        assert twice == by([Spend(5.0, steps=2)], 1e-5)
        assert by([Spend(5.0, steps=2), Spend(0.0)], 1e-5) == math.inf
        assert by([Spend(-1.0)], 1e-5) == math.inf
        assert by([], 1e-5) == 0
    assert epsilon([Spend(5.0)], 1e-5) < epsilon_rdp([Spend(5.0)], 1e-5)
    assert epsilon([Spend(5.0)], 1e-3) < epsilon([Spend(5.0)], 1e-5)


def test_a_statement_says_what_was_spent_how_often() -> None:
    spends = [Spend(0.0, pure=0.5), Spend(4.0, 1.0, 2), Spend(0.0, pure=0.5), Spend(6.0, 0.25, 3), Spend(4.0), Spend(9.0, steps=0)]
    said = statement(spends, 1e-5)
    assert (said.epsilon, said.epsilon_rdp) == (epsilon(spends, 1e-5), epsilon_rdp(spends, 1e-5))
    assert (said.delta, said.unit) == (1e-5, "site")
    assert sorted(spend[:3] for spend in said.spends) == [(0.0, 1.0, 2), (4.0, 1.0, 3), (6.0, 0.25, 3)]
    text = str(said)
    assert f"{said.epsilon:.3f}" in text
    assert f"{said.epsilon_rdp:.3f}" in text
    assert "1e-05" in text
    assert statement(reversed(spends), 1e-5) == said
    assert statement([], 1e-5).epsilon == 0
    assert statement([Spend(1.0, unit="patient")], 1e-5).unit == "patient"
