"""Federated averaging, and what is one step from it.

FedAvg: McMahan, Moore, Ramage, Hampson and Agüera y Arcas, "Communication-Efficient Learning of Deep Networks from
Decentralized Data", AISTATS 2017, Algorithm 1. https://arxiv.org/abs/1602.05629. Sites send changes instead of
models, which is the same mean and lets the server take a step of another length.

FedSGD is the same paper's limit of one full-batch gradient a round.

FedProx: Li, Sahu, Zaheer, Sanjabi, Talwalkar and Smith, "Federated Optimization in Heterogeneous Networks", MLSys 2020,
Algorithm 2 and equation 2. https://arxiv.org/abs/1812.06127.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from polyclinic.core import tree
from polyclinic.core.method import Ask, Method
from polyclinic.core.site import Site
from polyclinic.core.state import savable
from polyclinic.core.stats import Mean, Reply
from polyclinic.core.tree import Tree, Trees
from polyclinic.tasks.local import Local, Proximal, seeded
from polyclinic.tasks.model import params_of
from polyclinic.tasks.task import Task, borrow


@savable
class State(NamedTuple):
    """What the server remembers between rounds."""

    round: int
    params: Tree


@dataclass(frozen=True)
class FedAvg(Method[State]):
    """Sites train from the server's model; the server moves by the mean of their changes.

    Attributes:
        lr: The server's step along the mean change, 1 for plain averaging.
        uniform: Whether every site counts the same, instead of in proportion to its examples.
    """

    task: Task
    local: Local = Local()
    lr: float = 1.0
    uniform: bool = False

    def init(self, params: Tree) -> State:
        return State(0, params)

    def ask(self, state: State) -> Ask:
        return Ask(state.round, {"params": state.params})

    def site_update(self, ask: Ask, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start = ask.trees["params"]
        end = self.local.fit(self.task, start, site, ask.round)
        return Reply({"update": Mean.of(tree.sub(end, start), self.weight(site))}), memory

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        change = tree.scale(reply.mean("update").value, self.lr)
        return State(state.round + 1, tree.shift(state.params, change))

    def weight(self, site: Site) -> float:
        """What ``site`` counts in the mean."""
        return 1.0 if self.uniform else float(len(site.data["train"]))


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


def fedavg(task: Task, local: Local, *, lr: float = 1.0, uniform: bool = False) -> FedAvg:
    """Federated averaging."""
    return FedAvg(task, local, lr, uniform)


def fedsgd(task: Task, local: Local, *, lr: float = 1.0, uniform: bool = False) -> FedSGD:
    """One full-batch gradient a round; its step is the training's ``lr`` times this ``lr``."""
    return FedSGD(task, local, lr, uniform)


def fedprox(task: Task, local: Local, *, mu: float = 0.01, lr: float = 1.0, uniform: bool = False) -> FedAvg:
    """FedAvg whose sites are held near where they started, by μ/2 · ‖w − w₀‖².

    Args:
        mu: μ, the pull towards where a site started; from 0.001 to 1 in the paper.
    """
    return FedAvg(task, local.with_penalty(Proximal(mu)), lr, uniform)
