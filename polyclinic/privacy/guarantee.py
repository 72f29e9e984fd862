"""Wording of privacy guarantees and their assumptions, shared by terminal, report, journal and record."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from polyclinic.learning.training.dp_sgd import Spend, Unit
from polyclinic.privacy.privacy_units import UNITS, cost

COVERS = "training data only: scores of validation and test patients that a site sends are not covered"


class Guarantee(NamedTuple):
    """The unit and assumptions of an ε.

    Attributes:
        unit: The unit of protection.
        inside: The coarser units, ``patient`` or ``site``, to which noise was calibrated and which contain ``unit``.
        exact: Whether some noise was calibrated to ``unit`` itself.
        share: The largest number of sites whose noise a sum requires; 1 if each site adds all of it.
        sampled: Whether the spends include steps on Poisson samples.
    """

    unit: str
    inside: tuple[str, ...]
    exact: bool
    share: int
    sampled: bool

    @property
    def adjacency(self) -> str:
        """The adjacency relation of the data sets that ε compares."""
        if self.inside and not self.exact:
            return f"replace, add or remove one {self.unit} inside a {' or '.join(self.inside)} that takes part"
        return f"add or remove one {self.unit}"

    @property
    def assumptions(self) -> tuple[str, ...]:
        """The assumptions, one clause each."""
        assumptions = [f"the number of {self.unit}s counts as public"]
        if self.sampled:
            assumptions.append("who is in a Poisson sample stays secret")
        if self.share > 1:
            assumptions.append(
                f"each sum holds the noise of at least {self.share} sites that keep it secret; with k of them working "
                f"with the server the noise is that of {self.share} - k"
            )
        return tuple(assumptions)

    @property
    def short(self) -> str:
        """The unit and adjacency, to follow an ε on one line."""
        return f"per {self.unit} ({self.adjacency})"

    def facts(self) -> dict[str, Any]:
        """Return the guarantee as plain values for records and journals."""
        return {"unit": self.unit, "adjacency": self.adjacency, "assumes": list(self.assumptions)}


def guarantee(spends: Iterable[Spend], unit: Unit) -> Guarantee:
    """Return the guarantee of ``spends`` for one ``unit``."""
    given = list(spends)
    units = {spend.unit for spend in given}
    return Guarantee(
        unit,
        tuple(coarse for coarse in UNITS if coarse in units - {unit}),
        unit in units,
        max((spend.share for spend in given), default=1),
        any(spend.rate < 1 for spend in given),
    )


def described(spend: Spend, unit: Unit) -> str:
    """Describe a spend, and its equivalent for one ``unit``.

    Raises:
        ValueError: If it protects only a finer unit.
    """
    counted, plural = cost(spend, unit), "" if spend.steps == 1 else "s"
    if spend.pure:
        text, amount = f"{spend.steps} release{plural} of ε = {spend.pure:g} each", f"ε = {counted.pure:g}"
    else:
        sample = "everyone" if spend.rate == 1 else f"a Poisson sample of q = {spend.rate:.4g}"
        text = f"{spend.steps} step{plural} on {sample} with noise σ = {spend.multiplier:g}"
        amount = f"σ = {counted.multiplier:g}"
    text += f" (a part from each of {spend.share} sites)" if spend.share > 1 else ""
    return text if spend.unit == unit else f"{text} for a {spend.unit}, which is {amount} for a {unit} inside"


def sentence(epsilon: str, delta: str, unit: str, adjacency: str, assumes: Iterable[str], how: str = "") -> str:
    """Return a sentence with an ε, followed by its assumptions and coverage.

    Args:
        epsilon: ε as text, rounded up.
        delta: δ as text.
        unit: The unit of protection.
        adjacency: The adjacency relation.
        assumes: The assumptions.
        how: Description of the accountant and its inputs.
    """
    text = f"ε = {epsilon} at δ = {delta} for every {unit} (adjacency: {adjacency}){how}."
    return f"{text} {_besides(assumes)}"


def meaning(unit: str, adjacency: str, assumes: Iterable[str]) -> str:
    """Return the sentences without a number, for use below a table."""
    return f"ε is for every {unit} (adjacency: {adjacency}). {_besides(assumes)}"


def _besides(assumes: Iterable[str]) -> str:
    assumed = "; ".join(assumes)
    return f"{f'Assumed: {assumed}. ' if assumed else ''}Covers {COVERS}."
