"""How far a method is from its paper or its published code: numbers that tests measure and a page states.

A function that is decorated with ``departs`` measures one departure. ``tests/methods/departures/test_departures.py``
compares every number with the table in ``docs/results/fidelity.md``; ``python -m tests.methods.departures`` prints the
rows of that table.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyclinic.core import tree
from polyclinic.core.tree import Tree
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.local import LocalTraining

PAGE = Path(__file__).parents[2] / "docs" / "results" / "fidelity.md"
LOCAL = LocalTraining(epochs=1, batch_size=8, lr=0.05)
NONE, LESS = 1e-5, "< 1e-5"
"""The size below which methods agree up to rounding, and how the page states it."""
NAMES = ("site-0", "site-1", "site-2")


@dataclass(frozen=True)
class Departure:
    """One departure of a method.

    Attributes:
        method: The method.
        what: The departure.
        how: What is compared, and in which unit.
        measure: Returns the size.
    """

    method: str
    what: str
    how: str
    measure: Callable[[], float]

    @property
    def row(self) -> str:
        """The row of the table, with the size as it is measured now."""
        size = self.measure()
        return f"| `{self.method}` | {self.what} | {f'{size:.2g}' if size >= NONE else LESS} | {self.how} |"


DEPARTURES: list[Departure] = []
"""All that are measured, in the order of their definition."""


def departs(method: str, what: str, how: str) -> Callable[[Callable[[], float]], Callable[[], float]]:
    """Return a decorator that registers a function as the measurement of a departure."""

    def register(measure: Callable[[], float]) -> Callable[[], float]:
        DEPARTURES.append(Departure(method, what, how, measure))
        return measure

    return register


def table(heading: str) -> list[tuple[str, ...]]:
    """Return the cells of the rows of the table below ``heading`` of the page, without the two rows of its head."""
    section = PAGE.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [tuple(cell.strip() for cell in row.strip("|").split("|")) for row in rows[2:]]


def small(norm: str = "batch", classes: int = 2) -> Classification:
    """A task with a small convolutional network."""
    return Classification(
        Network("cnn", (1, 8, 8), classes, (("depth", 2), ("norm", norm), ("width", 8 if norm == "group" else 4)))
    )


def apart(found: Tree, published: Tree, start: Tree | None = None) -> float:
    """Return the length of the difference of two models, relative to what the published one moved from ``start``."""
    shared = tree.select(found, published.__contains__)
    gap = tree.norm(tree.sub(shared, published))
    moved = published if start is None else tree.sub(published, tree.select(start, published.__contains__))
    return gap / tree.norm(moved)


def moves(method: Any, sites: Any, params: Tree, rounds: int = 1, **options: Any) -> Tree:
    """Return the method's global model after some rounds."""
    from tests.support.few_labels import run

    step, _ = run(method, sites, params, rounds, **options)
    found: Tree = step.state.params
    return found
