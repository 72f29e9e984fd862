"""Patients as a graph: patients with similar representations are connected, and learn from their neighbors.

Kipf and Welling, "Semi-Supervised Classification with Graph Convolutional Networks", ICLR 2017, equation 2,
https://arxiv.org/abs/1609.02907; Parisot et al., "Disease prediction using graph convolutional networks", Medical Image
Analysis 2018, for populations. The graph is that of a minibatch, so that predictions depend slightly on its other
patients.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyclinic.learning.batch import Batch
from polyclinic.learning.networks.composite import Composed
from polyclinic.learning.networks.latent import features, head_name, head_width
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.task import Task


def neighbors(h: Tensor, count: int) -> Tensor:
    """Return the symmetric adjacency [b, b] of 0 and 1: each patient and the ``count`` most similar by cosine."""
    unit = F.normalize(h.detach() - h.detach().mean(0), dim=1)
    alike = (unit @ unit.T).fill_diagonal_(-torch.inf)
    count = min(count, len(h) - 1)
    joined = (
        torch.zeros_like(alike).scatter(1, alike.topk(count, dim=1).indices, 1.0) if count else torch.zeros_like(alike)
    )
    return torch.maximum(joined, joined.T)


def normalized(edges: Tensor) -> Tensor:
    """Return ``D^-½ (A + I) D^-½``."""
    with_self = edges + torch.eye(len(edges), dtype=edges.dtype, device=edges.device)
    root = with_self.sum(1).rsqrt()
    return root[:, None] * with_self * root


class Population(nn.Module):
    """The study's network, whose representations pass through a graph before its head."""

    base: Any
    head: Any

    def __init__(self, network: Network, features: int, count: int) -> None:
        super().__init__()
        self.network, self.count = network, count
        self.base = network()
        self.mix = nn.Linear(features, features)
        self.generator = nn.Sequential(nn.Linear(features, 2 * features), nn.ReLU(), nn.Linear(2 * features, features))

    def represent(self, x: Tensor) -> Tensor:
        """Map [b, *inputs] to [b, features]."""
        return features(self.network, self.base, x)

    def imagine(self, h: Tensor, edges: Tensor) -> Tensor:
        """Return for each patient the missing neighbor, generated from the present ones: [b, features]."""
        return cast(Tensor, self.generator(normalized(edges) @ h))

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, *inputs] to [b, outputs]."""
        h, n = self.represent(x), len(x)
        edges = neighbors(h, self.count)
        whole = torch.eye(2 * n, dtype=h.dtype, device=h.device).roll(n, 0)  # each with its generated neighbor
        whole[:n, :n] = edges
        A = normalized(whole)
        # H = ReLU(Â [h; ĥ] W), then once more over the graph; the present patients' rows are used
        mixed = A @ F.relu(A @ self.mix(torch.cat([h, self.imagine(h, edges)])))
        head = self.base.get_submodule(head_name(self.network, self.base))
        return cast(Tensor, head(h + mixed[:n]))


@dataclass(frozen=True)
class Populated(Composed):
    """``network`` with a population graph before its head, in which each patient has ``count`` neighbors."""

    count: int = 5

    def __call__(self) -> nn.Module:
        """Build a module with random parameters."""
        return Population(self.network, head_width(self.network), self.count)

    def in_head(self, name: str) -> bool:
        """Return whether a tensor belongs to the base's head."""
        return super().in_head(name.removeprefix("base."))


def populated(task: Task, count: int) -> Task:
    """Return ``task`` with a population graph before its head."""
    return task.with_network(Populated(task.network, count))


@dataclass(frozen=True)
class Inpainting:
    """Learns to generate hidden patients from their neighbors among the others.

    Attributes:
        task: The task with a population graph.
        hidden: Fraction of patients that are hidden.
    """

    task: Task
    hidden: float = 0.5

    def model(self) -> nn.Module:
        """Build the task's model."""
        return self.task.model()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean absolute distance of each visible patient's generated neighbor from its mean hidden one."""
        assert isinstance(model, Population)
        h = model.represent(batch[0]).detach()
        edges = neighbors(h, model.count)
        seen = torch.rand(len(h), device=h.device) >= self.hidden
        missing = edges[seen][:, ~seen]
        counted = missing.sum(1) > 0
        if not bool(counted.any()):
            return model.imagine(h, edges).sum() * 0.0
        wanted = (missing @ h[~seen])[counted] / missing.sum(1, keepdim=True)[counted]
        return F.l1_loss(model.imagine(h[seen], edges[seen][:, seen])[counted], wanted)
