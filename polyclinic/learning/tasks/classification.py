"""Classification: one class per example, or several labels."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyclinic.core.tree import Tree
from polyclinic.learning.batch import Batch
from polyclinic.learning.tasks.task import Task
from polyclinic.statistics.auc import auc_of


@dataclass(frozen=True)
class Classification(Task):
    """Classification into one of several classes. Targets are int64 [b].

    Attributes:
        class_weights: Weight of each class in the loss; equal by default.
        label_smoothing: Fraction of the target distribution that is spread over all classes.
    """

    class_weights: tuple[float, ...] | None = None
    label_smoothing: float = 0.0

    kind: ClassVar[str] = "classification"

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the cross-entropy."""
        weights = None if self.class_weights is None else torch.tensor(self.class_weights, device=batch[1].device)
        return F.cross_entropy(model(batch[0]), batch[1], weights, label_smoothing=self.label_smoothing)

    def outputs(self, model: nn.Module, batch: Batch, *, full_metrics: bool = False) -> dict[str, Tensor]:
        """Return ``score`` [b, C], probabilities, and ``target`` [b]."""
        return {"score": model(batch[0]).float().softmax(1), "target": batch[1]}

    def guess(self, score: Tensor) -> float:
        """Return equal probabilities of all classes."""
        return 1 / score.shape[1]

    def summary(self, outputs: Tree) -> dict[str, float]:
        """Compute loss, accuracy, balanced accuracy, and AUC (one vs. rest, averaged over the classes present)."""
        score, target = outputs["score"], outputs["target"]
        right = score.argmax(1) == target
        present = target.unique().tolist()
        recalls = [float(right[target == c].float().mean()) for c in present]
        areas = [
            a for c in ([1] if score.shape[1] == 2 else present) if (a := auc(score[:, c], target == c)) is not None
        ]
        metrics = {
            "loss": float(-score.clamp_min(1e-12).log().gather(1, target[:, None]).mean()),
            "accuracy": float(right.float().mean()),
            "balanced_accuracy": sum(recalls) / len(recalls),
        }
        return metrics | ({"auc": sum(areas) / len(areas)} if areas else {})


@dataclass(frozen=True)
class MultiLabel(Task):
    """Classification with any number of labels. Targets are float [b, L] of 0 and 1; NaN means unknown."""

    kind: ClassVar[str] = "multilabel"

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the binary cross-entropy over the known labels."""
        logits, known = model(batch[0]), batch[1].isfinite()
        each = F.binary_cross_entropy_with_logits(logits, batch[1].nan_to_num(), reduction="none")
        return (each * known).sum() / known.sum().clamp_min(1)

    def outputs(self, model: nn.Module, batch: Batch, *, full_metrics: bool = False) -> dict[str, Tensor]:
        """Return ``score`` [b, L], a probability for each label, and ``target`` [b, L]."""
        return {"score": model(batch[0]).float().sigmoid(), "target": batch[1]}

    def guess(self, score: Tensor) -> float:
        """Return probability one half for every label."""
        return 0.5

    def summary(self, outputs: Tree) -> dict[str, float]:
        """Compute loss, accuracy and AUC, averaged over the labels for which they are defined."""
        score, target = outputs["score"], outputs["target"]
        known = target.isfinite()
        right = ((score > 0.5) == (target > 0.5))[known]
        areas = [auc(score[known[:, i], i], target[known[:, i], i] > 0.5) for i in range(score.shape[1])]
        defined = [area for area in areas if area is not None]
        loss = F.binary_cross_entropy(score[known], target[known])
        metrics = {"loss": float(loss), "accuracy": float(right.float().mean())}
        return metrics | ({"auc": sum(defined) / len(defined)} if defined else {})


def auc(score: Tensor, positive: Tensor) -> float | None:
    """Compute the area under the ROC curve of ``score`` [n] for the truth ``positive`` [n]; ties count half.

    Returns None if only one class is present.
    """
    value = float(auc_of(score.double().numpy(), positive.bool().numpy(), np.ones((1, len(score))))[0])
    return None if math.isnan(value) else value
