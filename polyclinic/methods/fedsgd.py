"""FedSGD: the limit of FedAvg in which a round is one full-batch gradient.

McMahan, Moore, Ramage, Hampson and Agüera y Arcas, "Communication-Efficient Learning of Deep Networks from
Decentralized Data", AISTATS 2017, section 2. https://arxiv.org/abs/1602.05629.
"""

from dataclasses import dataclass

import torch

from polyclinic.core import tree
from polyclinic.core.method import Ask
from polyclinic.core.site import Site
from polyclinic.core.stats import Mean, Reply
from polyclinic.core.tree import Trees
from polyclinic.methods.fedavg import FedAvg
from polyclinic.tasks.local import Local, seeded
from polyclinic.tasks.model import params_of
from polyclinic.tasks.task import Task, borrow


@dataclass(frozen=True)
class FedSGD(FedAvg):
    """Sites send one full-batch gradient; the server takes the step.

    Attributes:
        chunk: How many examples are held at once. The gradient is that of all; batch normalisation, where a model
            has it, sees chunks.
    """

    chunk: int = 256

    def site_update(self, ask: Ask, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start, data = ask.trees["params"], site.data["train"]
        model = borrow(self.task, start, site.device)
        with seeded(site.rng(ask.round, "gradient"), site.device):
            for chunk in torch.arange(len(data)).split(self.chunk):
                x, y = data[chunk]
                share = len(chunk) / len(data)
                (self.task.loss(model, (x.to(site.device), y.to(site.device))) * share).backward()
        statistics = tree.sub(params_of(model), start)  # 0 for everything that a gradient moves
        # w ← w − η g
        steps = {name: -self.local.lr * p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
        return Reply({"update": Mean.of({**statistics, **steps}, self.weight(site))}), memory


def fedsgd(task: Task, local: Local, *, lr: float = 1.0, uniform: bool = False) -> FedSGD:
    """One full-batch gradient a round; its step is the training's ``lr`` times this ``lr``."""
    return FedSGD(task, local, lr, uniform)
