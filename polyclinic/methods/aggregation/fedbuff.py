"""Buffered asynchronous aggregation: the server updates without waiting for the slowest site.

John Nguyen, Kshitiz Malik, Hongyuan Zhan, Ashkan Yousefpour, Mike Rabbat, Mani Malek and Dzmitry Huba, "Federated
Learning with Buffered Asynchronous Aggregation", AISTATS 2022, Algorithm 1, https://arxiv.org/abs/2106.06639. The
weights of old replies are from Cong Xie, Sanmi Koyejo and Indranil Gupta, "Asynchronous Federated Optimization", 2019,
section 5.2, https://arxiv.org/abs/1903.03934.

The buffer and the discount belong to the driver: ``train_async(method, federation, state, updates=...,
buffer=method.buffer, discount=method.discount)``. A study with ``[machines]`` uses that driver, in virtual time; any
other study runs synchronously.
"""

from dataclasses import dataclass
from typing import Literal

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply
from polyclinic.core.method import Capabilities
from polyclinic.core.site import Site
from polyclinic.methods.optimization.fedavg import FedAvg, State


@dataclass(frozen=True)
class FedBuff(FedAvg):
    """FedAvg whose server updates as soon as ``buffer`` sites have replied, with less weight for old replies.

    The mean is over the buffer, not over the discounts, so that old replies shorten the step. In a synchronous run no
    reply is old and the buffer holds all replies; this is then FedAvg with equal weights.

    Attributes:
        buffer: K, the number of replies per step; if 0, all replies in a synchronous run, else half of the sites.
        staleness: Weight of a reply of age τ, in steps of the server: ``constant``, 1; ``polynomial``, (1 + τ)^-a;
            ``hinge``, 1 / (a (τ − b) + 1) for τ > b, else 1.
        a: The decay; 0.5 in FedBuff.
        b: The age from which the hinge decays.
        uniform: Whether all sites have equal weight, as in the paper, instead of in proportion to their examples.
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
        """Return the weight S(τ) of a reply that is ``age`` steps old."""
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
