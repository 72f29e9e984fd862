"""FedRep: a representation learned together, a head of one's own, trained in turn.

Collins, Hassani, Mokhtari and Shakkottai, "Exploiting Shared Representations for Personalized Federated Learning",
ICML 2021, Algorithm 1. https://arxiv.org/abs/2102.07078. In each round a site first fits its head to the
representation it received, then takes the representation's share of training with that head held fixed.
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
        head_epochs: τ, passes over the data for the head; the paper takes 10. The representation takes ``epochs``
            of the training settings, 1 in the paper for images.
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
    """FedAvg of the representation; heads stay at the sites and are fitted before it."""
    return Personal(InTurn(task, local, lr, uniform, head_epochs), InHead(task))
