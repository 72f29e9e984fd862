"""Adaptive optimizers at the server: FedAvgM, FedAdagrad, FedAdam, FedYogi.

Reddi, Charles, Zaheer, Garrett, Rush, Konečný, Kumar and McMahan, "Adaptive Federated Optimization", ICLR 2021,
Algorithm 2. https://arxiv.org/abs/2003.00295. FedAvgM: Hsu, Qi and Brown, 2019, https://arxiv.org/abs/1909.06335.
Running statistics are not weights and are updated by the plain mean.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply
from polyclinic.core.method import Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.networks.model_tree import trainable
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.base.site_weights import SizeWeighted
from polyclinic.methods.optimization.fedavg import FedAvg


@savable("fedopt.State", 1)
class State(NamedTuple):
    """The model, the first moment m and, for adaptive steps, the second moment v of the trained leaves."""

    round: int
    params: Tree
    m: Tree
    v: Tree


@dataclass(frozen=True)
class FedOpt(SizeWeighted[State]):
    """FedAvg whose server applies an optimizer to the mean change Δ, as if it were a negative gradient.

    ``m ← β₁ m + (1 − β₁) Δ`` and, for the adaptive rules, ``x ← x + η m / (√v + τ)``. The second moment v accumulates
    Δ² (Adagrad), averages it exponentially (Adam), or changes by a step of the same size in either direction (Yogi).
    FedAvgM is ``m ← β₁ m + Δ`` and ``x ← x + η m``.

    Attributes:
        rule: ``momentum``, ``adagrad``, ``adam`` or ``yogi``.
        lr: η, the step size of the server.
        beta1: β₁, the decay of m.
        beta2: β₂, the decay of v.
        tau: τ, the degree of adaptivity; smaller is more adaptive.
        uniform: Whether all sites have equal weight, instead of in proportion to their training examples.
    """

    task: Task
    local: LocalTraining = LocalTraining()
    rule: Literal["momentum", "adagrad", "adam", "yogi"] = "adam"
    lr: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3
    uniform: bool = False

    def init(self, params: Tree) -> State:
        trained = trainable(self.task.model())
        zero = tree.zeros(tree.select(params, trained.__contains__))
        # v₋₁ ≥ τ², as the algorithm asks
        return State(0, params, zero, tree.zip_with(lambda x: x + self.tau**2, zero))

    def request(self, state: State) -> Request:
        return Request(state.round, {"params": state.params})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        return FedAvg(self.task, self.local, uniform=self.uniform).site_update(request, memory, site)

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        change = reply.mean("update").value
        delta = {name: change[name] for name in state.m}
        keep, new = (self.beta1, 1.0) if self.rule == "momentum" else (self.beta1, 1 - self.beta1)
        # m_t = β₁ m_{t−1} + (1 − β₁) Δ_t;  FedAvgM: m_t = β₁ m_{t−1} + Δ_t
        m = tree.zip_with(lambda old, d: keep * old + new * d, state.m, delta)
        v = tree.zip_with(self._second, state.v, delta)
        if self.rule == "momentum":
            step = tree.scale(m, self.lr)
        else:  # x_{t+1} = x_t + η m_t / (√v_t + τ)
            step = tree.zip_with(lambda first, second: self.lr * first / (second.sqrt() + self.tau), m, v)
        return State(state.round + 1, tree.shift(state.params, {**change, **step}), m, v)

    def _second(self, v: Tensor, delta: Tensor) -> Tensor:
        square = delta.square()
        match self.rule:
            case "adagrad":
                return v + square
            case "adam":
                return self.beta2 * v + (1 - self.beta2) * square
            case "yogi":
                return v - (1 - self.beta2) * square * torch.sign(v - square)
        return v
