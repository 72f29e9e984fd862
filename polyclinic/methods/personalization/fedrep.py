"""FedRep: a shared representation and private heads, trained in alternation.

Collins, Hassani, Mokhtari and Shakkottai, "Exploiting Shared Representations for Personalized Federated Learning",
ICML 2021, Algorithm 1. https://arxiv.org/abs/2102.07078. In each round a site first fits its head to the received
representation, then trains the representation with that head fixed.
"""

from dataclasses import dataclass, replace

from polyclinic.core.aggregates import Reply
from polyclinic.core.method import Request
from polyclinic.core.site import Site
from polyclinic.core.tree import Trees
from polyclinic.learning.tasks.task import InHead, Not, Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.personalization.partial_personalization import Personal


@dataclass(frozen=True)
class InTurn(FedAvg):
    """FedAvg whose sites train the head first and the representation after it.

    Attributes:
        head_epochs: τ, epochs of training the head; 10 in the paper. The representation takes the ``epochs`` of the
            training settings, 1 in the paper for images.
    """

    head_epochs: int = 10

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start, head = request.trees["params"], InHead(self.task)
        first = replace(self.local, epochs=self.head_epochs, steps=None)
        end = first.fit(self.task, start, site, request.round, trainable=head, slot="head")
        end = self.local.fit(self.task, end, site, request.round, trainable=Not(head))
        return Reply({"update": self.update(end, start, site)}), memory


def fedrep(
    task: Task, local: LocalTraining, *, head_epochs: int = 10, lr: float = 1.0, uniform: bool = False
) -> Personal:
    """Compose the alternating training with heads that stay at the sites."""
    return Personal(InTurn(task, local, lr, uniform, head_epochs), InHead(task))
