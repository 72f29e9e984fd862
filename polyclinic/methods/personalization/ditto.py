"""Ditto: a personal model regularized towards the global one.

Li, Hu, Beirami and Smith, "Ditto: Fair and Robust Federated Learning Through Personalization", ICML 2021, Algorithm 1.
https://arxiv.org/abs/2012.04221. Departure: the personal model takes as many steps per round as the global one; in the
paper, s may differ.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from polyclinic.core.aggregates import Reply
from polyclinic.core.method import Method, MethodWrapper, Request
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.batch import Batch
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining, Proximal
from polyclinic.methods.optimization.fedavg import FedAvg


@dataclass(frozen=True)
class Ditto(MethodWrapper[Any]):
    """Any method whose request has ``params``, and at each site a personal model regularized towards them.

    The personal model v minimizes ``F(v) + λ/2 · ‖v − w‖²``. The replies, and therefore the global model w, are those
    of the inner method. Malicious sites can affect a personal model only through w.

    Attributes:
        lam: λ, the weight of the proximal term; 0 trains the personal model alone. The paper chooses it for each data
            set, between 0.01 and 2.
    """

    inner: Method[Any]
    task: Task
    local: LocalTraining = LocalTraining()
    lam: float = 0.1

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        reply, memory = self.inner.site_update(request, memory, site)
        w = {name: leaf.to(site.device) for name, leaf in request.trees["params"].items()}
        towards = Proximal(self.lam)

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            return self.task.loss(model, batch) + towards(model, w)  # h(v; w) = F(v) + λ/2 · ‖v − w‖²

        v = memory.get("personal", request.trees["params"])
        v = self.local.fit(self.task, v, site, request.round, loss=loss, slot="personal")
        return reply, {**memory, "personal": v}

    def site_model(self, request: Request, memory: Trees) -> Tree:
        return memory["personal"] if "personal" in memory else self.inner.site_model(request, memory)


def ditto(task: Task, local: LocalTraining, *, lam: float = 0.1, lr: float = 1.0, uniform: bool = False) -> Ditto:
    """Compose FedAvg with a personal model at each site that is regularized towards the global one."""
    return Ditto(FedAvg(task, local, lr, uniform), task, local, lam)
