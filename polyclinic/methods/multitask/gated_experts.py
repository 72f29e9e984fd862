"""Mixture-of-experts head with a gate for each site or task.

Ma, Zhao, Yi, Chen, Hong and Chi, "Modeling Task Relationships in Multi-task Learning with Multi-gate
Mixture-of-Experts", KDD 2018, equations 5 and 6. https://doi.org/10.1145/3219819.3220007.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polyclinic.core.tree import Tree
from polyclinic.learning.networks.composite import Composed
from polyclinic.learning.networks.latent import head_name, head_width, pooled
from polyclinic.learning.networks.model_tree import initial
from polyclinic.learning.tasks.task import Task


class GatedHead(nn.Module):
    """Shared experts, with a gate and a tower that may be personal."""

    def __init__(self, features: int, outputs: int, experts: int, width: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(features, width), nn.ReLU()) for _ in range(experts))
        self.gate, self.tower = nn.Linear(features, experts), nn.Linear(width, outputs)

    def forward(self, h: Tensor) -> Tensor:
        """Map [b, features, ...] to [b, outputs]: ``tower(Σ_e softmax(W h)_e · expert_e(h))``."""
        h = pooled(h)
        share = self.gate(h).softmax(1)
        features = torch.stack([expert(h) for expert in self.experts], 1)
        answer: Tensor = self.tower((share[..., None] * features).sum(1))
        return answer


@dataclass(frozen=True)
class Gated(Composed):
    """``network`` whose head is replaced by ``experts`` of the given ``width``, a gate and a tower."""

    experts: int = 4
    width: int = 32

    def __call__(self) -> nn.Module:
        """Build a module with random parameters."""
        model, base = self.network(), self.network
        place = head_name(self, model)
        parent, _, last = place.rpartition(".")
        setattr(model.get_submodule(parent), last, GatedHead(head_width(base), self.outputs, self.experts, self.width))
        return model

    def private(self, name: str) -> bool:
        """Return whether a tensor belongs to the gate or the tower."""
        return self.in_head(name) and (".gate." in name or ".tower." in name)


def gated(task: Task, experts: int, width: int) -> Task:
    """Return ``task`` with a gated mixture-of-experts head."""
    return task.with_network(Gated(task.network, experts, width))


def begin(task: Task, params: Tree) -> Tree:
    """Return initial parameters of ``task``'s model, with the leaves of ``params`` that match in name and shape."""
    fresh = initial(task.network, 0)
    fits = {name: leaf for name, leaf in params.items() if name in fresh and fresh[name].shape == leaf.shape}
    return {**fresh, **fits}
