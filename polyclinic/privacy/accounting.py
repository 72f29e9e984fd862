"""What privacy was spent, and what a wanted ε costs.

The figure that is signed comes from privacy loss distributions, which are tight: Antti Koskela, Joonas Jälkö and Antti
Honkela, "Computing Tight Differential Privacy Guarantees Using FFT", AISTATS 2020, https://arxiv.org/abs/1906.03049, as
computed by Google's dp-accounting. Beside it stands Rényi's, an upper bound that is quick: Ilya Mironov, Kunal Talwar
and Li Zhang, "Rényi Differential Privacy of the Sampled Gaussian Mechanism", 2019, https://arxiv.org/abs/1908.10530.

Two data sets are adjacent if one has a unit more: a record, a patient, or a site, as each spend says; a site that is
not there is one that sends zeros. Noise for a coarse unit also protects a finer one inside it, at twice the distance
(``units``). Steps on Poisson samples are amplified, because who was sampled stays secret at the site. Which sites a
round asked is no secret to the server, so a cohort amplifies nothing.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

from polyclinic.errors import ConfigError, MissingDependency
from polyclinic.learning.training.dp_sgd import Spend, Unit
from polyclinic.privacy.guarantee import Guarantee, described, guarantee, sentence
from polyclinic.privacy.privacy_units import UNITS, Cost, cost
from polyclinic.privacy.replacement_accounting import loss_distribution

# Of the discretized privacy loss: ε is exact to about as much, and never too small.
INTERVALS = {"pld": 1e-4, "coarse": 1e-3}
HUGE = 100.0


class BadPlan(ConfigError):
    """A budget that cannot be kept, or planned, as it was asked for."""


def epsilon(spends: Iterable[Spend], delta: float, unit: Unit | None = None) -> float:
    """ε at ``delta`` of all ``spends`` together, by privacy loss distributions; infinite for a spend without noise.

    Beyond ``HUGE`` it is the bound of ``epsilon_rdp``: nobody signs such a figure, and a tight one takes memory in
    proportion to it.

    Args:
        spends: What was spent.
        delta: δ.
        unit: For whom to count. If it is left out, all spends must protect the same.

    Raises:
        ValueError: If no ``unit`` is given and the spends protect different ones, whose ε do not add up; if a spend
            protects only something finer than ``unit``; or if ``delta`` is no probability.
    """
    return _epsilon(_costs(spends, unit), _checked(delta), "pld")


def epsilon_rdp(spends: Iterable[Spend], delta: float, unit: Unit | None = None) -> float:
    """The same by Rényi divergences: quicker, and 7 to 35 per cent larger.

    For a unit inside one that was sampled, from privacy loss distributions on a coarse grid instead.
    """
    return _epsilon(_costs(spends, unit), _checked(delta), "rdp")


class Statement(NamedTuple):
    """An ε with all that it means nothing without.

    Attributes:
        epsilon: By privacy loss distributions.
        epsilon_rdp: By Rényi divergences.
        delta: δ.
        unit: Who is protected.
        spends: What was spent, for the unit that each spend was calibrated to.
    """

    epsilon: float
    epsilon_rdp: float
    delta: float
    unit: Unit
    spends: tuple[Spend, ...]

    @property
    def guarantee(self) -> Guarantee:
        """Whom it protects, and what is assumed."""
        return guarantee(self.spends, self.unit)

    def __str__(self) -> str:
        """For run, report and journal: ε with its unit, its adjacency, its assumptions, and what it was spent on."""
        steps = "; ".join(described(spend, self.unit) for spend in self.spends) or "nothing was released"
        whom = self.guarantee
        how = f", by PLD; {self.epsilon_rdp:.3f} by RDP: {steps}"
        return sentence(f"{self.epsilon:.3f}", f"{self.delta:g}", self.unit, whom.adjacency, whom.assumptions, how)


def statement(spends: Iterable[Spend], delta: float, unit: Unit | None = None) -> Statement:
    """What ``spends`` come to for every ``unit``; by default the one that all of them protect, and a site if none."""
    grouped = _grouped(spends)
    unit = unit or (_only_unit(grouped) if grouped else "site")
    return Statement(epsilon(grouped, delta, unit), epsilon_rdp(grouped, delta, unit), delta, unit, grouped)


class Plan(NamedTuple):
    """Noise for a wanted ε.

    Attributes:
        noise: The multiplier σ to set, rounded up.
        epsilon: What it gives.
        epsilon_rdp: What Rényi's bound would say.
        delta: δ.
        rate: q.
        rounds: How many rounds.
        steps: How many steps in all.
        deviation: Of the noise on a mean update's coordinate, in units of the bound: what it costs in accuracy.
    """

    noise: float
    epsilon: float
    epsilon_rdp: float
    delta: float
    rate: float
    rounds: int
    steps: int
    deviation: float


def plan(epsilon: float, delta: float, rate: float, rounds: int, *, steps: int = 1, batch: float = 1.0) -> Plan:
    """The least noise with which ``rounds`` rounds stay within ``epsilon``.

    Args:
        epsilon: The wanted ε, above 0.
        delta: δ, below one in the number of protected units.
        rate: q, the share of units in a step; 1 for whole sites.
        rounds: How many rounds.
        steps: Steps of training in a round.
        batch: The expected batch, in units, or the number of sites in a sum: the noise is divided by it.

    Raises:
        BadPlan: Where an argument is out of range; the message lists them all.
    """
    problems = [] if 0 < epsilon < math.inf else [f"epsilon must be above 0, not {epsilon}"]
    problems += [] if 0 < delta < 1 else [f"delta must be between 0 and 1, not {delta}"]
    problems += [] if 0 < rate <= 1 else [f"rate must be above 0 and at most 1, not {rate}"]
    problems += [] if rounds >= 1 and steps >= 1 else ["rounds and steps must be at least 1"]
    if problems:
        raise BadPlan("; ".join(problems))
    total = rounds * steps
    noise = _least_noise(epsilon, delta, rate, total)
    costs = _costs([Spend(noise, rate, total)], None)
    return Plan(
        noise, _epsilon(costs, delta, "pld"), _epsilon(costs, delta, "rdp"), delta, rate, rounds, total, noise / batch
    )


def rounds_within(epsilon: float, delta: float, noise: float, rate: float, *, steps: int = 1) -> int:
    """How many rounds of ``steps`` steps stay within ``epsilon``; 0 where not even one does."""

    def fits(rounds: int) -> bool:
        costs = _costs([Spend(noise, rate, rounds * steps)], None)
        return any(_epsilon(costs, _checked(delta), by) <= epsilon for by in ("rdp", "pld"))  # the quick one first

    if not fits(1):
        return 0
    low, high = 1, 2
    while high < 2**24 and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def curve(
    epsilons: Sequence[float], delta: float, rate: float, rounds: int, *, steps: int = 1, batch: float = 1.0
) -> list[Plan]:
    """A plan for each ε: how much noise, and with it accuracy, each costs."""
    return [plan(wanted, delta, rate, rounds, steps=steps, batch=batch) for wanted in epsilons]


def _least_noise(wanted: float, delta: float, rate: float, steps: int) -> float:
    """The noise whose ε is ``wanted``, or at most a thousandth less."""

    def at(noise: float, by: str) -> float:
        return _epsilon(_costs([Spend(noise, rate, steps)], None), delta, by)

    high = 1.0
    while at(high, "rdp") > wanted:
        high *= 2
        if high > 2**20:
            raise BadPlan(f"no noise makes {steps} steps as private as ε = {wanted:g} at δ = {delta:g}")
    if wanted > 0.1:  # a tenth of the time finds where to look; it is never too small either
        high = _narrowed(lambda noise: at(noise, "coarse"), wanted, high, 0.7)
    return math.ceil(_narrowed(lambda noise: at(noise, "pld"), wanted, high, 0.98) * 1e4) / 1e4


def _narrowed(at: Callable[[float], float], wanted: float, high: float, by: float) -> float:
    """Noise with ``at`` of it at most ``wanted``, or a thousandth less; of ``high`` it is at most ``wanted``.

    Steps down by the factor ``by`` until ε is too large, and closes in from there.
    """
    safe = at(high)
    if safe >= 0.999 * wanted:
        return high
    while (loose := at(low := by * high)) <= wanted:
        high, safe = low, loose
    for _ in range(30):
        if safe >= 0.999 * wanted:
            break
        # ln ε is nearly a line in ln σ; step a little short of it, so that both ends close in
        share = (math.log(loose) - math.log(wanted * 0.9995)) / (math.log(loose) - math.log(safe))
        middle = low * (high / low) ** min(max(share, 0.02), 0.98)
        if (found := at(middle)) <= wanted:
            high, safe = middle, found
        else:
            low, loose = middle, found
    return high


def _grouped(spends: Iterable[Spend]) -> tuple[Spend, ...]:
    """Steps of the same kind, counted together, in a fixed order."""
    counts: Counter[Spend] = Counter()
    for spend in spends:
        counts[spend._replace(steps=1)] += spend.steps
    return tuple(sorted(spend._replace(steps=n) for spend, n in counts.items() if n))


def _only_unit(grouped: Sequence[Spend]) -> Unit:
    if len(units := sorted({spend.unit for spend in grouped})) > 1:
        raise ConfigError(
            f"these spends protect different units ({', '.join(units)}), and their ε do not add up: say "
            "for which unit to count them"
        )
    return grouped[0].unit


def _costs(spends: Iterable[Spend], unit: Unit | None) -> tuple[Cost, ...]:
    """What the spends cost one ``unit``, those of the same kind counted together, in a fixed order."""
    grouped = _grouped(spends)
    whom = unit or (_only_unit(grouped) if grouped else UNITS[-1])
    counts: Counter[Cost] = Counter()
    for spend in grouped:
        counts[cost(spend, whom)._replace(steps=1)] += spend.steps
    return tuple(sorted(one._replace(steps=n) for one, n in counts.items()))


def _checked(delta: float) -> float:
    if not 0 < delta < 1:
        raise ConfigError(f"delta must be between 0 and 1, not {delta}")
    return delta


@lru_cache(maxsize=4096)
def _epsilon(costs: tuple[Cost, ...], delta: float, by: str) -> float:
    if any(one.multiplier <= 0 and one.pure <= 0 for one in costs):
        return math.inf
    pure = sum(one.pure * one.steps for one in costs)
    normal = [one for one in costs if not one.pure]
    if not normal:
        return pure
    inside = any(one.inside for one in normal)
    if by == "rdp" and not inside:
        return _renyi(normal, delta) + pure
    large = by == "pld" and not inside and _without_sampling(normal, delta) > HUGE
    if large and (bound := _renyi(normal, delta)) > HUGE:
        return bound + pure
    return _tight(normal, delta, INTERVALS["coarse" if by == "rdp" else by]) + pure


def _without_sampling(costs: Iterable[Cost], delta: float) -> float:
    """A bound in closed form: all steps as one of normal noise, on everyone (Mironov 2017, proposition 3)."""
    mu = math.sqrt(sum(one.steps / one.multiplier**2 for one in costs))
    return mu * mu / 2 + mu * math.sqrt(2 * math.log(1 / delta))


def _renyi(costs: Iterable[Cost], delta: float) -> float:
    library = _library()
    accountant = library.rdp.RdpAccountant()
    with _quiet():
        for one in costs:
            event = library.GaussianDpEvent(one.multiplier)
            if one.rate < 1:
                event = library.PoissonSampledDpEvent(one.rate, event)
            accountant.compose(event, one.steps)
        return max(0.0, float(accountant.get_epsilon(delta)))


def _tight(costs: Iterable[Cost], delta: float, interval: float) -> float:
    """By privacy loss distributions of Gaussian steps; each is discretized from above."""
    distributions = _library().pld.privacy_loss_distribution
    total = distributions.identity(interval)
    for one in costs:
        if one.inside:
            loss = loss_distribution(one.multiplier, one.rate, one.steps, interval)
            if loss is None:
                return math.inf
        elif one.rate < 1:
            loss = distributions.from_gaussian_mechanism(
                one.multiplier,
                value_discretization_interval=interval,
                sampling_prob=one.rate,
                neighboring_relation=_library().NeighboringRelation.ADD_OR_REMOVE_ONE,
            ).self_compose(one.steps)
        else:  # so many steps are one, with less noise
            loss = distributions.from_gaussian_mechanism(
                one.multiplier / one.steps**0.5,
                value_discretization_interval=interval,
                neighboring_relation=_library().NeighboringRelation.ADD_OR_REMOVE_ONE,
            )
        total = total.compose(loss)
    return max(0.0, float(total.get_epsilon_for_delta(delta)))


def _library() -> Any:
    try:
        import dp_accounting
        from dp_accounting import pld, rdp
    except ImportError as error:
        raise MissingDependency("privacy", "privacy accounting needs dp-accounting") from error
    assert pld
    assert rdp
    return dp_accounting


@contextmanager
def _quiet() -> Iterator[None]:
    """Without a warning for each order that does not converge; it is left out, which makes ε larger."""
    log = logging.getLogger("absl")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
