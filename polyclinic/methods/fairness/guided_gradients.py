"""Guided gradients: updates that oppose the mean direction have no weight.

Guan, Yap, Bozoki and Liu's survey (Pattern Recognition 151, 2024) describes, for schizophrenia in structural MRI at
several sites (Fan and others), an aggregation that uses only positive weights, so that the global direction is
preserved. The formula was not available. Interpretation: the weight of a site is ``max(0, cos(Δ_k, Δ̄))``, the
agreement of its change with the mean change Δ̄.
"""

from dataclasses import dataclass

import torch

from polyclinic.core.tree import Tree
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.robust.robust_method import Robust
from polyclinic.methods.robust.rules.aggregation_rule import Rule, Updates, Verdict, blended


@dataclass(frozen=True)
class Guided(Rule):
    """The mean in which a site's weight is the cosine of its update with the plain mean, or 0 if that is negative.

    Attributes:
        weighted: Whether to multiply by the weights that the sites state.
    """

    weighted: bool = False

    def aggregate(self, updates: Updates, last: Tree) -> Verdict:
        """Aggregate by ``Σ a_k Δ_k / Σ a_k`` with ``a_k = max(0, ⟨Δ_k, Δ̄⟩ / (‖Δ_k‖ ‖Δ̄‖))``."""
        w = updates.weights
        p = w / w.sum() if self.weighted else torch.full_like(w, 1 / len(updates))
        along = updates.gram @ p
        cosine = along / (updates.norms * (p @ along).clamp_min(0).sqrt()).clamp_min(1e-300)
        guided = cosine.clamp_min(0) * p
        return blended(updates, guided if guided.sum() > 0 else p)


def guided_gradient(task: Task, local: LocalTraining, *, sized: bool = False) -> Robust:
    """Compose FedAvg with the rule of guided gradients.

    Args:
        sized: Whether weights are also proportional to the number of examples.
    """
    return Robust(FedAvg(task, local, uniform=not sized), Guided(sized))
