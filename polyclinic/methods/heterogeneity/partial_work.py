"""Partial work: late sites do part of their training, and their updates are used.

Li, Sahu, Zaheer, Sanjabi, Talwalkar and Smith, "Federated Optimization in Heterogeneous Networks", MLSys 2020, section
5.2, in which each round a share of the sites does between one epoch and all. https://arxiv.org/abs/1812.06127.
Departure: steps are drawn instead of epochs, so that a single epoch can also be shortened.
"""

from dataclasses import dataclass, replace

import torch

from polyclinic.core.aggregates import Reply
from polyclinic.core.method import MethodWrapper, Request
from polyclinic.core.site import Site
from polyclinic.core.tree import Trees
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.heterogeneity.fednova import FedNova
from polyclinic.methods.optimization.fedavg import FedAvg, State
from polyclinic.methods.optimization.fedprox import FedProx


@dataclass(frozen=True)
class PartialWork(MethodWrapper[State]):
    """Some sites stop early: each round, each is late with probability ``late`` and does only a share of its steps.

    Their updates have full weight, whereas a deadline would discard them.

    Attributes:
        inner: A method with a field ``local``.
        late: The probability; 0.5 and 0.9 in the paper.
        least: The smallest share of the steps that a late site does.
    """

    inner: FedAvg
    late: float = 0.5
    least: float = 0.1

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        late, share = torch.rand(2, generator=site.rng(request.round, "pace")).tolist()
        whole = self.inner.local.count(site.data["train"])
        if late >= self.late or not whole:
            return self.inner.site_update(request, memory, site)
        steps = max(1, round(whole * (self.least + (1 - self.least) * share)))
        return replace(self.inner, local=replace(self.inner.local, steps=steps)).site_update(request, memory, site)


def partial_work(
    task: Task,
    local: LocalTraining,
    *,
    late: float = 0.5,
    least: float = 0.1,
    mu: float = 0.01,
    normalized: bool = False,
    uniform: bool = False,
) -> PartialWork:
    """Compose FedProx or FedNova with sites that do part of their work.

    Args:
        mu: μ, the weight of FedProx's proximal term.
        normalized: Whether to average as FedNova does.
        uniform: Whether all sites have equal weight, instead of in proportion to their training examples.
    """
    kind = FedNova if normalized else FedProx
    return PartialWork(kind(task, local, uniform=uniform, mu=mu), late, least)
