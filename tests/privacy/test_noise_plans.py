"""Plans of noise: how the least noise is found, with ε in closed form in place of an accountant's; and what spends come to."""

import logging
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("dp_accounting", reason="needs polyclinic[privacy]")

import dp_accounting
from dp_accounting.pld import privacy_loss_distribution

from polyclinic.learning.training.dp_sgd import Spend
from polyclinic.privacy import accounting
from polyclinic.privacy.accounting import HUGE, BadPlan, curve, epsilon, epsilon_rdp, plan, statement
from polyclinic.privacy.guarantee import guarantee
from polyclinic.privacy.privacy_units import Cost
from polyclinic.privacy.replacement_accounting import loss_distribution


class Accountant:
    """ε = q √steps / σ by losses, a tenth more by Rényi's bound, and a hundredth more on a coarse grid; it counts."""

    def __init__(self) -> None:
        self.asked: dict[str, int] = {"pld": 0, "rdp": 0, "coarse": 0}

    def __call__(self, costs: Any, delta: float, by: str) -> float:
        assert delta == 1e-5
        self.asked[by] += 1
        return (
            float(sum(c.rate * c.steps**0.5 / c.multiplier for c in costs))
            * {"pld": 1.0, "rdp": 1.1, "coarse": 1.01}[by]
        )


@pytest.fixture
def accountant(monkeypatch: pytest.MonkeyPatch) -> Accountant:
    made = Accountant()
    monkeypatch.setattr(accounting, "_epsilon", made)
    return made


@pytest.mark.parametrize("wanted", [0.02, 0.1, 0.11, 1.0, 2.0, 8.0, 500.0])
@pytest.mark.parametrize(("rate", "rounds", "steps"), [(1.0, 1, 1), (1.0, 9, 4), (0.01, 100, 1), (0.5, 1, 50)])
def test_the_least_noise_is_found_to_a_thousandth(
    wanted: float, rate: float, rounds: int, steps: int, accountant: Accountant
) -> None:
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
    with pytest.raises(BadPlan, match=r"no noise gives 9 steps ε = 1e-06 at δ = 1e-05"):
        plan(1e-6, 1e-5, 1.0, 3, steps=3)
    assert plan(1e-5, 1e-5, 1.0, 1).noise == pytest.approx(1e5, rel=2e-3), "noise of a hundred thousand can be had"
    assert plan(1.5e-6, 1e-5, 1.0, 1).noise == pytest.approx(1 / 1.5e-6, rel=2e-3), "the search ends at 2^20"
    with pytest.raises(BadPlan, match="no noise gives 1 steps ε = 8e-07"):
        plan(8e-7, 1e-5, 1.0, 1)


def test_noise_is_rounded_up_to_the_next_ten_thousandth(
    accountant: Accountant, monkeypatch: pytest.MonkeyPatch
) -> None:
    for found, rounded in ((3.00001, 3.0001), (3.0, 3.0), (2.99999, 3.0)):
        monkeypatch.setattr(accounting, "_narrowed", lambda at, wanted, high, by, found=found: found)
        assert plan(1.0, 1e-5, 1.0, 1).noise == rounded


@pytest.mark.parametrize(("value", "calls"), [(0.9995, 1), (0.999, 1), (0.998, 4)])
def test_noise_that_is_close_enough_is_not_narrowed_further(value: float, calls: int) -> None:
    """An ε takes seconds, so none is computed that is not needed."""
    asked: list[float] = []

    def at(noise: float) -> float:
        asked.append(noise)
        return value / noise

    found = accounting._narrowed(at, 1.0, 1.0, 0.9)
    assert len(asked) == calls
    assert 0.999 <= value / found <= 1.0
    assert found == 1.0 or calls > 1


CURVES: dict[str, Callable[[float], float]] = {
    "steeper for more noise": lambda noise: noise**-1 if noise < 1 else noise**-9,
    "steeper for less noise": lambda noise: noise**-9 if noise < 1 else noise**-1,
    "with a jump": lambda noise: 2.0 if noise < 1 else 0.5 / noise,
}


