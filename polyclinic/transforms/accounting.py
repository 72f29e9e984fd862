"""What privacy was spent, and what a wanted ε costs.

The figure that is signed comes from privacy loss distributions, which are tight: Antti Koskela, Joonas Jälkö and Antti
Honkela, "Computing Tight Differential Privacy Guarantees Using FFT", AISTATS 2020, https://arxiv.org/abs/1906.03049, as
computed by Google's dp-accounting. Beside it stands Rényi's, an upper bound that is quick: Ilya Mironov, Kunal Talwar
and Li Zhang, "Rényi Differential Privacy of the Sampled Gaussian Mechanism", 2019, https://arxiv.org/abs/1908.10530.

Two data sets are neighbours where one has a unit more: a record, a patient, or a site, as each spend says; a site that
is not there is one that sends zeros. (Two different data sets of one site are twice as far apart, and cost more.) Steps
on Poisson samples are amplified, because who was sampled stays secret at the site. Which sites a round asked is no
secret to the server, so a cohort amplifies nothing.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

from polyclinic.tasks.dpsgd import Spend

# Of the discretised privacy loss: ε is exact to about as much, and never too small.
INTERVALS = {"pld": 1e-4, "coarse": 1e-3}


class BadPlan(ValueError):
    """A budget that cannot be kept, or planned, as it was asked for."""


def epsilon(spends: Iterable[Spend], delta: float) -> float:
    """ε at ``delta`` of all ``spends`` together, by privacy loss distributions; infinite for a spend without noise.

    Raises:
        ValueError: Where the spends protect different units, whose ε do not add up, or ``delta`` is no probability.
    """
    return _epsilon(_grouped(spends), _checked(delta), "pld")


def epsilon_rdp(spends: Iterable[Spend], delta: float) -> float:
    """The same by Rényi divergences: quicker, and 7 to 35 per cent larger."""
    return _epsilon(_grouped(spends), _checked(delta), "rdp")


class Statement(NamedTuple):
    """An ε with all that it means nothing without.

    Attributes:
        epsilon: By privacy loss distributions.
        epsilon_rdp: By Rényi divergences.
        delta: δ.
        unit: Who is protected.
        spends: What was spent.
    """

    epsilon: float
    epsilon_rdp: float
    delta: float
    unit: str
    spends: tuple[Spend, ...]

    def __str__(self) -> str:
        """One sentence for run, report and journal."""
        steps = "; ".join(_said(spend) for spend in self.spends) or "nothing was released"
        return (f"ε = {self.epsilon:.3f} at δ = {self.delta:g} for every {self.unit} (add or remove one; PLD, and "
                f"{self.epsilon_rdp:.3f} by RDP): {steps}")  # fmt: skip


def statement(spends: Iterable[Spend], delta: float) -> Statement:
    """What ``spends`` come to."""
    grouped = _grouped(spends)
    unit = grouped[0].unit if grouped else "unit"
    return Statement(epsilon(grouped, delta), epsilon_rdp(grouped, delta), delta, unit, grouped)


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
    spends = (Spend(noise, rate, total),)
    return Plan(noise, _epsilon(spends, delta, "pld"), _epsilon(spends, delta, "rdp"), delta, rate, rounds, total,
                noise / batch)  # fmt: skip


def rounds_within(epsilon: float, delta: float, noise: float, rate: float, *, steps: int = 1) -> int:
    """How many rounds of ``steps`` steps stay within ``epsilon``; 0 where not even one does."""

    def fits(rounds: int) -> bool:
        spends = (Spend(noise, rate, rounds * steps),)
        return any(_epsilon(spends, _checked(delta), by) <= epsilon for by in ("rdp", "pld"))  # the quick one first

    if not fits(1):
        return 0
    low, high = 1, 2
    while high < 2**24 and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def curve(epsilons: Sequence[float], delta: float, rate: float, rounds: int, *, steps: int = 1,
          batch: float = 1.0) -> list[Plan]:  # fmt: skip
    """A plan for each ε: how much noise, and with it accuracy, each costs."""
    return [plan(wanted, delta, rate, rounds, steps=steps, batch=batch) for wanted in epsilons]


def _least_noise(wanted: float, delta: float, rate: float, steps: int) -> float:
    """The noise whose ε is ``wanted``, or at most a thousandth less."""

    def at(noise: float, by: str) -> float:
        return _epsilon((Spend(noise, rate, steps),), delta, by)

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


def _said(spend: Spend) -> str:
    if spend.pure:
        return f"{spend.steps} releases of ε = {spend.pure:g} each"
    sample = "everyone" if spend.rate == 1 else f"a Poisson sample of q = {spend.rate:.4g}"
    return f"{spend.steps} steps on {sample} with noise σ = {spend.multiplier:g}"


def _grouped(spends: Iterable[Spend]) -> tuple[Spend, ...]:
    """Steps of the same kind, counted together, in a fixed order."""
    counts: Counter[Spend] = Counter()
    for spend in spends:
        counts[spend._replace(steps=1)] += spend.steps
    if len(units := sorted({spend.unit for spend in counts})) > 1:
        raise ValueError(f"these spends protect different units ({', '.join(units)}), and their ε do not add up: keep "
                         "a ledger for each")  # fmt: skip
    return tuple(sorted(spend._replace(steps=n) for spend, n in counts.items() if n))


def _checked(delta: float) -> float:
    if not 0 < delta < 1:
        raise ValueError(f"delta must be between 0 and 1, not {delta}")
    return delta


@lru_cache(maxsize=4096)
def _epsilon(spends: tuple[Spend, ...], delta: float, by: str) -> float:
    if any(spend.multiplier <= 0 and spend.pure <= 0 for spend in spends):
        return math.inf
    pure = sum(spend.pure * spend.steps for spend in spends if spend.pure)
    normal = [spend for spend in spends if not spend.pure]
    if not normal:
        return pure
    library = _library()
    accountant = library.rdp.RdpAccountant() if by == "rdp" else (
        library.pld.PLDAccountant(value_discretization_interval=INTERVALS[by]))  # fmt: skip
    with _quiet():
        for spend in normal:
            event = library.GaussianDpEvent(spend.multiplier)
            if spend.rate < 1:
                event = library.PoissonSampledDpEvent(spend.rate, event)
            accountant.compose(event, spend.steps)
        return max(0.0, float(accountant.get_epsilon(delta))) + pure


def _library() -> Any:
    try:
        import dp_accounting
        from dp_accounting import pld, rdp
    except ImportError as error:
        raise ImportError("privacy accounting needs a package: pip install polyclinic[privacy]") from error
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
