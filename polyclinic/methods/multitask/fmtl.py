"""FMTL: several tasks at once, by shared experts with private gates.

Huang, Hu, Liu, Xue, Zhu, Song and Tan, "Federated Multi-Task Learning for Joint Diagnosis of Multiple Mental
Disorders on MRI Scans", IEEE Transactions on Biomedical Engineering 70(4):1137-1149, 2023: a feature extractor learned
by federated contrast, and a multi-gate mixture of experts whose experts are shared and whose gates and towers belong to
each disorder. The equations were not available: the contrast is the supervised one, added to the loss; the paper's
privacy noise is left to the transforms. Sites share gates and towers with those of the same disorder if ``disorders``
names it, and otherwise keep them to themselves.
"""

from dataclasses import dataclass
from typing import Any, cast

from polyclinic.core.tree import Tree
from polyclinic.learning.objectives.contrastive import WithContrast
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.base.grouped_layers import GroupedLayers
from polyclinic.methods.base.grouped_layers import State as GroupedState
from polyclinic.methods.multitask.gated_experts import Gated, begin, gated
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.personalization.partial_personalization import Personal, State


@dataclass(frozen=True)
class FMTL(Personal):
    """Each site combines shared experts by its own gate and tower.

    Attributes:
        task: The study's task with a head of gated experts, with which sites predict.
    """

    task: Task

    def init(self, params: Tree) -> State:
        return super().init(begin(self.task, params))

    @property
    def prediction_task(self) -> Any:
        return self.task


@dataclass(frozen=True)
class ByDisorder(GroupedLayers):
    """Sites of one disorder combine shared experts by one gate and tower, which are averaged over them.

    Attributes:
        disorders: The disorder of each site, in the order of ``sites``.
        predicting: The study's task with a head of gated experts, with which sites predict.
    """

    disorders: tuple[str, ...] = ()
    predicting: Task | None = None

    @property
    def groups(self) -> tuple[str, tuple[str, ...]]:
        return "disorders", self.disorders

    def grouped(self, name: str) -> bool:
        return InGate(cast(Gated, cast(Task, self.predicting).network))(name)

    def init(self, params: Tree) -> GroupedState:
        return super().init(begin(cast(Task, self.predicting), params))

    @property
    def prediction_task(self) -> Any:
        return self.predicting


@dataclass(frozen=True)
class InGate:
    """Selects the tensors of the gate and the tower of a network with gated experts."""

    network: Gated

    def __call__(self, name: str) -> bool:
        """Return whether ``name`` belongs to the gate or the tower."""
        return self.network.private(name)


def fmtl(
    task: Task,
    local: LocalTraining,
    sites: tuple[str, ...],
    *,
    disorders: tuple[str, ...] = (),
    experts: int = 4,
    width: int = 32,
    contrast: float = 0.1,
    temperature: float = 0.1,
    uniform: bool = False,
) -> FMTL | ByDisorder:
    """Compose FedAvg of the gated network with gates and towers that belong to disorders or to sites.

    Args:
        disorders: The disorder of each site, in the order of ``sites``: sites of one disorder share gate and tower. If
            empty, these stay at each site.
        experts: Number of experts.
        width: Width of an expert.
        contrast: Weight of the supervised contrast of representations.
        temperature: τ of the contrast.
        uniform: Whether all sites have equal weight, instead of in proportion to their training examples.
    """
    mixed = gated(task, experts, width)
    learner = cast(Task, WithContrast(mixed, contrast, temperature))
    if disorders:
        return ByDisorder(learner, tuple(sites), local, uniform, tuple(disorders), mixed)
    return FMTL(FedAvg(learner, local, uniform=uniform), InGate(cast(Gated, mixed.network)), mixed)
