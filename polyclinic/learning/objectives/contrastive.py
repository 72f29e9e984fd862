"""Contrastive learning of representations: projections, the loss, and queues of earlier keys.

He, Fan, Wu, Xie and Girshick, "Momentum Contrast for Unsupervised Visual Representation Learning", CVPR 2020,
https://arxiv.org/abs/1911.05722 (keys, queue, momentum encoder); Chen, Kornblith, Norouzi and Hinton, "A Simple
Framework for Contrastive Learning of Visual Representations", ICML 2020, https://arxiv.org/abs/2002.05709 (projection
head). Also defines ``Extended``, the study's network with a pretraining head, for all methods with pretraining.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyclinic.core import tree
from polyclinic.core.tree import Tree
from polyclinic.learning.batch import Batch, chunks
from polyclinic.learning.networks.latent import encoded, encoded_width, pooled, represent
from polyclinic.learning.networks.model_tree import cached_model, initial
from polyclinic.learning.objectives.distillation_loss import Said
from polyclinic.learning.tasks.task import Task


class Extended(nn.Module):
    """The study's network, ``backbone``, and a pretraining module on its representation, ``extra``."""

    backbone: Any
    extra: Any

    def __init__(self, backbone: nn.Module, extra: nn.Module) -> None:
        super().__init__()
        self.backbone, self.extra = backbone, extra


def extended(learner: Any, params: Tree) -> Tree:
    """Return initial parameters of ``learner``'s ``Extended`` model with ``params`` in its backbone."""
    return {**initial(learner.model, 0), **tree.prefixed("backbone", params)}


@dataclass(frozen=True)
class Contrast:
    """Contrastive learner: the study's network and a projection of its representation.

    Attributes:
        task: The study's task.
        width: Length of a projection.
        temperature: τ of the loss.
    """

    task: Task
    width: int = 64
    temperature: float = 0.1

    def model(self) -> nn.Module:
        """Build an ``Extended`` model whose ``extra`` is the projection."""
        size = encoded_width(self.task.network)
        projection = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, self.width))
        return Extended(self.task.model(), projection)

    def embed(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Return projections [b, width] of length 1."""
        assert isinstance(model, Extended)
        return F.normalize(model.extra(encoded(self.task.network, model.backbone, inputs)), dim=1)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the NT-Xent loss of a minibatch whose two halves are two views of the same images."""
        q = self.embed(model, batch[0])
        n = len(q) // 2
        logits = (q @ q.T / self.temperature).masked_fill(torch.eye(2 * n, dtype=torch.bool, device=q.device), -1e9)
        other = torch.eye(2 * n, device=q.device).roll(n, 0)
        return nce(logits, other)

    def keys(self, params: Tree, data: Any, device: str = "cpu", size: int = 64) -> Tensor:
        """Return the projections [n, width] of all of ``data``, in order."""
        model = cached_model(self, params, device, "keys").eval()
        with torch.no_grad():
            parts = [self.embed(model, data[c][0].to(device)).cpu() for c in chunks(data, size) if len(c)]
        return torch.cat(parts) if parts else torch.zeros(0, self.width)


def nce(logits: Tensor, positive: Tensor) -> Tensor:
    """Average ``−log softmax(logits)`` [b, n] over the ``positive`` entries of each row, then over rows with any."""
    log_p = logits.log_softmax(1)
    count = positive.sum(1)
    each = -(log_p * positive).sum(1) / count.clamp_min(1)
    return each.sum() / (count > 0).sum().clamp_min(1)


def momentum_nce(q: Tensor, k: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """Return MoCo's InfoNCE ``−log(exp(q·k⁺/τ) / (exp(q·k⁺/τ) + Σ exp(q·k⁻/τ)))``; q, k [b, w], negatives [n, w]."""
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ negatives.T], 1) / temperature
    return nce(logits, F.one_hot(torch.zeros(len(q), dtype=torch.long, device=q.device), logits.shape[1]).to(q))


def gaussian(keys: Tensor) -> Tree:
    """Return mean [w] and covariance [w, w] of ``keys`` [n, w]; empty if n is 0."""
    if not len(keys):
        return {}
    return {"mean": keys.mean(0), "covariance": (keys - keys.mean(0)).T @ (keys - keys.mean(0)) / max(len(keys) - 1, 1)}


def drawn(of: Tree, size: int, rng: torch.Generator) -> Tensor:
    """Draw ``size`` keys from the Gaussian ``of`` and normalize them to length 1. Shape [size, w]."""
    values, vectors = torch.linalg.eigh(of["covariance"].double())
    root = vectors * values.clamp_min(0).sqrt()
    noise = torch.randn(size, len(values), generator=rng, dtype=torch.float64)
    return F.normalize((of["mean"].double() + noise @ root.T).float(), dim=1)


def similarity(before: Tensor, after: Tensor) -> float:
    """Return Spearman's ρ between cosine dissimilarities of the same images under two models; 0 below 3 images.

    Both are keys [n, w] of length 1.
    """
    if len(before) < 3:
        return 0.0
    i, j = torch.triu_indices(len(before), len(before), 1)
    ranks = torch.stack([(1 - (k[i] * k[j]).sum(1)).argsort().argsort().double() for k in (before, after)])
    return float(torch.corrcoef(ranks)[0, 1])


def partitions(parts: tuple[Any, ...], count: int) -> Tensor:
    """Return the partition, of ``count`` per volume, of each slice of the data sets ``parts``; -1 if unknown."""
    indices = [torch.zeros(0, dtype=torch.long)]
    for data in parts:
        positions = getattr(data, "positions", None)
        height = torch.full((len(data),), torch.nan) if positions is None else torch.as_tensor(positions)
        known = (height * count).long().clamp(0, count - 1)
        indices.append(torch.where(height.isfinite(), known, -1))
    return torch.cat(indices)


def alike(mine: Tensor, theirs: Tensor) -> Tensor:
    """Return 1 if one of ``theirs`` [n] is in the same partition as one of ``mine`` [b], else 0. Shape [b, n]."""
    return ((mine[:, None] == theirs) & (mine[:, None] >= 0)).float()


@dataclass(frozen=True)
class WithContrast:
    """Classification with an additional supervised contrastive loss on the representations.

    Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, equation 2. https://arxiv.org/abs/2004.11362.

    Attributes:
        task: The classification task.
        weight: The weight of the contrastive loss.
        temperature: τ.
    """

    task: Task
    weight: float = 0.1
    temperature: float = 0.1

    def model(self) -> nn.Module:
        """Build the task's model."""
        return self.task.model()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the task's loss plus the weighted contrastive loss of the minibatch."""
        h, z = represent(self.task.network, model, batch[0])
        value = self.task.loss(Said(z), batch)
        unit = nn.functional.normalize(pooled(h), dim=1)
        other = ~torch.eye(len(unit), dtype=torch.bool, device=unit.device)
        logits = (unit @ unit.T / self.temperature).masked_fill(~other, -1e9)
        return value + self.weight * nce(logits, ((batch[1][:, None] == batch[1]) & other).to(unit))
