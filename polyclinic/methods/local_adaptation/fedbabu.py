"""FedBABU: the head keeps its random initial values in all rounds, and each site fine-tunes the final model.

Oh, Kim and Yun, "FedBABU: Toward Enhanced Representation for Federated Image Classification", ICLR 2022, Algorithm 1,
https://arxiv.org/abs/2106.06042. The body is trained against one fixed random head, so that all sites learn features in
a common coordinate system. A site that did not train predicts with the body and this head.
"""

from dataclasses import dataclass

from polyclinic.core.aggregates import Reply
from polyclinic.core.method import Request
from polyclinic.core.site import Site
from polyclinic.core.tree import Trees
from polyclinic.learning.tasks.task import InHead, Not, Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.local_adaptation.fine_tuned import FineTuned, Part
from polyclinic.methods.optimization.fedavg import FedAvg


@dataclass(frozen=True)
class BodyOnly(FedAvg):
    """FedAvg of all layers but the head, which is not trained."""

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start, body = request.trees["params"], Not(InHead(self.task))
        end = self.local.fit(self.task, start, site, request.round, trainable=body)
        return Reply({"update": self.update(end, start, site)}), memory


def fedbabu(
    task: Task, local: LocalTraining, *, epochs: int = 5, part: Part = "all", lr: float = 1.0, uniform: bool = False
) -> FineTuned:
    """Compose federated training of the body with fine-tuning at each site.

    Args:
        epochs: Passes of the fine-tuning over the site's training examples; 0 to predict with the fixed head.
        part: The layers to fine-tune: "all", the "head", or the "body".
    """
    return FineTuned(BodyOnly(task, local, lr, uniform), task, local, epochs, part)
