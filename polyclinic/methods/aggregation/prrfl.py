"""PRR-FL: progressive Fourier aggregation, and a deputy and a personal model that teach one another (DET).

Zhen Chen, Meilu Zhu, Chen Yang and Yixuan Yuan, "Personalized Retrogress-Resilient Framework for Real-World Medical
Federated Learning", MICCAI 2021, section 2.2, https://arxiv.org/abs/2110.00394. The aggregation is in ``pfa``.

Departure. Which model teaches which is decided once a round, from both models' macro F1 on the training data, not once
an epoch.
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
    """PFA of a deputy, beside a personal model that never leaves and with which the site predicts.

    After an exchange that threw the deputy back it learns from the personal model (recover), then both from each other
    (exchange), then the personal model from the deputy (sublimate).

    Attributes:
        low: Below this part of the personal model's F1 the deputy recovers; ``high``: from here on it teaches.
    """

    low: float = 0.7
    high: float = 0.9

    def learn(self, deputy: Tree, round: int, memory: Trees, site: Site) -> tuple[Tree, Trees]:
        """The deputy after training beside the personal model, and the memory with that."""
        stage = self.stage(deputy, memory, site)
        dual = Dual(self.task, self.task, decision=stage, representation=0.0, adaptive=False)
        rest = memory.get("rest") or tree.select(initial(dual.model, 0), lambda name: name.startswith("projection."))
        own = memory.get("personal", deputy)
        start = {**tree.prefixed("teacher", own), **tree.prefixed("student", deputy), **rest}
        end = self.local.fit(dual, start, site, round)
        kept = {"personal": tree.under("teacher", end), "rest": tree.select(end, rest.__contains__)}
        return tree.under("student", end), {**memory, **kept}

    def stage(self, deputy: Tree, memory: Trees, site: Site) -> tuple[float, float]:
        """What (the personal model, the deputy) learns from the other."""
        if "personal" not in memory:
            return 0.0, 1.0
        f1_deputy, f1_own = (self._f1(params, site) for params in (deputy, memory["personal"]))
        if f1_deputy < self.low * f1_own:
            return 0.0, 1.0  # recover
        return (1.0, 1.0) if f1_deputy < self.high * f1_own else (1.0, 0.0)  # exchange, sublimate

    def _f1(self, params: Tree, site: Site) -> float:
        found = outputs(self.task, params, site.data["train"], site.device)
        return macro_f1(found["score"].argmax(1), found["target"])


def macro_f1(said: Tensor, truth: Tensor) -> float:
    """The mean over classes of 2 TP / (2 TP + FP + FN), of the classes that were said or true."""
    scores = []
    for c in torch.cat([said, truth]).unique():
        both = ((said == c) & (truth == c)).sum()
        scores.append(float(2 * both / ((said == c).sum() + (truth == c).sum())))
    return sum(scores) / len(scores)
