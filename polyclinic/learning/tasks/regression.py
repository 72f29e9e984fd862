"""Regression: one or several numbers for each example, such as age."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from polyclinic.core.tree import Tree
from polyclinic.learning.tasks.task import Batch, Task


@dataclass(frozen=True)
class Regression(Task):
    """Numbers. Targets are float [b, outputs], in the unit in which errors are reported.

    Attributes:
        center: What the network's 0 stands for, and ``spread`` its 1, so that it learns in its natural range.
    """

    center: float = 0.0
    spread: float = 1.0

    kind: ClassVar[str] = "regression"

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Smooth L1, in units of ``spread``."""
        return F.smooth_l1_loss(model(batch[0]), (batch[1] - self.center) / self.spread)

    def outputs(self, model: nn.Module, batch: Batch, *, full_metrics: bool = False) -> dict[str, Tensor]:
        """``score`` [b, outputs] and ``target`` [b, outputs], both in the unit of the targets."""
        return {"score": model(batch[0]).float() * self.spread + self.center, "target": batch[1]}

    def guess(self, score: Tensor) -> float:
        """The center."""
        return self.center

    def summary(self, outputs: Tree) -> dict[str, float]:
        """Mean absolute error, root mean square error, and R² where the targets differ."""
        error = (outputs["score"] - outputs["target"]).double()
        spread = float((outputs["target"] - outputs["target"].mean(0)).double().square().sum())
        found = {"mae": float(error.abs().mean()), "rmse": float(error.square().mean().sqrt())}
        found["loss"] = found["mae"] / self.spread
        return found | ({"r2": 1 - float(error.square().sum()) / spread} if spread > 0 else {})
