"""Where privacy noise is added and counted: every metered mechanism passes through ``hidden`` just before its noise.

``metered`` counts what mechanisms spend, so that a site's policy can pay for it. ``audited`` lets an auditor see each
value that is about to be hidden, together with what the accountant assumes of it, and decide what is released in its
place. Where nobody counts and nobody audits, a mechanism adds its noise and nothing else happens.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from polyclinic.core.tree import Tree

Unit: TypeAlias = Literal["record", "patient", "site"]
Noise: TypeAlias = Callable[[Tree], Tree]


class Spend(NamedTuple):
    """What some releases cost in privacy: all that an accountant needs to know.

    Attributes:
        multiplier: The deviation of the normal noise over the clipping bound. 0 where ``pure`` is given instead.
        rate: The probability with which each protected unit took part in a step.
        steps: How many steps.
        unit: Who is protected: a record (one image or row), a patient, or a whole site.
        pure: ε of each step, for mechanisms that are not normal noise.
        share: How many sites' noise is counted on in each sum; 1 where the site added all of it by itself.
    """

    multiplier: float
    rate: float = 1.0
    steps: int = 1
    unit: Unit = "site"
    pure: float = 0.0
    share: int = 1


@dataclass(frozen=True)
class Use:
    """One use of a mechanism: what it is about to hide, and what its accountant assumes.

    Attributes:
        value: The exact value, before noise.
        spend: What this one use costs.
        deviations: The standard deviation of the normal noise on each leaf. Where several sites add a share of the
            noise each, that of the whole noise. Empty for mechanisms that are not normal noise.
        bound: The largest size of a coordinate, for mechanisms that bound each coordinate; else 0.
        sampled: The protected units that were drawn into this use, by name; None where all take part.
    """

    value: Tree
    spend: Spend
    deviations: Mapping[str, float]
    bound: float = 0.0
    sampled: frozenset[object] | None = None


Auditor: TypeAlias = Callable[[Use, Noise], Tree]
"""Returns what is released in place of ``use.value``. It may call the noise it is given, on any value."""

_meter: ContextVar[list[Spend] | None] = ContextVar("meter", default=None)
_auditor: ContextVar[Auditor | None] = ContextVar("auditor", default=None)


@contextmanager
def metered() -> Iterator[list[Spend]]:
    """A list that fills with what is spent within."""
    spent: list[Spend] = []
    token = _meter.set(spent)
    try:
        yield spent
    finally:
        _meter.reset(token)


def meter(spend: Spend) -> None:
    """Adds ``spend`` to the innermost ``metered`` list, if there is one."""
    if (spent := _meter.get()) is not None:
        spent.append(spend)


@contextmanager
def audited(auditor: Auditor) -> Iterator[None]:
    """Lets ``auditor`` decide what mechanisms release within. For audits only: no site runs under one."""
    token = _auditor.set(auditor)
    try:
        yield
    finally:
        _auditor.reset(token)


def hidden(use: Use, noise: Noise) -> Tree:
    """``use.value`` with ``noise`` added; or, under an audit, what the auditor makes of it."""
    auditor = _auditor.get()
    return noise(use.value) if auditor is None else auditor(use, noise)