@pytest.mark.parametrize("by", [0.3, 0.7, 0.98])
@pytest.mark.parametrize("curve", CURVES.values(), ids=CURVES)
def test_whatever_the_curve_the_noise_is_never_too_small(curve: Callable[[float], float], by: float) -> None:
    """Interpolation may end on the side where ε is too large, from which nothing is returned."""
    found = accounting._narrowed(curve, 0.9, 2.0, by)
    assert curve(found) <= 0.9
    assert curve(found / 1.01) > 0.9


def test_noise_whose_epsilon_is_exactly_the_wanted_one_is_taken() -> None:
    assert accounting._narrowed(lambda noise: 1 / noise, 1.0, 2.0, 0.5) == 1.0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"epsilon": 0.0}, "epsilon must be above 0, not 0.0"),
        ({"epsilon": -1.0}, "epsilon must"),
        ({"epsilon": math.inf}, "epsilon must"),
        ({"epsilon": math.nan}, "epsilon must"),
        ({"delta": 0.0}, "delta must be between 0 and 1, not 0.0"),
        ({"delta": 1.0}, "delta must"),
        ({"rate": 0.0}, "rate must be above 0 and at most 1, not 0.0"),
        ({"rate": 1.001}, "rate must"),
        ({"rounds": 0}, "rounds and steps must"),
        ({"steps": 0}, "rounds and steps must be at least 1"),
    ],
)
def test_what_is_out_of_range_is_told(change: dict[str, Any], said: str, accountant: Accountant) -> None:
    with pytest.raises(BadPlan, match=said):
        plan(**{"epsilon": 1.0, "delta": 1e-5, "rate": 1.0, "rounds": 1, **change})
    assert not any(accountant.asked.values())


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


def test_only_the_accountants_own_logger_is_silenced(absl: logging.Logger) -> None:
    others = logging.getLogger(), logging.getLogger("polyclinic")
    before = [log.level for log in others]
    with accounting._quiet():
        assert absl.level == logging.ERROR
        assert [log.level for log in others] == before
    assert absl.level == logging.INFO


def test_the_bound_without_sampling_is_that_of_one_gaussian_step() -> None:
    """Two kinds of steps, μ² = 8 / 2² + 3 / 3² = 7 / 3, by the closed form μ² / 2 + μ √(2 ln (1 / δ))."""
    costs = [Cost(2.0, 1.0, 8, 0.0, False), Cost(3.0, 0.5, 3, 0.0, False)]
    assert accounting._without_sampling(costs, 1e-5) == pytest.approx(
        7 / 6 + math.sqrt(7 / 3) * math.sqrt(2 * math.log(1e5)), rel=1e-12
    )


def test_a_step_on_everyone_costs_more_than_on_a_sample_and_two_more_than_one() -> None:
    """The order of costs, by both accountants: what any accountant must say."""
    for by in (epsilon, epsilon_rdp):
        cheap, base, twice, pure = (
            by(spends, 1e-5)
            for spends in (
                [Spend(20.0, 0.1)],
                [Spend(20.0)],
                [Spend(20.0), Spend(20.0)],
                [Spend(20.0), Spend(0.0, pure=0.25, steps=2)],
            )
        )
        assert 0 < cheap < base < twice
        assert pure == pytest.approx(base + 0.5)
        assert twice == by([Spend(20.0, steps=2)], 1e-5)
        assert by([Spend(20.0, steps=2), Spend(0.0)], 1e-5) == math.inf
        assert by([Spend(-1.0)], 1e-5) == math.inf
        assert by([], 1e-5) == 0
    assert epsilon([Spend(20.0)], 1e-5) < epsilon_rdp([Spend(20.0)], 1e-5)
    assert epsilon([Spend(20.0)], 1e-3) < epsilon([Spend(20.0)], 1e-5)


