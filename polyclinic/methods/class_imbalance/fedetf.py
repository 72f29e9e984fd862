"""FedETF: features are trained towards constant class prototypes with equal angles (a simplex equiangular tight frame).

Li, Shang, He, Lin and Wu, "No Fear of Classifier Biases: Neural Collapse Inspired Federated Learning with Synthetic and
Fixed Classifier", ICCV 2023, equations 4 to 6, https://arxiv.org/abs/2303.10058, after the published code: a linear
projection, features of length 1, logits ``β Mᵀ f`` with a trained β, and the balanced softmax of the site's class
counts. Departure: the published personalization, which trains prototypes and projection at each site after the last
round, is omitted; ``fine-tuned`` around this method is the general form of it.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polyclinic.core.tree import Tree
from polyclinic.learning.networks.composite import Composed
from polyclinic.learning.networks.latent import head_name, head_width, pooled
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.class_imbalance.logit_adjustment import LogitAdjusted
from polyclinic.methods.multitask.gated_experts import begin
from polyclinic.methods.optimization.fedavg import State


class FrameHead(nn.Module):
    """A projection, and constant prototypes ``M = √(C / (C − 1)) · P (I − 1 1ᵀ / C)`` with orthonormal P."""

    prototypes: Tensor

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        width = max(features, classes)
        self.project, self.beta = nn.Linear(features, width), nn.Parameter(torch.ones(()))
        p = torch.linalg.qr(torch.rand(width, classes))[0]
        centered = torch.eye(classes) - 1 / classes
        self.register_buffer("prototypes", math.sqrt(classes / (classes - 1)) * p @ centered)

    def forward(self, h: Tensor) -> Tensor:
        """Map [b, features, ...] to logits [b, classes]."""
        f = self.project(pooled(h))
        logits: Tensor = self.beta * (f / f.norm(dim=1, keepdim=True).clamp_min(1e-12)) @ self.prototypes
        return logits


@dataclass(frozen=True)
class Framed(Composed):
    """``network`` whose head is replaced by a ``FrameHead``."""

    def __call__(self) -> nn.Module:
        """Build a module with random parameters."""
        model = self.network()
        parent, _, last = head_name(self, model).rpartition(".")
        setattr(model.get_submodule(parent), last, FrameHead(head_width(self.network), self.outputs))
        return model


@dataclass(frozen=True)
class FedETF(LogitAdjusted):
    """FedAvg with balanced softmax of a network whose last layer is constant. ``task`` has that network."""

    def init(self, params: Tree) -> State:
        return super().init(begin(self.task, params))

    @property
    def prediction_task(self) -> Any:
        return self.task


def fedetf(task: Task, local: LocalTraining, *, uniform: bool = False) -> FedETF:
    """Compose FedAvg, balanced softmax and the network with constant prototypes.

    Args:
        uniform: Whether all sites have equal weight, instead of in proportion to their training examples.
    """
    return FedETF(task.with_network(Framed(task.network)), local, uniform=uniform)
