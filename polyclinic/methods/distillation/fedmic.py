"""Two models at each site, of which only the smaller is sent: FedMIC, FedKD and federated mutual learning.

FedMIC: Ren, Hu, Chen and Wang, "Federated Distillation for Medical Image Classification: Towards Trustworthy
Computer-Aided Diagnosis", 2024, https://arxiv.org/abs/2407.02261: a private teacher and a shared student at each site,
distilled both ways at the level of representations and of decisions (dual knowledge distillation); the student's update
is sent in low rank with a dynamic choice of singular values (global parameter decomposition). The paper's equations
were not available: the losses are those of FedKD, on which it builds: Wu, Wu, Lyu, Huang and Xie,
"Communication-efficient federated learning via knowledge distillation", Nature Communications 13:2032, 2022,
https://arxiv.org/abs/2108.13323. The decomposition of what leaves a site, which both papers have, is the transform for
low rank, which a study applies to both by default; FedKD also decomposes the mean change before all models take it over
(``broadcast``). A request still carries all weights. Departures: FedKD's attention matrices, which only transformers
have, are omitted, and no gradient passes through the other model or through the divisor c.

Federated mutual learning: Shen et al., "Federated Mutual Learning", 2020, https://arxiv.org/abs/2006.16765, section 3,
after Zhang, Xiang, Hospedales and Lu, "Deep Mutual Learning", CVPR 2018, https://arxiv.org/abs/1706.00384.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.low_rank import factors, rising
from polyclinic.core.method import Request
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.networks.model_tree import initial
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.objectives.distillation_loss import Dual, either
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.base.site_weights import SizeWeighted
from polyclinic.methods.optimization.fedavg import State


@dataclass(frozen=True)
class DualDistillation(SizeWeighted[State]):
    """A private teacher at each site and a shared student, which learn from the labels and from each other.

    The teacher never leaves its site and is the site's prediction model; it may be a larger network. A site that never
    trained predicts with the student.

    Attributes:
        dual: The two tasks and the weights of the losses.
        broadcast: Whether the mean change of the student is decomposed in low rank too, as in FedKD.
        start: The share of the squared singular values that the broadcast has at first.
        end: The share after ``reach`` rounds.
        reach: Number of rounds from ``start`` to ``end``.
        uniform: Whether all sites have equal weight, instead of in proportion to their training examples.
    """

    dual: Dual
    local: LocalTraining = LocalTraining()
    uniform: bool = False
    broadcast: bool = False
    start: float = 0.95
    end: float = 0.98
    reach: int = 100

    def init(self, params: Tree) -> State:
        return State(0, params)

    def request(self, state: State) -> Request:
        return Request(state.round, {"params": state.params})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        student = request.trees["params"]
        private = memory.get("private") or self._private(student, site)
        end = self.local.fit(self.dual, {**private, **tree.prefixed("student", student)}, site, request.round)
        learned = tree.under("student", end)
        weight = self.site_weight(site)
        kept = {name: leaf for name, leaf in end.items() if not name.startswith("student.")}
        return Reply({"update": WeightedMean.of(tree.sub(learned, student), weight)}), {**memory, "private": kept}

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        mean = reply.mean("update")
        if not self.broadcast:
            return State(state.round + 1, mean.apply_to(state.params))
        energy = rising(self.start, self.end, self.reach, state.round)
        change = {name: decomposed(leaf, energy) for name, leaf in mean.value.items()}
        return State(state.round + 1, tree.shift(state.params, change))

    def site_model(self, request: Request, memory: Trees) -> Tree:
        teacher = tree.under("teacher", memory.get("private", {}))
        if self.prediction_task is None:
            return teacher or request.trees["params"]
        choice = {"choice": torch.tensor(float(bool(teacher)))}
        private = teacher or self.dual.teacher.first(0)
        return {**tree.prefixed("first", request.trees["params"]), **tree.prefixed("second", private), **choice}

    @property
    def prediction_task(self) -> Any:
        own = self.dual.teacher.network
        return None if own == self.dual.student.network else either(self.dual.student, own)

    def _private(self, student: Tree, site: Site) -> Tree:
        """Return the initial teacher and projection: the first student if it is the same network."""
        fresh = tree.select(initial(self.dual.model, site.seed), lambda name: not name.startswith("student."))
        return {**fresh, **tree.prefixed("teacher", student)} if self.prediction_task is None else fresh


def decomposed(leaf: Tensor, energy: float) -> Tensor:
    """Return ``leaf`` as those who receive its factors compute it."""
    found = factors(leaf, energy)
    return leaf if found is None else (found[0] @ found[1]).reshape(leaf.shape)


def _teacher(task: Task, name: str, options: tuple[tuple[str, Any], ...]) -> Task:
    own, pairs = task.network, tuple((key, value) for key, value in options)  # a study file has lists
    return task if not name else replace(task, network=Network(name, own.inputs, own.outputs, pairs))


def fedmic(
    task: Task,
    local: LocalTraining,
    *,
    teacher: str = "",
    teacher_options: tuple[tuple[str, int], ...] = (),
    representation: float = 1.0,
    decision: float = 1.0,
    temperature: float = 1.0,
    adaptive: bool = True,
    uniform: bool = False,
    broadcast: bool = False,
) -> DualDistillation:
    """Compose a private teacher and a shared student.

    Args:
        teacher: Name of the teacher's network; the study's own if empty.
        teacher_options: Further options of that network, as pairs, such as ``[["width", 32]]``.
        representation: Weight of the distance between representations.
        decision: Weight of the divergence of decisions.
        temperature: T of the decisions.
        adaptive: Whether both are divided by the sum of the task losses, so that inaccurate models teach less.
        uniform: Whether all sites have equal weight, instead of in proportion to their training examples.
        broadcast: Whether the mean change of the student is decomposed in low rank too, as in FedKD.
    """
    own, both = _teacher(task, teacher, teacher_options), (decision, decision)
    dual = Dual(own, task, (1.0, 1.0), both, representation, adaptive, temperature)
    return DualDistillation(dual, local, uniform, broadcast)


def mutual(
    task: Task,
    local: LocalTraining,
    *,
    teacher: str = "",
    teacher_options: tuple[tuple[str, int], ...] = (),
    alpha: float = 0.5,
    beta: float = 0.5,
    uniform: bool = False,
) -> DualDistillation:
    """Compose a private model with ``α · CE + (1 − α) · KL`` and a shared one with ``β · CE + (1 − β) · KL``.

    Args:
        teacher: Name of the private model's network; the study's own if empty.
        teacher_options: Further options of that network, as pairs, such as ``[["width", 32]]``.
        alpha: α, the weight of the labels for the private model.
        beta: β, the weight of the labels for the shared one.
        uniform: Whether all sites have equal weight, instead of in proportion to their training examples.
    """
    own = _teacher(task, teacher, teacher_options)
    return DualDistillation(Dual(own, task, (alpha, beta), (1 - alpha, 1 - beta), 0.0, False), local, uniform)