def test_a_statement_says_what_was_spent_how_often() -> None:
    spends = [
        Spend(0.0, pure=0.5),
        Spend(40.0, 1.0, 2),
        Spend(0.0, pure=0.5),
        Spend(60.0, 0.25, 3),
        Spend(40.0),
        Spend(90.0, steps=0),
    ]
    said = statement(spends, 1e-5)
    assert (said.epsilon, said.epsilon_rdp) == (epsilon(spends, 1e-5), epsilon_rdp(spends, 1e-5))
    assert (said.delta, said.unit) == (1e-5, "site")
    assert sorted(spend[:3] for spend in said.spends) == [(0.0, 1.0, 2), (40.0, 1.0, 3), (60.0, 0.25, 3)]
    text = str(said)
    assert f"{said.epsilon:.3f}" in text
    assert f"{said.epsilon_rdp:.3f}" in text
    assert "1e-05" in text
    assert statement(reversed(spends), 1e-5) == said
    assert statement([], 1e-5).epsilon == 0
    assert statement([Spend(10.0, unit="patient")], 1e-5).unit == "patient"


def reference(*losses: Any, delta: float = 1e-5) -> float:
    """ε of what is composed of ``losses``, by dp-accounting called directly."""
    total = losses[0]
    for loss in losses[1:]:
        total = total.compose(loss)
    return float(total.get_epsilon_for_delta(delta))


def gaussian(sigma: float, rate: float = 1.0) -> Any:
    return privacy_loss_distribution.from_gaussian_mechanism(
        sigma, sampling_prob=rate, value_discretization_interval=1e-4
    )


def renyi(*events: tuple[float, float, int]) -> float:
    accountant = dp_accounting.rdp.RdpAccountant()
    for sigma, rate, steps in events:
        event = dp_accounting.GaussianDpEvent(sigma)
        accountant.compose(dp_accounting.PoissonSampledDpEvent(rate, event) if rate < 1 else event, steps)
    return float(accountant.get_epsilon(1e-5))


WHOLE, SAMPLED, INSIDE = (
    Spend(40.0, steps=4, unit="record"),
    Spend(30.0, 0.5, 3, "record"),
    Spend(60.0, 0.5, 3, "patient"),
)


def test_each_kind_of_step_is_counted_as_its_own_mechanism_and_all_are_composed() -> None:
    """Steps on everyone, on samples, and of a unit inside a sampled one: alone, and together with a pure release."""
    losses = {
        WHOLE: gaussian(20.0),
        SAMPLED: gaussian(30.0, 0.5).self_compose(3),
        INSIDE: loss_distribution(30.0, 0.5, 3, 1e-4),
    }
    for spend, loss in losses.items():
        assert epsilon([spend], 1e-5, "record") == pytest.approx(reference(loss), abs=1e-6)
    together = epsilon([*losses, Spend(0.0, pure=0.25, steps=2, unit="record")], 1e-5, "record")
    assert together == pytest.approx(reference(*losses.values()) + 0.5, abs=1e-6)


def test_renyis_bound_is_that_of_the_library_for_all_steps_together() -> None:
    pure = Spend(0.0, pure=0.25, steps=2, unit="record")
    assert epsilon_rdp([WHOLE], 1e-5) == pytest.approx(renyi((40.0, 1.0, 4)), rel=1e-9)
    assert epsilon_rdp([SAMPLED, WHOLE, pure], 1e-5) == pytest.approx(
        renyi((30.0, 0.5, 3), (40.0, 1.0, 4)) + 0.5, rel=1e-9
    )
    assert epsilon_rdp([Spend(2.0**20, unit="record"), pure], 1e-5) == pytest.approx(0.5, abs=1e-3), "never below 0"


def test_where_renyis_bound_does_not_hold_the_quick_one_is_of_losses_on_a_coarse_grid() -> None:
    """For a unit inside a sampled one, whatever else there is."""
    coarse = loss_distribution(30.0, 0.5, 3, 1e-3)
    assert epsilon_rdp([INSIDE], 1e-5, "record") == pytest.approx(reference(coarse), abs=1e-6)
    both = privacy_loss_distribution.from_gaussian_mechanism(20.0, value_discretization_interval=1e-3)
    assert epsilon_rdp([INSIDE, WHOLE], 1e-5, "record") == pytest.approx(reference(coarse, both), abs=1e-6)
    rare = privacy_loss_distribution.from_gaussian_mechanism(
        30.0, sampling_prob=0.5, value_discretization_interval=1e-3
    )
    assert epsilon_rdp([INSIDE, SAMPLED], 1e-5, "record") == pytest.approx(
        reference(coarse, rare.self_compose(3)), abs=1e-6
    )


