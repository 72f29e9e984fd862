"""Ditto: a personal model beside the global one.

Li, Hu, Beirami and Smith, "Ditto: Fair and Robust Federated Learning Through Personalization", ICML 2021, Algorithm 1.
https://arxiv.org/abs/2012.04221. The personal model takes as many steps a round as the global one; there, s may differ.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from polyclinic.core.method import Ask, Job, Method
from polyclinic.core.site import Site
from polyclinic.core.stats import Reply
from polyclinic.core.tree import Tree, Trees
from polyclinic.methods.fedavg import FedAvg
from polyclinic.tasks.local import Local, Proximal
from polyclinic.tasks.task import Batch, Task


@dataclass(frozen=True)
class Ditto(Method[Any]):
    """Any method whose ask carries ``params``, and at each site a personal model that is drawn towards them.

    What the sites send, and so the global model, is what it would be without. A site that faces malicious others
    loses at most its neighbours' help, which is why the personal models are robust as well as fair.

    Attributes:
        lam: λ, how strongly the personal model is drawn towards the global one. 0 trains it alone. The paper chooses
            it for each data set, between 0.01 and 2.
    """

    inner: Method[Any]
    task: Task
    local: Local = Local()
    lam: float = 0.1

    @property
    def jobs(self) -> tuple[Job, ...]:
        return self.inner.jobs

    def init(self, params: Tree) -> Any:
        return self.inner.init(params)

    def ask(self, state: Any) -> Ask | None:
        return self.inner.ask(state)

    def site_update(self, ask: Ask, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        reply, memory = self.inner.site_update(ask, memory, site)
        w = {name: leaf.to(site.device) for name, leaf in ask.trees["params"].items()}
        towards = Proximal(self.lam)

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            return self.task.loss(model, batch) + towards(model, w)  # h(v; w) = F(v) + λ/2 · ‖v − w‖²

        v = memory.get("personal", ask.trees["params"])
        v = self.local.fit(self.task, v, site, ask.round, loss=loss, slot="personal")
        return reply, {**memory, "personal": v}

    def server_update(self, state: Any, reply: Reply, server: Site) -> Any:
        return self.inner.server_update(state, reply, server)

    def model_at(self, ask: Ask, memory: Trees) -> Tree:
        return memory["personal"] if "personal" in memory else self.inner.model_at(ask, memory)

    def trial(self, state: Any) -> Ask:
        return self.inner.trial(state)


def ditto(task: Task, local: Local, *, lam: float = 0.1, lr: float = 1.0, uniform: bool = False) -> Ditto:
    """FedAvg, with a personal model at each site that is drawn towards the global one."""
    return Ditto(FedAvg(task, local, lr, uniform), task, local, lam)
