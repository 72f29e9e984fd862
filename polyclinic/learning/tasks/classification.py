"""Classification: one class per example, or several labels."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyclinic.core.tree import Tree
from polyclinic.errors import ConfigError
from polyclinic.learning.batch import Batch
from polyclinic.learning.tasks.task import Task
from polyclinic.statistics import agreement
from polyclinic.statistics.auc import auc_of


@dataclass(frozen=True)
class Classification(Task):
    """Classification into one of several classes. Targets are int64 [b].

    Attributes:
        class_weights: Weight of each class in the loss; equal by default.
        label_smoothing: Fraction of the target distribution that is spread over all classes.
        ordered: Whether the classes are grades in ascending order. The loss is then ``ordered_loss``.
    """

    class_weights: tuple[float, ...] | None = None
    label_smoothing: float = 0.0
    ordered: bool = False

    def __post_init__(self) -> None:
        if self.ordered and (self.class_weights is not None or self.label_smoothing):
            raise ConfigError(
                "class_weights and label_smoothing are for the cross-entropy of classes without an order: leave them "
                "out, or ordered"
            )

    kind: ClassVar[str] = "classification"

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the cross-entropy, or the loss of ordered grades."""
        if self.ordered:
            return ordered_loss(model(batch[0]).log_softmax(1), batch[1])
        logits = model(batch[0])
        weights = None if self.class_weights is None else logits.new_tensor(self.class_weights)
        return F.cross_entropy(logits, batch[1], weights, label_smoothing=self.label_smoothing)

    def outputs(self, model: nn.Module, batch: Batch, *, full_metrics: bool = False) -> dict[str, Tensor]:
        """Return ``score`` [b, C], probabilities, and ``target`` [b]."""
        return {"score": model(batch[0]).float().softmax(1), "target": batch[1]}

    def guess(self, score: Tensor) -> float:
        """Return equal probabilities of all classes."""
        return 1 / score.shape[1]

    def summary(self, outputs: Tree) -> dict[str, float]:
        """Compute loss, accuracy, balanced accuracy, and AUC (one vs. rest, averaged over the classes present).

        Of ordered grades also kappa with quadratic weights, if it is defined, and the mean distance of grades.
        """
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
        metrics |= {"auc": sum(areas) / len(areas)} if areas else {}
        return metrics | self._agreement(score, target) if self.ordered else metrics

    def _agreement(self, score: Tensor, target: Tensor) -> dict[str, float]:
        """Return the metrics of ordered grades."""
        grades = score.argmax(1).numpy(), target.numpy(), np.ones((1, len(target)))
        kappa = float(agreement.quadratic_kappa(*grades)[0])
        found = {
            "loss": float(ordered_loss(score.clamp_min(1e-12).log(), target)),
            "grade_error": float(agreement.grade_error(*grades)[0]),
        }
        return found if math.isnan(kappa) else {**found, "quadratic_kappa": kappa}


def ordered_loss(log_p: Tensor, target: Tensor) -> Tensor:
    """Return the ranked ignorance score: the sum over grades k of the cross-entropy of P(y > k), mean over examples.

    Tödter and Ahrens, "Generalization of the ignorance score", Monthly Weather Review 2012,
    https://doi.org/10.1175/MWR-D-11-00266.1, in nats. It is proper, as a sum of proper scores, and a prediction costs
    more the farther it is from the truth. P(y > k), the sum of the probabilities of higher grades, never increases with
    k. Of two grades it is the cross-entropy.

    Args:
        log_p: Log probabilities of the grades. Shape [b, K].
        target: Grades from 0 to K - 1. Shape [b].
    """
    above = log_p.flip(1).logcumsumexp(1).flip(1)[:, 1:]  # log P(y > k) = log Σ_{j > k} p_j
    below = log_p.logcumsumexp(1)[:, :-1]  # log P(y ≤ k)
    higher = target[:, None] > torch.arange(log_p.shape[1] - 1, device=target.device)
    return -torch.where(higher, above, below).sum(1).mean()


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
