"""FMTL: several tasks at once, by shared experts with private gates.

Huang, Hu, Liu, Xue, Zhu, Song and Tan, "Federated Multi-Task Learning for Joint Diagnosis of Multiple Mental
Disorders on MRI Scans", IEEE Transactions on Biomedical Engineering 70(4):1137-1149, 2023: a feature extractor learned
by federated contrast, and a multi-gate mixture of experts whose experts are shared and whose gates and towers belong to
each disorder. The equations were not available: the contrast is the supervised one, added to the loss; the paper's
privacy noise is left to the transforms. Departure: gates and towers belong to sites, so that sites with the same
disorder do not share them.
"""

from dataclasses import dataclass
from typing import Any, cast

from polyclinic.core.tree import Tree
from polyclinic.learning.objectives.contrastive import WithContrast
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
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
class InGate:
    """Selects the tensors of the gate and the tower of a network with gated experts."""

    network: Gated

    def __call__(self, name: str) -> bool:
        """Return whether ``name`` belongs to the gate or the tower."""
        return self.network.private(name)


def fmtl(
    task: Task,
    local: LocalTraining,
    *,
    experts: int = 4,
    width: int = 32,
    contrast: float = 0.1,
    temperature: float = 0.1,
    uniform: bool = False,
) -> FMTL:
    """Compose FedAvg of the gated network with gates and towers that stay at the sites.

    Args:
        experts: Number of experts.
        width: Width of an expert.
        contrast: Weight of the supervised contrast of representations.
        temperature: τ of the contrast.
        uniform: Whether all sites have equal weight, instead of in proportion to their training examples.
    """
    mixed = gated(task, experts, width)
    learner = cast(Task, WithContrast(mixed, contrast, temperature))
    return FMTL(FedAvg(learner, local, uniform=uniform), InGate(cast(Gated, mixed.network)), mixed)
