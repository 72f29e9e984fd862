"""Regression: one or several numbers per example, such as age."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from polyclinic.core.tree import Tree
from polyclinic.learning.batch import Batch
from polyclinic.learning.tasks.task import Task


@dataclass(frozen=True)
class Regression(Task):
    """Regression. Targets are float [b, outputs], in the unit in which errors are reported.

    Attributes:
        center: Target value at network output 0.
        spread: Change of the target per unit of the network output, so that outputs are of order 1.
    """

    center: float = 0.0
    spread: float = 1.0

    kind: ClassVar[str] = "regression"

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the smooth L1 loss, in units of ``spread``."""
        return F.smooth_l1_loss(model(batch[0]), (batch[1] - self.center) / self.spread)

    def outputs(self, model: nn.Module, batch: Batch, *, full_metrics: bool = False) -> dict[str, Tensor]:
        """Return ``score`` [b, outputs] and ``target`` [b, outputs], both in the unit of the targets."""
        return {"score": model(batch[0]).float() * self.spread + self.center, "target": batch[1]}

    def guess(self, score: Tensor) -> float:
        """Return the center."""
        return self.center

    def summary(self, outputs: Tree) -> dict[str, float]:
        """Compute mean absolute error, root mean squared error, and R² if the targets differ."""
        error = (outputs["score"] - outputs["target"]).double()
        spread = float((outputs["target"] - outputs["target"].mean(0)).double().square().sum())
        metrics = {"mae": float(error.abs().mean()), "rmse": float(error.square().mean().sqrt())}
        metrics["loss"] = metrics["mae"] / self.spread
        return metrics | ({"r2": 1 - float(error.square().sum()) / spread} if spread > 0 else {})
