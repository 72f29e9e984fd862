"""Coordinate-wise rules: the median and the trimmed mean.

Dong Yin, Yudong Chen, Kannan Ramchandran and Peter Bartlett, "Byzantine-Robust Distributed Learning: Towards Optimal
Statistical Rates", ICML 2018, definitions 1 and 2, https://arxiv.org/abs/1803.01498. All sites have equal weight, as in
the paper.
"""

from dataclasses import dataclass

from torch import Tensor

from polyclinic.core.tree import Tree
from polyclinic.methods.robust.rules.aggregation_rule import Rule, Updates, Verdict, presumed
from polyclinic.methods.robust.rules.site_sorting import sort_rows


@dataclass(frozen=True)
class Median(Rule):
    """Each coordinate's median over sites; the mean of the two middle values if their number is even.

    It tolerates any minority. A site with unusual patients has as little influence as a faulty one.
    """

    def aggregate(self, updates: Updates, last: Tree) -> Verdict:
        """Return ``med_i x_i[j]`` for every coordinate j."""
        return Verdict(updates.by_coordinate(middle), None)


@dataclass(frozen=True)
class TrimmedMean(Rule):
    """Each coordinate's mean over sites without the f largest and the f smallest values.

    Attributes:
        corrupt: The fraction of sites presumed corrupt; f is that fraction of the updates, rounded down.
    """

    corrupt: float = 0.2

    def aggregate(self, updates: Updates, last: Tree) -> Verdict:
        """Return ``Σ_{f < k ≤ n−f} x_(k)[j] / (n − 2f)`` for every coordinate j with ordered values."""
        f = presumed(self.corrupt, len(updates), 1, 2, "the trimmed mean")
        return Verdict(updates.by_coordinate(lambda rows: mean(sort_rows(rows)[f : len(rows) - f])), None)


def middle(rows: list[Tensor]) -> Tensor:
    """Return the median over ``rows``, each [c]. Shape [c]."""
    return middle_of(sort_rows(rows))


def middle_of(ordered: list[Tensor]) -> Tensor:
    """Return the median over ascending rows."""
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    return low if low is high else (low + high) / 2


def mean(rows: list[Tensor]) -> Tensor:
    """Return the mean over ``rows``, each [c], summed from first to last. Shape [c]."""
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    return total / len(rows)
