"""The geometric median (RFA).

Krishna Pillutla, Sham Kakade and Zaid Harchaoui, "Robust Aggregation for Federated Learning", IEEE Transactions on
Signal Processing 70 (2022), Algorithm 2, https://arxiv.org/abs/1912.13445.

The result lies within the span of the updates, so that coefficients are computed from inner products alone, whatever
the size of the model.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from polyclinic.core.tree import Tree
from polyclinic.methods.robust.rules.aggregation_rule import Rule, Updates, Verdict, blended, median


@dataclass(frozen=True)
class GeometricMedian(Rule):
    """The point with the smallest sum of distances to all updates (RFA), by smoothed Weiszfeld steps.

    Attributes:
        weighted: Whether to use the weights that sites state, as in the paper. A false weight then has an effect.
        steps: Largest number of steps. They need no messages here, whereas the paper takes three, each a round of
            messages.
        smoothing: ν, the distance below which two points are identical, in multiples of the median length, so that the
            rule does not depend on the unit. (The paper's ν is absolute.)
    """

    weighted: bool = False
    steps: int = 1000
    smoothing: float = 1e-6

    def aggregate(self, updates: Updates, last: Tree) -> Verdict:
        """Repeat ``z ← Σ β_i x_i / Σ β_i`` with ``β_i = α_i / max(ν, ‖z − x_i‖)``, from the mean."""
        n, gram = len(updates), updates.gram
        alpha = updates.weights / updates.weights.sum() if self.weighted else torch.full((n,), 1 / n).double()
        nu = self.smoothing * float(median(updates.norms)) + 1e-300
        c = alpha
        for _ in range(self.steps):
            beta = alpha / distance_to(gram, c).clamp_min(nu)
            new = beta / beta.sum()
            if float((new - c).abs().max()) < 1e-12:
                break
            c = new
        return blended(updates, c)


def distance_to(gram: Tensor, c: Tensor) -> Tensor:
    """Return ``‖Σ c_j x_j − x_i‖`` for every i, from inner products. Shape [n]."""
    gap = c - torch.eye(len(c), dtype=torch.float64)
    return ((gap @ gram) * gap).sum(1).clamp_min(0).sqrt()
