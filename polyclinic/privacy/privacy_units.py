"""Privacy units: the protection that noise for a coarse unit, such as a site, gives to a finer one inside it.

Noise is calibrated to the *addition or removal* of one unit, which moves a clipped vector of norm at most C by at most
C. A finer unit inside it, such as a patient of the site, moves the same vector from one of norm at most C to another:
by up to 2C. So Gaussian noise of multiplier z counts as z / 2 for the finer unit, and pure ε as 2ε. This factor does
not depend on the number of levels between, because both vectors stay in the same ball: a record inside a site costs as
much as a patient inside it. The finer unit may be added, removed or replaced, as long as the coarser one takes part.

With Poisson samples of the coarser unit at rate q the two outputs are mixtures that differ only where the unit was
drawn, P = (1 - q) N(0) + q N(g) and P' = (1 - q) N(0) + q N(g'), with ‖g‖, ‖g'‖ <= C in units of the deviation. By the
advanced joint convexity of the hockey-stick divergence (Borja Balle, Gilles Barthe and Marco Gaboardi, "Privacy
Amplification by Subsampling", NeurIPS 2018, theorem 2, https://arxiv.org/abs/1807.01647), for α >= 1,
α' = 1 + q (α - 1) and β = α' / α,

    H_α'(P, P') = q H_α(N(g), (1 - β) N(0) + β N(g')) <= q H_α(N(0), N(2C)),

which is the *remove* direction at distance 2C with the same rate. It also holds with P and P' exchanged. This suffices
for a single step; ``replacement_accounting`` composes steps, which needs α < 1 as well.
"""

import math
from collections.abc import Iterable
from typing import Final, NamedTuple

from polyclinic.errors import ConfigError
from polyclinic.learning.training.dp_sgd import Spend, Unit

UNITS: Final[tuple[Unit, ...]] = ("record", "patient", "site")  # each is part of the next
LEAST_NOISE, MOST_NOISE = 2.0**-10, 2.0**20
LEAST_RATE, MOST_STEPS, MOST_PURE, MOST_SITES = 1e-9, 10**9, 1e6, 10**6


class Cost(NamedTuple):
    """The cost of a spend for one unit.

    Attributes:
        multiplier: Standard deviation of the noise divided by the unit's largest influence. 0 if ``pure`` is given.
        rate: Probability with which the unit takes part in a step.
        steps: Number of steps.
        pure: ε of each step.
        inside: Whether the unit is part of the sampled one, so that it is replaced and not removed.
    """

    multiplier: float
    rate: float
    steps: int
    pure: float
    inside: bool


def cost(spend: Spend, unit: Unit) -> Cost:
    """Compute the cost of ``spend`` for one ``unit``.

    Raises:
        ValueError: If it protects only a finer unit.
    """
    if (finer := UNITS.index(unit) - UNITS.index(spend.unit)) > 0:
        raise ConfigError(f"noise that hides each {spend.unit} does not protect a {unit}")
    half = finer < 0
    return Cost(
        spend.multiplier / 2 if half else spend.multiplier,
        spend.rate,
        spend.steps,
        2 * spend.pure if half else spend.pure,
        half and spend.rate < 1,
    )


def payable(spends: Iterable[Spend], unit: Unit) -> list[Spend]:
    """Return the spends of a release that a budget for each ``unit`` is charged; empty if it is not protected.

    Noise on the complete reply, which protects the site, covers everything in the reply. It alone is charged, even if
    training was private as well, because a method may send more than the result of training. Without such noise every
    spend is charged, and each must protect the unit or a coarser one.
    """
    given = list(spends)
    chosen = [spend for spend in given if spend.unit == "site"] or given
    enough = all(spend.unit in UNITS[UNITS.index(unit) :] for spend in chosen)
    return chosen if enough else []


def problems(spend: Spend) -> list[str]:
    """Return why ``spend`` cannot be accounted for, one sentence each. A method's metering is not trusted."""
    reasons = []
    if spend.unit not in UNITS:
        reasons.append(f"the unit must be record, patient or site, not {spend.unit!r}")
    for what, value, least, most in (
        ("rate", spend.rate, LEAST_RATE, 1.0),
        ("steps", spend.steps, 1, MOST_STEPS),
        ("share", spend.share, 1, MOST_SITES),
    ):
        integral = what == "rate" or type(value) is int
        if not (_number(value) and integral and least <= value <= most):
            reasons.append(
                f"{what} must be {'' if what == 'rate' else 'a whole number '}from {least:g} to {most:g}, not {value!r}"
            )
    if not (_number(spend.pure) and 0 <= spend.pure <= MOST_PURE):
        reasons.append(f"pure must be from 0 to {MOST_PURE:g}, not {spend.pure!r}")
    elif spend.pure and spend.multiplier != 0:
        reasons.append(f"a spend of pure ε must have multiplier 0, not {spend.multiplier!r}")
    elif not spend.pure and not (_number(spend.multiplier) and LEAST_NOISE <= spend.multiplier <= MOST_NOISE):
        reasons.append(f"multiplier must be from {LEAST_NOISE:g} to {MOST_NOISE:g}, not {spend.multiplier!r}")
    return reasons


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