def test_a_huge_epsilon_is_renyis_bound_and_a_sample_may_make_it_small() -> None:
    """Above 100 by either bound, no tight figure is computed; without sampling this one would be far above."""
    pure = Spend(0.0, pure=2.0)
    for many in ([Spend(2.0**-6)], [Spend(2.0**-6), pure]):
        assert HUGE < epsilon(many, 1e-5) == epsilon_rdp(many, 1e-5) < math.inf
    rare = [Spend(3.0, 0.0001, 1200)]
    assert epsilon([rare[0]._replace(rate=1.0)], 1e-5) > HUGE
    assert epsilon(rare, 1e-5) == pytest.approx(reference(gaussian(3.0, 0.0001).self_compose(1200)), abs=1e-6)
    assert 0 < epsilon(rare, 1e-5) < epsilon_rdp(rare, 1e-5)
    hopeless = [Spend(2.0**-10, 0.1, 1, "patient"), Spend(4.0, unit="record")]
    assert epsilon(hopeless, 1e-5, "record") == epsilon_rdp(hopeless, 1e-5, "record") == math.inf


def test_different_units_are_not_added_up_unless_it_is_said_for_whom() -> None:
    mixed = [Spend(60.0), Spend(40.0, unit="patient")]
    for by in (epsilon, epsilon_rdp, statement):
        with pytest.raises(ValueError, match=r"different units \(patient, site\), and their ε do not add up"):
            by(mixed, 1e-5)
        with pytest.raises(ValueError, match="does not protect a site"):
            by(mixed, 1e-5, "site")
        with pytest.raises(ValueError, match="delta must be between 0 and 1, not 1"):
            by([Spend(60.0)], 1)
        with pytest.raises(ValueError, match="delta must be between 0 and 1, not 0"):
            by([Spend(60.0)], 0)
    assert epsilon_rdp(mixed, 1e-5, "patient") == pytest.approx(renyi((30.0, 1.0, 1), (40.0, 1.0, 1)), rel=1e-9)
    said = statement(mixed, 1e-5, "patient")
    assert (said.unit, said.spends) == ("patient", tuple(sorted(mixed)))
    assert said.guarantee == guarantee(mixed, "patient")


def test_what_costs_a_unit_the_same_is_the_same() -> None:
    """A site's σ = 60 and a patient's σ = 60 both count half for a record."""
    apart = [Spend(60.0), Spend(60.0, unit="patient", steps=3)]
    assert epsilon(apart, 1e-5, "record") == epsilon([Spend(30.0, unit="record", steps=4)], 1e-5)


def test_a_statement_reads_as_one_sentence_with_what_was_spent() -> None:
    besides = (
        "Assumed: the number of patients counts as public. Covers training data only: scores of validation and test "
        "patients that a site sends are not covered."
    )
    assert str(statement([Spend(0.0, pure=0.5, unit="patient")] * 3, 1e-5)) == (
        "ε = 1.500 at δ = 1e-05 for every patient (adjacency: add or remove one patient), by PLD; 1.500 by RDP: 3 releases of "
        f"ε = 0.5 each. {besides}"
    )
    nothing = statement([], 1e-3, "patient")
    assert (nothing.epsilon, nothing.epsilon_rdp, nothing.unit, nothing.spends) == (0, 0, "patient", ())
    assert str(nothing).endswith(f"0.000 by RDP: nothing was released. {besides}")
    assert statement([], 1e-3).unit == "site"


def test_without_the_package_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    for by in (epsilon, epsilon_rdp):
        with pytest.raises(ImportError, match=r'pip install "polyclinic\[privacy\]"'):
            by([Spend(77.0)], 1e-5)


def test_warnings_come_back_after_an_error(absl: logging.Logger) -> None:
    with pytest.raises(ValueError):
        epsilon_rdp([Spend(77.0, -0.5)], 1e-5)
    assert absl.level == logging.INFO
