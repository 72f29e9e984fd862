"""Federated low-rank adapters of which one factor moves in a round: RoLoRA and FFA-LoRA.

The mean over sites of the products ``B_i A_i`` is not the product of the means of B_i and A_i. It is if all sites have
one of the factors in common: ``Σ p_i B_i A = (Σ p_i B_i) A``. A plain weighted mean of the other factor is then exact,
also under secure sums and noise, and half as large.

RoLoRA: Shuangyi Chen, Yuanxin Guo, Yue Ju, Harik Dalal, Zhongwen Zhu and Ashish Khisti, "Robust Federated Finetuning
of LLMs via Alternating Optimization of LoRA", NeurIPS 2025, https://arxiv.org/abs/2502.01755, trains B in even rounds
and A in odd ones. FFA-LoRA: Youbang Sun, Zitao Li, Yaliang Li and Bolin Ding, "Improving LoRA in Privacy-preserving
Federated Learning", ICLR 2024, https://arxiv.org/abs/2403.12313, trains B alone, so that the noise of private training
is not multiplied. FedSA-LoRA: Pengxin Guo, Shuang Zeng, Yanran Wang, Huijie Fan, Feifei Wang and Liangqiong Qu,
"Selective Aggregation for Low-Rank Adaptation in Federated Learning", ICLR 2025, https://arxiv.org/abs/2410.01463,
shares A, and keeps B at the sites, and with it the classifier, as in the authors' configuration for classification
(https://github.com/Pengxin-Guo/FedSA-LoRA). All other trained tensors, and in RoLoRA and FFA-LoRA a head that the study
trains, are trained in every round and shared.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.method import MethodWrapper, Request
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError
from polyclinic.learning.networks.adapters import DOWN, UP
from polyclinic.learning.tasks.task import InHead, Task
from polyclinic.learning.training.dp_sgd import DPSGD
from polyclinic.learning.training.local import LocalTraining, Proximal
from polyclinic.methods.optimization.fedavg import FedAvg, State
from polyclinic.methods.personalization.partial_personalization import Personal

A, B = DOWN, UP
EVERY_ROUND_B, IN_TURN = (B,), (B, A)
"""The factors that move, by round; after the last, the first follows again. B comes first, because it is 0."""


@dataclass(frozen=True)
class Moving:
    """Tests whether a tensor is trained in a round: it is no factor, or the factor of this round.

    Attributes:
        in_turn: The factors that move, by round.
        round: The round, from 0.
    """

    in_turn: tuple[str, ...]
    round: int

    def __call__(self, name: str) -> bool:
        """Return whether the tensor ``name`` is trained."""
        return not name.endswith((A, B)) or name.endswith(self.in_turn[self.round % len(self.in_turn)])

    def within(self, other: Callable[[str], bool] | None) -> Callable[[str], bool]:
        """Return the test that also requires ``other``, if there is one."""
        return self if other is None else lambda name: self(name) and other(name)


@dataclass(frozen=True)
class AlternatingTraining(LocalTraining):
    """Local training of the factor of the round.

    Attributes:
        in_turn: The factors that move, by round.
    """

    in_turn: tuple[str, ...] = IN_TURN

    def fit(self, task: Any, start: Tree, site: Site, round: int, **how: Any) -> Tree:
        """Train what moves in this round; arguments as in ``LocalTraining.fit``."""
        how["trainable"] = Moving(self.in_turn, round).within(how.get("trainable"))
        return super().fit(task, start, site, round, **how)


@dataclass(frozen=True)
class AlternatingDPSGD(AlternatingTraining, DPSGD):
    """Private training of the factor of the round."""


def alternating(local: LocalTraining, in_turn: tuple[str, ...]) -> LocalTraining:
    """Return ``local`` so that it trains the factor of the round.

    Raises:
        ConfigError: If it is another kind of training, which might train all.
    """
    kinds: dict[type[LocalTraining], Any] = {LocalTraining: AlternatingTraining, DPSGD: AlternatingDPSGD}
    if type(local) not in kinds:
        raise ConfigError(f"adapters cannot alternate in {type(local).__name__}")
    found: LocalTraining = kinds[type(local)](
        **{f.name: getattr(local, f.name) for f in fields(local)}, in_turn=in_turn
    )
    return found


@dataclass(frozen=True)
class Alternating(MethodWrapper[State]):
    """A method whose replies contain the factor of the round only, because the other one did not move.

    Attributes:
        inner: A method that sends an ``update``, and trains with ``alternating``.
        in_turn: The factors that move, by round.
    """

    inner: FedAvg
    in_turn: tuple[str, ...] = IN_TURN

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        reply, memory = self.inner.site_update(request, memory, site)
        update = reply.mean("update")
        moved = tree.select(update.total, Moving(self.in_turn, request.round))
        return replace(reply, parts={**reply.parts, "update": WeightedMean(moved, update.weight)}), memory


def rolora(task: Task, local: LocalTraining, *, mu: float = 0.0, lr: float = 1.0, uniform: bool = False) -> Alternating:
    """FedAvg of adapters whose factors move in alternate rounds (RoLoRA).

    Args:
        mu: The coefficient of FedProx's proximal term; 0 for none.
        lr: The server's step.
        uniform: Whether all sites have equal weight.
    """
    return _composed(task, local, IN_TURN, mu, lr, uniform)


def ffa_lora(
    task: Task, local: LocalTraining, *, mu: float = 0.0, lr: float = 1.0, uniform: bool = False
) -> Alternating:
    """FedAvg of adapters whose factor A keeps its random start (FFA-LoRA).

    Args:
        mu: The coefficient of FedProx's proximal term; 0 for none.
        lr: The server's step.
        uniform: Whether all sites have equal weight.
    """
    return _composed(task, local, EVERY_ROUND_B, mu, lr, uniform)


def _composed(
    task: Task, local: LocalTraining, in_turn: tuple[str, ...], mu: float, lr: float, uniform: bool
) -> Alternating:
    training = alternating(local.with_penalty(Proximal(mu)) if mu else local, in_turn)
    return Alternating(FedAvg(task, training, lr, uniform), in_turn)


@dataclass(frozen=True)
class AtSite:
    """Tests whether a tensor stays at the sites in FedSA-LoRA.

    Attributes:
        task: The task whose model has the tensor.
        private_head: Whether the head stays there, too.
    """

    task: Task
    private_head: bool

    def __call__(self, name: str) -> bool:
        """Return whether the tensor ``name`` is the factor B of an adapter, or in a head that stays."""
        return name.endswith(B) or (self.private_head and InHead(self.task)(name))


def fedsa_lora(task: Task, local: LocalTraining, *, uniform: bool = False, private_head: bool = True) -> Personal:
    """FedAvg of the factors A; the factors B, and usually the head, stay at the sites (FedSA-LoRA).

    Args:
        uniform: Whether all sites have equal weight.
        private_head: Whether the head stays at the sites, as in the authors' configuration for classification.
    """
    return Personal(FedAvg(task, local, uniform=uniform), AtSite(task, private_head))
