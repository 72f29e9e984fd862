"""Centered clipping: each site's change of the last aggregate is clipped.

Sai Praneeth Karimireddy, Lie He and Martin Jaggi, "Learning from History for Byzantine Robust Optimization", ICML 2021,
equation CC, https://arxiv.org/abs/2012.10333.

The result lies within the span of the updates and the last aggregate, so that coefficients are computed from inner
products.
"""

from dataclasses import dataclass

import torch

from polyclinic.core.tree import Tree
from polyclinic.methods.robust.rules.aggregation_rule import Rule, Updates, Verdict, median
from polyclinic.methods.robust.rules.geometric_median import distance_to


@dataclass(frozen=True)
class CentredClipping(Rule):
    """The last aggregate plus the mean of the sites' differences from it, each clipped to length τ.

    Departure: the sites send their method's updates, whereas the paper has them send momentum.

    Attributes:
        tau: τ; if 0, the median distance from the last aggregate, so that half of the sites are clipped at the first
            step.
        steps: L, the number of repetitions, each from the last result.
    """

    tau: float = 0.0
    steps: int = 3

    @property
    def remembers(self) -> bool:
        """True: the rule starts from the last aggregate."""
        return True

    def aggregate(self, updates: Updates, last: Tree) -> Verdict:
        """Repeat ``v ← v + 1/n Σ (x_i − v) · min(1, τ / ‖x_i − v‖)`` from the last aggregate."""
        n = len(updates)
        points = self._beside(updates, last) if last else updates
        c = torch.zeros(len(points), dtype=torch.float64)
        c[n:] = 1.0
        far = distance_to(points.gram, c)[:n]
        tau = self.tau or float(median(far))
        for _ in range(self.steps):
            pull = (tau / distance_to(points.gram, c)[:n].clamp_min(1e-300)).clamp_max(1.0) / n
            c = c * (1 - pull.sum())
            c[:n] += pull
        return Verdict(points.blend(c), dict(zip(updates.sites, c[:n].tolist(), strict=True)))

    def _beside(self, updates: Updates, last: Tree) -> Updates:
        """Return the updates and, after them, the last aggregate."""
        one = torch.ones(1, dtype=torch.float64)
        return Updates(
            {**updates.trees, "~last": last}, torch.cat([updates.weights, one]), torch.cat([updates.factors, one])
        )
