"""Metering of privacy noise: every metered mechanism calls ``hidden`` just before it adds its noise.

``metered`` records what mechanisms spend, so that a site's policy can charge it to the privacy budget. ``audited``
gives an auditor each value before noise is added, together with the accountant's assumptions about it, and lets the
auditor decide what is released instead. Without either, a mechanism only adds its noise.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, TypeVar

from polyclinic.core.tree import Tree

Unit: TypeAlias = Literal["record", "patient", "site"]
Noise: TypeAlias = Callable[[Tree], Tree]
T = TypeVar("T")


class Spend(NamedTuple):
    """Privacy cost of one or more releases, as an accountant needs it.

    Attributes:
        multiplier: Standard deviation of the Gaussian noise divided by the clipping bound. 0 if ``pure`` is given.
        rate: Probability with which each protected unit takes part in a step.
        steps: Number of steps.
        unit: The unit of protection: a record (one image or row), a patient, or a whole site.
        pure: ε of each step, for mechanisms without Gaussian noise.
        share: Number of sites whose noise is required in each sum; 1 if the site added all of it.
    """

    multiplier: float
    rate: float = 1.0
    steps: int = 1
    unit: Unit = "site"
    pure: float = 0.0
    share: int = 1


@dataclass(frozen=True)
class Use:
    """One use of a mechanism: the value before noise, and the accountant's assumptions.

    Attributes:
        value: The exact value, before noise.
        spend: The cost of this use.
        deviations: Standard deviation of the Gaussian noise on each leaf; if several sites each add a share of the
            noise, that of their total. Empty for mechanisms without Gaussian noise.
        bound: The largest magnitude of a coordinate, for mechanisms that bound each coordinate; else 0.
        sampled: Names of the protected units that were drawn into this use; None if all take part.
    """

    value: Tree
    spend: Spend
    deviations: Mapping[str, float]
    bound: float = 0.0
    sampled: frozenset[object] | None = None


Auditor: TypeAlias = Callable[[Use, Noise], Tree]
"""Returns the value released instead of ``use.value``. It may apply the given noise function to any value."""

_meter: ContextVar[list[Spend] | None] = ContextVar("meter", default=None)
_auditor: ContextVar[Auditor | None] = ContextVar("auditor", default=None)


@contextmanager
def collected(into: ContextVar[list[T] | None]) -> Iterator[list[T]]:
    """Set ``into`` to an empty list within the context, in which values are collected."""
    values: list[T] = []
    token = into.set(values)
    try:
        yield values
    finally:
        into.reset(token)


def metered() -> AbstractContextManager[list[Spend]]:
    """Collect the privacy costs spent within the context, in a list."""
    return collected(_meter)


def meter(spend: Spend) -> None:
    """Append ``spend`` to the innermost ``metered`` list, if any."""
    if (spent := _meter.get()) is not None:
        spent.append(spend)


@contextmanager
def audited(auditor: Auditor) -> Iterator[None]:
    """Let ``auditor`` decide what mechanisms release within the context. For audits only; sites never use it."""
    token = _auditor.set(auditor)
    try:
        yield
    finally:
        _auditor.reset(token)


def hidden(use: Use, noise: Noise) -> Tree:
    """Return ``use.value`` with ``noise`` added or, in an audit, the auditor's value."""
    auditor = _auditor.get()
    return noise(use.value) if auditor is None else auditor(use, noise)
