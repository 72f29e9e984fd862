"""PRR-FL: progressive Fourier aggregation, and mutual distillation between a deputy and a personal model (DET).

Zhen Chen, Meilu Zhu, Chen Yang and Yixuan Yuan, "Personalized Retrogress-Resilient Framework for Real-World Medical
Federated Learning", MICCAI 2021, section 2.2, https://arxiv.org/abs/2110.00394. The aggregation is in ``pfa``.

Departure: the direction of distillation is decided once per round, from both models' macro F1 on the training data,
instead of once per epoch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from polyclinic.core import tree
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.networks.model_tree import initial
from polyclinic.learning.objectives.distillation_loss import Dual
from polyclinic.learning.tasks.task_evaluation import outputs
from polyclinic.methods.aggregation.pfa import PFA


@dataclass(frozen=True)
class PRRFL(PFA):
    """PFA of a deputy model, and a personal model that never leaves the site and with which the site predicts.

    If aggregation degraded the deputy, it learns from the personal model (recover); later both learn from each other
    (exchange), and finally the personal model learns from the deputy (sublimate).

    Attributes:
        low: The deputy recovers while its F1 is below this fraction of the personal model's.
        high: The deputy teaches once its F1 is at least this fraction of the personal model's.
    """

    low: float = 0.7
    high: float = 0.9

    def learn(self, deputy: Tree, round: int, memory: Trees, site: Site) -> tuple[Tree, Trees]:
        """Return the deputy after training together with the personal model, and the memory with the latter."""
        stage = self.stage(deputy, memory, site)
        dual = Dual(self.task, self.task, decision=stage, representation=0.0, adaptive=False)
        rest = memory.get("rest") or tree.select(initial(dual.model, 0), lambda name: name.startswith("projection."))
        own = memory.get("personal", deputy)
        start = {**tree.prefixed("teacher", own), **tree.prefixed("student", deputy), **rest}
        end = self.local.fit(dual, start, site, round)
        kept = {"personal": tree.under("teacher", end), "rest": tree.select(end, rest.__contains__)}
        return tree.under("student", end), {**memory, **kept}

    def stage(self, deputy: Tree, memory: Trees, site: Site) -> tuple[float, float]:
        """Return the distillation weights of (the personal model, the deputy)."""
        if "personal" not in memory:
            return 0.0, 1.0
        f1_deputy, f1_own = (self._f1(params, site) for params in (deputy, memory["personal"]))
        if f1_deputy < self.low * f1_own:
            return 0.0, 1.0  # recover
        return (1.0, 1.0) if f1_deputy < self.high * f1_own else (1.0, 0.0)  # exchange, sublimate

    def _f1(self, params: Tree, site: Site) -> float:
        found = outputs(self.task, params, site.data["train"], site.device)
        return macro_f1(found["score"].argmax(1), found["target"])


def macro_f1(predicted: Tensor, truth: Tensor) -> float:
    """Return the mean of ``2 TP / (2 TP + FP + FN)`` over the classes that are predicted or true."""
    scores = []
    for c in torch.cat([predicted, truth]).unique():
        both = ((predicted == c) & (truth == c)).sum()
        scores.append(float(2 * both / ((predicted == c).sum() + (truth == c).sum())))
    return sum(scores) / len(scores)
