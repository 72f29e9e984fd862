"""Bulyan: repeated Krum, then a trimmed mean around the median.

El Mahdi El Mhamdi, Rachid Guerraoui and Sébastien Rouault, "The Hidden Vulnerability of Distributed Learning in
Byzantium", ICML 2018, section 4, https://arxiv.org/abs/1802.07927. All sites have equal weight, as in the paper.

The fraction of corrupt sites is a hyperparameter; their number f follows from the number of updates.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from polyclinic.core.tree import Tree
from polyclinic.methods.robust.rules.aggregation_rule import Rule, Updates, Verdict, presumed
from polyclinic.methods.robust.rules.coordinate_wise import mean, middle_of
from polyclinic.methods.robust.rules.krum import krum_scores
from polyclinic.methods.robust.rules.site_sorting import sort_rows


@dataclass(frozen=True)
class Bulyan(Rule):
    """Krum selects n − 2f updates one after another; each coordinate is the mean of the values nearest to their median.

    Of θ = n − 2f selected updates, the θ − 2f nearest values are averaged.

    Attributes:
        corrupt: The fraction of sites presumed corrupt. Bulyan needs n ≥ 4f + 3, so at most one in ten sites.
    """

    corrupt: float = 0.1

    def aggregate(self, updates: Updates, last: Tree) -> Verdict:
        """Apply Krum n − 2f times without replacement; then the trimmed mean around the median."""
        f = presumed(self.corrupt, len(updates), 3, 4, "bulyan")
        left, chosen = list(range(len(updates))), list[int]()
        for _ in range(len(updates) - 2 * f):
            near = updates.distances[left][:, left]
            chosen.append(left.pop(int(krum_scores(near, f).argmin())))
        few = updates.only(tuple(updates.sites[i] for i in chosen))
        return Verdict(few.by_coordinate(lambda rows: around_median(rows, len(chosen) - 2 * f)), None)


def around_median(rows: list[Tensor], keep: int) -> Tensor:
    """Return the mean of the ``keep`` values nearest to the median of each column of ``rows``. Shape [c]."""
    ordered = sort_rows(rows)
    center = middle_of(ordered)
    best, value = torch.full_like(center, torch.inf), torch.zeros_like(center)
    for start in range(len(rows) - keep + 1):  # the nearest values lie side by side
        window = ordered[start : start + keep]
        reach = torch.maximum(center - window[0], window[-1] - center)
        value = torch.where(reach < best, mean(window), value)
        best = torch.minimum(reach, best)
    return value
