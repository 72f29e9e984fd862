"""Guided gradients: sites whose change points against the common direction do not count.

Guan, Yap, Bozoki and Liu's survey (Pattern Recognition 151, 2024) describes, for schizophrenia in structural MRI at
several sites (Fan and others), an aggregation in which only positive weights are used, so that the global direction is
kept. The formula was not at hand. We read it as a weight for each site of max(0, cos(Δ_k, Δ̄)), its agreement with the
mean change Δ̄.
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
    """The mean in which a site counts by the cosine of its update with the plain mean, and not at all below 0.

    Attributes:
        weighted: Whether to multiply by what sites claim to weigh.
    """

    weighted: bool = False

    def aggregate(self, updates: Updates, last: Tree) -> Verdict:
        """Σ a_k Δ_k / Σ a_k with a_k = max(0, ⟨Δ_k, Δ̄⟩ / (‖Δ_k‖ ‖Δ̄‖))"""
        p = (
            updates.weights / updates.weights.sum()
            if self.weighted
            else torch.full_like(updates.weights, 1 / len(updates))
        )
        along = updates.gram @ p
        cosine = along / (updates.norms * (p @ along).clamp_min(0).sqrt()).clamp_min(1e-300)
        guided = cosine.clamp_min(0) * p
        return blended(updates, guided if guided.sum() > 0 else p)


def guided_gradient(task: Task, local: LocalTraining, *, sized: bool = False) -> Robust:
    """FedAvg in which sites count by their agreement with the mean direction.

    Args:
        sized: Whether sites also count in proportion to their examples.
    """
    return Robust(FedAvg(task, local, uniform=not sized), Guided(sized))
