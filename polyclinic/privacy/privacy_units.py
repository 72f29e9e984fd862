"""Whom noise protects: what noise that hides a coarse unit, such as a site, is worth to a finer one inside it.

Noise is calibrated to the *addition or removal* of one unit, which moves a clipped vector of norm at most C by at most
C. A finer unit inside it, such as a patient of the site, moves the same vector from one of norm at most C to another:
by up to 2C. So Gaussian noise of multiplier z counts as z / 2 for the finer unit, and pure ε as 2ε. That holds once,
however many levels lie between, because both vectors stay in the same ball: a record inside a site costs as much as a
patient inside it. The finer unit may then be added, removed or replaced, as long as the coarser one takes part.

With Poisson samples of the coarser unit at rate q the two outputs are mixtures that differ only where the unit was
drawn, P = (1 - q) N(0) + q N(g) and P' = (1 - q) N(0) + q N(g'), with ‖g‖, ‖g'‖ <= C in units of the deviation. By the
advanced joint convexity of the hockey-stick divergence (Borja Balle, Gilles Barthe and Marco Gaboardi, "Privacy
Amplification by Subsampling", NeurIPS 2018, theorem 2, https://arxiv.org/abs/1807.01647), for α >= 1,
α' = 1 + q (α - 1) and β = α' / α,

    H_α'(P, P') = q H_α(N(g), (1 - β) N(0) + β N(g')) <= q H_α(N(0), N(2C)),

which is the *remove* direction at distance 2C with the same rate. It holds with P and P' exchanged, too. For a single
step that is all; ``replacement`` says how steps are composed, which needs α < 1 as well.
"""

import math
from collections.abc import Iterable
from typing import Final, NamedTuple

from polyclinic.errors import ConfigError
from polyclinic.learning.training.dp_sgd import Spend, Unit

UNITS: Final[tuple[Unit, ...]] = ("record", "patient", "site")  # each lies inside the next
LEAST_NOISE, MOST_NOISE = 2.0**-10, 2.0**20
LEAST_RATE, MOST_STEPS, MOST_PURE, MOST_SITES = 1e-9, 10**9, 1e6, 10**6


class Cost(NamedTuple):
    """A spend, counted for one unit.

    Attributes:
        multiplier: The deviation of the noise over what the unit can move. 0 where ``pure`` is given instead.
        rate: The probability with which the unit took part in a step.
        steps: How many steps.
        pure: ε of each step.
        inside: Whether the unit lies inside the one that was sampled, so that it is replaced and not removed.
    """

    multiplier: float
    rate: float
    steps: int
    pure: float
    inside: bool


def cost(spend: Spend, unit: Unit) -> Cost:
    """What ``spend`` costs one ``unit``.

    Raises:
        ValueError: If it protects only something finer.
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
    """Those of a release's spends that a budget for every ``unit`` must pay for, as they are; none if nothing can.

    Noise on the reply as a whole, which hides the site, covers all that is in the reply, so it alone is paid for, even
    if training was private as well: what training returned need not be all that the method sends. Without such noise
    every spend counts, and each must protect the unit or a coarser one.
    """
    given = list(spends)
    chosen = [spend for spend in given if spend.unit == "site"] or given
    enough = all(spend.unit in UNITS[UNITS.index(unit) :] for spend in chosen)
    return chosen if enough else []


def problems(spend: Spend) -> list[str]:
    """Why ``spend`` cannot be accounted for: a sentence each. What a method meters is not trusted."""
    found = []
    if spend.unit not in UNITS:
        found.append(f"the unit must be record, patient or site, not {spend.unit!r}")
    for what, value, least, most in (
        ("rate", spend.rate, LEAST_RATE, 1.0),
        ("steps", spend.steps, 1, MOST_STEPS),
        ("share", spend.share, 1, MOST_SITES),
    ):
        whole = what == "rate" or type(value) is int
        if not (_number(value) and whole and least <= value <= most):
            found.append(
                f"{what} must be {'' if what == 'rate' else 'a whole number '}from {least:g} to {most:g}, not {value!r}"
            )
    if not (_number(spend.pure) and 0 <= spend.pure <= MOST_PURE):
        found.append(f"pure must be from 0 to {MOST_PURE:g}, not {spend.pure!r}")
    elif spend.pure and spend.multiplier != 0:
        found.append(f"a spend of pure ε has the multiplier 0, not {spend.multiplier!r}")
    elif not spend.pure and not (_number(spend.multiplier) and LEAST_NOISE <= spend.multiplier <= MOST_NOISE):
        found.append(f"multiplier must be from {LEAST_NOISE:g} to {MOST_NOISE:g}, not {spend.multiplier!r}")
    return found


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
