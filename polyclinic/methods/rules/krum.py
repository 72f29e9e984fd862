"""Rules of distance: Krum, multi-Krum and Bulyan.

Peva Blanchard, El Mahdi El Mhamdi, Rachid Guerraoui and Julien Stainer, "Machine Learning with Adversaries: Byzantine
Tolerant Gradient Descent", NeurIPS 2017, sections 4 and 5, https://arxiv.org/abs/1703.02757. El Mhamdi, Guerraoui and
Sébastien Rouault, "The Hidden Vulnerability of Distributed Learning in Byzantium", ICML 2018, section 4,
https://arxiv.org/abs/1802.07927. Sites count the same, as there.

The share of corrupt sites is a hyper-parameter, their number f what it gives for the updates at hand.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from polyclinic.core.tree import Tree
from polyclinic.methods.rules.coordinate import mean, middle_of
from polyclinic.methods.rules.order import sort_rows
from polyclinic.methods.rules.rule import Rule, Updates, Verdict, blended, presumed


@dataclass(frozen=True)
class Krum(Rule):
    """The one update that lies closest to its n - f - 2 nearest neighbours.

    It discards what all other sites learned: the noise of a single hospital is the price.

    Attributes:
        corrupt: The share of sites presumed corrupt. Krum needs n ≥ 2f + 3.
    """

    corrupt: float = 0.2

    def aggregate(self, updates: Updates, last: Tree) -> Verdict:
        """argmin_i Σ_{j near i} ‖x_i - x_j‖²"""
        f = presumed(self.corrupt, len(updates), 3, 2, "krum")
        chosen = int(krum_scores(updates.distances, f).argmin())
        return blended(updates, torch.eye(len(updates))[chosen])


@dataclass(frozen=True)
class MultiKrum(Rule):
    """The mean of the m updates of the lowest Krum scores.

    Attributes:
        corrupt: As for ``Krum``.
        keep: m; n - f where it is 0.
    """

    corrupt: float = 0.2
    keep: int = 0

    def aggregate(self, updates: Updates, last: Tree) -> Verdict:
        """1/m Σ x_i over the m lowest scores"""
        n = len(updates)
        f = presumed(self.corrupt, n, 3, 2, "multi-krum")
        kept = krum_scores(updates.distances, f).argsort(stable=True)[: self.keep or n - f]
        return blended(updates, torch.zeros(n).index_fill(0, kept, 1.0))


@dataclass(frozen=True)
class Bulyan(Rule):
    """θ = n - 2f updates chosen by Krum one after another, and of each coordinate the mean of the θ - 2f values
    nearest to their median.

    Attributes:
        corrupt: The share of sites presumed corrupt. Bulyan needs n ≥ 4f + 3, so at most one in ten sites.
    """

    corrupt: float = 0.1

    def aggregate(self, updates: Updates, last: Tree) -> Verdict:
        """Krum n - 2f times without replacement; then the trimmed mean around the median"""
        f = presumed(self.corrupt, len(updates), 3, 4, "bulyan")
        left, chosen = list(range(len(updates))), list[int]()
        for _ in range(len(updates) - 2 * f):
            near = updates.distances[left][:, left]
            chosen.append(left.pop(int(krum_scores(near, f).argmin())))
        few = updates.only(tuple(updates.sites[i] for i in chosen))
        return Verdict(few.by_coordinate(lambda rows: around_median(rows, len(chosen) - 2 * f)), None)


def krum_scores(distances: Tensor, f: int) -> Tensor:
    """Σ ‖x_i - x_j‖² over the n - f - 2 nearest j ≠ i, at least one. Shape [n]."""
    nearest = max(1, len(distances) - f - 2)
    return distances.square().sort(1).values[:, 1 : 1 + nearest].sum(1)


def around_median(rows: list[Tensor], keep: int) -> Tensor:
    """The mean of the ``keep`` values nearest to the median of each column of ``rows``. Shape [c]."""
    ordered = sort_rows(rows)
    centre = middle_of(ordered)
    best, value = torch.full_like(centre, torch.inf), torch.zeros_like(centre)
    for start in range(len(rows) - keep + 1):  # the nearest values lie side by side
        window = ordered[start : start + keep]
        reach = torch.maximum(centre - window[0], window[-1] - centre)
        value = torch.where(reach < best, mean(window), value)
        best = torch.minimum(reach, best)
    return value
