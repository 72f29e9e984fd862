"""Privacy accounting: the ε of given spends, and the noise for a wanted ε.

The reported ε comes from privacy loss distributions, which are tight: Antti Koskela, Joonas Jälkö and Antti Honkela,
"Computing Tight Differential Privacy Guarantees Using FFT", AISTATS 2020, https://arxiv.org/abs/1906.03049, as computed
by Google's dp-accounting. Rényi accounting gives a fast upper bound: Ilya Mironov, Kunal Talwar and Li Zhang, "Rényi
Differential Privacy of the Sampled Gaussian Mechanism", 2019, https://arxiv.org/abs/1908.10530.

Two data sets are adjacent if one has one more unit: a record, a patient, or a site, as each spend says; an absent site
is one that sends zeros. Noise for a coarse unit also protects a finer one inside it, at twice the distance
(``privacy_units``). Steps on Poisson samples are amplified, because the sample stays secret at the site. The server
observes the sites of a round, so sampling of sites does not amplify.
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

# Discretization intervals of the privacy loss: ε is accurate to about this much, and never too small.
INTERVALS = {"pld": 1e-4, "coarse": 1e-3}
HUGE = 100.0


class BadPlan(ConfigError):
    """A privacy budget or plan with invalid or unattainable values."""


def epsilon(spends: Iterable[Spend], delta: float, unit: Unit | None = None) -> float:
    """Compute ε at ``delta`` of all ``spends`` by privacy loss distributions; infinite for a spend without noise.

    Above ``HUGE`` the result is the bound of ``epsilon_rdp``: such an ε is of no practical use, and computing a tight
    one takes memory in proportion to it.

    Args:
        spends: The privacy costs.
        delta: δ.
        unit: The unit of protection. If omitted, all spends must protect the same unit.

    Raises:
        ValueError: If no ``unit`` is given and the spends protect different units, whose ε do not add up; if a spend
            protects only a finer unit than ``unit``; or if ``delta`` is not a probability.
    """
    return _epsilon(_costs(spends, unit), _checked(delta), "pld")


def epsilon_rdp(spends: Iterable[Spend], delta: float, unit: Unit | None = None) -> float:
    """Compute ε by Rényi divergences, which is faster than ``epsilon`` and gives 7 to 35 percent larger values.

    For a unit inside a sampled one, uses privacy loss distributions on a coarse grid instead.
    """
    return _epsilon(_costs(spends, unit), _checked(delta), "rdp")


class Statement(NamedTuple):
    """An ε with the information needed to interpret it.

    Attributes:
        epsilon: ε by privacy loss distributions.
        epsilon_rdp: ε by Rényi divergences.
        delta: δ.
        unit: The unit of protection.
        spends: The privacy costs, for the unit to which each was calibrated.
    """

    epsilon: float
    epsilon_rdp: float
    delta: float
    unit: Unit
    spends: tuple[Spend, ...]

    @property
    def guarantee(self) -> Guarantee:
        """The unit of protection and the assumptions."""
        return guarantee(self.spends, self.unit)

    def __str__(self) -> str:
        """Return ε with its unit, adjacency, assumptions and costs, for run, report and journal."""
        steps = "; ".join(described(spend, self.unit) for spend in self.spends) or "nothing was released"
        guarantee = self.guarantee
        how = f", by PLD; {self.epsilon_rdp:.3f} by RDP: {steps}"
        adjacency, assumptions = guarantee.adjacency, guarantee.assumptions
        return sentence(f"{self.epsilon:.3f}", f"{self.delta:g}", self.unit, adjacency, assumptions, how)


def statement(spends: Iterable[Spend], delta: float, unit: Unit | None = None) -> Statement:
    """Compute the privacy of ``spends`` for ``unit``; by default the unit that all protect, or a site if none."""
    grouped = _grouped(spends)
    unit = unit or (_only_unit(grouped) if grouped else "site")
    return Statement(epsilon(grouped, delta, unit), epsilon_rdp(grouped, delta, unit), delta, unit, grouped)


class Plan(NamedTuple):
    """Noise that attains a wanted ε.

    Attributes:
        noise: The noise multiplier σ, rounded up.
        epsilon: The resulting ε.
        epsilon_rdp: The bound on ε by Rényi divergences.
        delta: δ.
        rate: q.
        rounds: Number of rounds.
        steps: Total number of steps.
        deviation: Standard deviation of the noise on a coordinate of the mean update, in units of the bound.
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
    """Find the least noise with which ``rounds`` rounds stay within ``epsilon``.

    Args:
        epsilon: The wanted ε, above 0.
        delta: δ, less than one over the number of protected units.
        rate: q, the fraction of units in a step; 1 for whole sites.
        rounds: Number of rounds.
        steps: Training steps per round.
        batch: The expected batch size in units, or the number of sites in a sum: the noise is divided by it.

    Raises:
        BadPlan: If an argument is out of range. The message lists every problem.
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


def curve(
    epsilons: Sequence[float], delta: float, rate: float, rounds: int, *, steps: int = 1, batch: float = 1.0
) -> list[Plan]:
    """Compute a plan for each ε, for the trade-off between privacy and noise."""
    return [plan(wanted, delta, rate, rounds, steps=steps, batch=batch) for wanted in epsilons]


def _least_noise(wanted: float, delta: float, rate: float, steps: int) -> float:
    """Return the noise whose ε is at most ``wanted`` and at least 99.9 percent of it."""

    def at(noise: float, by: str) -> float:
        return _epsilon(_costs([Spend(noise, rate, steps)], None), delta, by)

    high = 1.0
    while at(high, "rdp") > wanted:
        high *= 2
        if high > 2**20:
            raise BadPlan(f"no noise gives {steps} steps ε = {wanted:g} at δ = {delta:g}")
    if wanted > 0.1:  # a coarse search takes a tenth of the time; its noise is never too small either
        high = _narrowed(lambda noise: at(noise, "coarse"), wanted, high, 0.7)
    return math.ceil(_narrowed(lambda noise: at(noise, "pld"), wanted, high, 0.98) * 1e4) / 1e4


def _narrowed(at: Callable[[float], float], wanted: float, high: float, by: float) -> float:
    """Return noise whose ε, ``at(noise)``, is at most ``wanted`` and at least 99.9 percent of it. ``high`` suffices.

    Reduces the noise by the factor ``by`` until ε is too large, then interpolates.
    """
    safe = at(high)
    if safe >= 0.999 * wanted:
        return high
    while (loose := at(low := by * high)) <= wanted:
        high, safe = low, loose
    for _ in range(30):
        if safe >= 0.999 * wanted:
            break
        # ln ε is nearly linear in ln σ; aim slightly below the target, so that both ends converge
        share = (math.log(loose) - math.log(wanted * 0.9995)) / (math.log(loose) - math.log(safe))
        middle = low * (high / low) ** min(max(share, 0.02), 0.98)
        if (value := at(middle)) <= wanted:
            high, safe = middle, value
        else:
            low, loose = middle, value
    return high


def _grouped(spends: Iterable[Spend]) -> tuple[Spend, ...]:
    """Combine steps of the same kind, in a fixed order."""
    counts: Counter[Spend] = Counter()
    for spend in spends:
        counts[spend._replace(steps=1)] += spend.steps
    return tuple(sorted(spend._replace(steps=n) for spend, n in counts.items() if n))


def _only_unit(grouped: Sequence[Spend]) -> Unit:
    if len(units := sorted({spend.unit for spend in grouped})) > 1:
        raise ConfigError(
            f"these spends protect different units ({', '.join(units)}), and their ε do not add up: specify the "
            "unit for which to count them"
        )
    return grouped[0].unit


def _costs(spends: Iterable[Spend], unit: Unit | None) -> tuple[Cost, ...]:
    """Return the costs of the spends for one ``unit``, those of the same kind combined, in a fixed order."""
    grouped = _grouped(spends)
    protected = unit or (_only_unit(grouped) if grouped else UNITS[-1])
    counts: Counter[Cost] = Counter()
    for spend in grouped:
        counts[cost(spend, protected)._replace(steps=1)] += spend.steps
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
    """Return a closed-form bound: all steps as one Gaussian step without sampling (Mironov 2017, proposition 3)."""
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
    """Compute ε by privacy loss distributions of Gaussian steps; each is discretized pessimistically."""
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
        else:  # composed Gaussian steps equal one step with less noise
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
    """Suppress the warnings for orders that do not converge; omitting these only makes ε larger."""
    log = logging.getLogger("absl")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
