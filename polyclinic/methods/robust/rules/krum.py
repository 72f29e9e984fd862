"""Krum and multi-Krum, rules by distance.

Peva Blanchard, El Mahdi El Mhamdi, Rachid Guerraoui and Julien Stainer, "Machine Learning with Adversaries: Byzantine
Tolerant Gradient Descent", NeurIPS 2017, sections 4 and 5, https://arxiv.org/abs/1703.02757. All sites have equal
weight, as in the paper.

The fraction of corrupt sites is a hyperparameter; their number f follows from the number of updates.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from polyclinic.core.tree import Tree
from polyclinic.methods.robust.rules.aggregation_rule import Rule, Updates, Verdict, blended, presumed


@dataclass(frozen=True)
class Krum(Rule):
    """The one update that is closest to its n − f − 2 nearest neighbors.

    The updates of all other sites are discarded, so that the result has the variance of a single hospital.

    Attributes:
        corrupt: The fraction of sites presumed corrupt. Krum needs n ≥ 2f + 3.
    """

    corrupt: float = 0.2

    def aggregate(self, updates: Updates, last: Tree) -> Verdict:
        """Return the update with the smallest ``Σ_{j near i} ‖x_i − x_j‖²``."""
        f = presumed(self.corrupt, len(updates), 3, 2, "krum")
        chosen = int(krum_scores(updates.distances, f).argmin())
        return blended(updates, torch.eye(len(updates))[chosen])


@dataclass(frozen=True)
class MultiKrum(Rule):
    """The mean of the m updates with the lowest Krum scores.

    Honest hospitals whose data differ are the first to be omitted.

    Attributes:
        corrupt: The fraction of sites presumed corrupt. Krum needs n ≥ 2f + 3.
        keep: m; n − f if 0.
    """

    corrupt: float = 0.2
    keep: int = 0

    def aggregate(self, updates: Updates, last: Tree) -> Verdict:
        """Return ``1/m Σ x_i`` over the m lowest scores."""
        n = len(updates)
        f = presumed(self.corrupt, n, 3, 2, "multi-krum")
        kept = krum_scores(updates.distances, f).argsort(stable=True)[: self.keep or n - f]
        return blended(updates, torch.zeros(n).index_fill(0, kept, 1.0))


def krum_scores(distances: Tensor, f: int) -> Tensor:
    """Return ``Σ ‖x_i − x_j‖²`` over the n − f − 2 nearest j ≠ i, at least one. Shape [n]."""
    nearest = max(1, len(distances) - f - 2)
    return distances.square().sort(1).values[:, 1 : 1 + nearest].sum(1)
