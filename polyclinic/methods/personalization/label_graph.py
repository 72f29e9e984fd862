"""A graph network over labels as head, with edges from the co-occurrence of findings at a hospital.

The site-specific graph network of Chakravarty, Kar, Sethuraman and Sheet, "Federated Learning for Site Aware Chest
Radiograph Screening", ISBI 2021, https://doi.org/10.1109/ISBI48211.2021.9433876. The full text was not available; this
follows the abstract: a CNN computes a feature vector for each finding, a graph network propagates them along edges of
local co-morbidity, and each node then predicts its finding. The layers are those of Kipf and Welling, ICLR 2017,
https://arxiv.org/abs/1609.02907, with a residual connection.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polyclinic.learning.networks.composite import Composed
from polyclinic.learning.networks.latent import head_name, pooled
from polyclinic.learning.networks.model_mixture import prediction as first_output


@dataclass(frozen=True)
class GraphHeaded(Composed):
    """A network whose head is replaced by projections to label nodes, ``nodes.…``, and a graph network, ``graph.…``.

    Attributes:
        features: Number of features that enter the head.
        width: Number of features of a node.
        depth: Number of graph layers.
    """

    features: int
    width: int = 16
    depth: int = 2

    def __call__(self) -> nn.Module:
        """Build a module with random parameters."""
        return _GraphHeaded(self)


class _GraphHeaded(nn.Module):
    def __init__(self, build: GraphHeaded) -> None:
        super().__init__()
        labels, width = build.network.outputs, build.width
        self.body, self.labels = build.network(), labels
        name = head_name(build.network, self.body)
        _replace(self.body, name, nn.Identity())
        self.nodes = nn.Linear(build.features, labels * width)
        self.graph = _LabelGraph(labels, width, build.depth)

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, *inputs] to [b, labels]."""
        h = pooled(first_output(self.body(x)))
        prediction: Tensor = self.graph(self.nodes(h).unflatten(1, (self.labels, -1)))
        return prediction


class _LabelGraph(nn.Module):
    """``H ← ReLU(Â H W) + H``, ``depth`` times, and a logit from each node; Â is the buffer ``adjacency`` [L, L]."""

    adjacency: Tensor

    def __init__(self, labels: int, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(depth)])
        self.weight, self.bias = nn.Parameter(torch.zeros(labels, width)), nn.Parameter(torch.zeros(labels))
        nn.init.normal_(self.weight, std=width**-0.5)
        self.register_buffer("adjacency", torch.eye(labels))

    def forward(self, h: Tensor) -> Tensor:
        """Map [b, L, width] to [b, L]."""
        for layer in self.layers:
            h = torch.relu(self.adjacency @ layer(h)) + h
        return (h * self.weight).sum(2) + self.bias


def comorbidity(targets: Tensor, labels: int) -> Tensor:
    """Return the normalized co-occurrence of labels at a site, [labels, labels].

    ``Â = D^{-1/2} (S + I) D^{-1/2}`` with ``S_ij = (P(i|j) + P(j|i)) / 2``.

    Args:
        targets: Labels, float [n, labels], of which NaN counts as absent; or classes, int64 [n], which never co-occur.
    """
    y = targets.nan_to_num() if targets.is_floating_point() else nn.functional.one_hot(targets, labels).float()
    together = y.T @ y
    given = together / together.diagonal().clamp_min(1)  # P(i | j)
    S = (given + given.T) / 2
    A = S - torch.diag(S.diagonal()) + torch.eye(labels)
    degree = A.sum(1).rsqrt()
    return degree[:, None] * A * degree


def _replace(model: nn.Module, name: str, by: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    place: Any = model.get_submodule(parent) if parent else model
    setattr(place, leaf, by)
