"""Buffered asynchronous aggregation: nobody waits for the slowest site.

John Nguyen, Kshitiz Malik, Hongyuan Zhan, Ashkan Yousefpour, Mike Rabbat, Mani Malek and Dzmitry Huba, "Federated
Learning with Buffered Asynchronous Aggregation", AISTATS 2022, Algorithm 1, https://arxiv.org/abs/2106.06639. How much
an old answer counts is from Cong Xie, Sanmi Koyejo and Indranil Gupta, "Asynchronous Federated Optimization", 2019,
section 5.2, https://arxiv.org/abs/1903.03934.

The buffer and the discount belong to the driver: ``train_async(method, federation, state, updates=...,
buffer=method.buffer, discount=method.discount)``. A study with ``[machines]`` takes that driver, in virtual time; one
without runs in lock-step.
"""

from dataclasses import dataclass
from typing import Literal

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply
from polyclinic.core.method import Capabilities
from polyclinic.core.site import Site
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import FedAvg, State


@dataclass(frozen=True)
class FedBuff(FedAvg):
    """FedAvg whose server moves as soon as ``buffer`` sites have answered, and heeds old answers less.

    The mean is over the buffer, not over the discounts: old answers make a shorter step, not only a smaller share of
    it. In lock-step, where no answer is old and the buffer is whoever answered, this is FedAvg with equal sites.

    Attributes:
        buffer: K, how many answers one step takes; where 0, as many as there are in lock-step, else half of the sites.
        staleness: How an answer's age τ, in steps of the server, lowers its weight: ``constant``, not at all;
            ``polynomial``, (1 + τ)^-a; ``hinge``, 1 / (a (τ - b) + 1) beyond b.
        a: How fast; 0.5 in FedBuff. ``b``: from what age on, for the hinge.
    """

    uniform: bool = True
    buffer: int = 0
    staleness: Literal["constant", "polynomial", "hinge"] = "polynomial"
    a: float = 0.5
    b: int = 4

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(uniform=self.uniform, discount=self.discount)

    def discount(self, age: int) -> float:
        """S(τ), what an answer counts that is ``age`` steps old."""
        match self.staleness:
            case "constant":
                return 1.0
            case "polynomial":
                return float((1 + age) ** -self.a)
            case "hinge":
                return 1.0 if age <= self.b else 1 / (self.a * (age - self.b) + 1)

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        update = reply.mean("update")
        # Δ̄ = 1/K Σ s(τ_k) Δ_k
        change = tree.scale(update.total, self.lr / self.buffer) if self.buffer else tree.scale(update.value, self.lr)
        return State(state.round + 1, tree.shift(state.params, change))


def fedbuff(
    task: Task,
    local: LocalTraining,
    *,
    buffer: int = 0,
    staleness: Literal["constant", "polynomial", "hinge"] = "polynomial",
    a: float = 0.5,
    b: int = 4,
    lr: float = 1.0,
) -> FedBuff:
    """FedAvg that need not wait, and heeds old answers less."""
    return FedBuff(task, local, lr, buffer=buffer, staleness=staleness, a=a, b=b)
