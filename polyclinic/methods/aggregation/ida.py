"""Inverse distance aggregation.

Yousef Yeganeh, Azade Farshad, Nassir Navab and Shadi Albarqouni, "Inverse Distance Aggregation for Federated Learning
with Non-IID Data", DART at MICCAI 2020, equations 3 to 6, https://arxiv.org/abs/2008.07665.

Distances are between weights. Running statistics, which have another scale, are excluded.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.method import Request
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError
from polyclinic.learning.tasks.task import InRunningStatistics, Not, Task
from polyclinic.learning.tasks.task_evaluation import outputs
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.robust.robust_method import Robust
from polyclinic.methods.robust.rules.aggregation_rule import Rule, Updates, Verdict, blended


@dataclass(frozen=True)
class InverseDistance(Rule):
    """The mean in which a site's weight is the inverse distance of its model from the plain mean of all.

    Attributes:
        weighted: Whether to multiply by the weights that the sites state.
        counts: Selects the leaves that count in the distance; None for all.
    """

    weighted: bool = False
    counts: Callable[[str], bool] | None = None

    def aggregate(self, updates: Updates, last: Tree) -> Verdict:
        """Aggregate with ``α_k ∝ 1 / ‖θ̄ − θ_k‖₁``, normalized to sum to 1."""
        distance = torch.zeros(len(updates), dtype=torch.float64)
        for key, _, block in updates.blocks():
            if self.counts is None or self.counts(key.partition("/")[2]):
                wide = block.double() * updates.factors[:, None]
                distance += (wide - wide.mean(0)).abs().sum(1)
        near = 1 / distance.clamp_min(1e-12 * float(distance.max()) + 1e-300)
        return blended(updates, near * updates.weights if self.weighted else near)


@dataclass(frozen=True)
class ByError(FedAvg):
    """FedAvg whose site weights are 1 / training accuracy, against overfitting (the paper's INTRAC).

    The accuracy is that of the site's own model after training, and at least that of guessing.
    """

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start, data = request.trees["params"], site.data["train"]
        end = self.local.fit(self.task, start, site, request.round)
        found = outputs(self.task, end, data, site.device)
        accuracy = float((found["score"].argmax(1) == found["target"]).float().mean())
        weight = self.site_weight(site) / max(1 / found["score"].shape[1], accuracy)
        return Reply({"update": WeightedMean.of(tree.sub(end, start), weight)}), memory


def ida(task: Task, local: LocalTraining, *, sized: bool = False, intrac: bool = False) -> Robust:
    """Compose FedAvg with the inverse-distance rule, and with INTRAC weights if asked.

    Args:
        sized: Whether weights are also proportional to the number of examples.
        intrac: Whether weights are also divided by the training accuracy.

    Raises:
        ConfigError: If ``intrac`` is set for a task without an accuracy.
    """
    if intrac and task.kind != "classification":
        raise ConfigError(f"intrac = true needs an accuracy, which {task.kind} does not have: leave it out")
    inner = ByError(task, local, uniform=not sized) if intrac else FedAvg(task, local, uniform=not sized)
    return Robust(inner, InverseDistance(sized or intrac, Not(InRunningStatistics(task))))
