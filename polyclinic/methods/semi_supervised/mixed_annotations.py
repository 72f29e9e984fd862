"""Segmentation from masks, boxes, image labels or no annotation, by two networks.

The parts of FedMix: Wicaksana et al., IEEE TMI 2023. https://arxiv.org/abs/2205.01840. Two networks with different
initial weights see every image; where their masks agree, each learns the other's.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polyclinic.learning.batch import Batch
from polyclinic.learning.objectives.distillation_loss import Said
from polyclinic.learning.tasks.segmentation import agreement
from polyclinic.learning.tasks.task import Task

# A site's annotations by role. In place of masks [b, *spatial], ``boxed`` has masks of boxes and ``tagged`` has classes
# [b], 0 for an image without foreground.
ROLES: Mapping[str, str] = {"train": "masks", "boxed": "boxes", "tagged": "labels of images", "unlabeled": "nothing"}


class Twins(nn.Module):
    """Two networks of one architecture."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second


@dataclass
class Tally:
    """Number of examples used in a site's training, and the sum of their losses."""

    used: int = 0
    loss: float = 0.0


@dataclass(frozen=True)
class MixedSegmentation:
    """Two networks that learn from masks, or from each other without them.

    Attributes:
        task: The study's task.
        agree: ε, the least Dice between the two networks' masks; 0.9.
        inside: The least Dice between a mask and its box; 0.5.
    """

    task: Task
    agree: float = 0.9
    inside: float = 0.5

    def model(self) -> nn.Module:
        """Build both networks."""
        return Twins(self.task.model(), self.task.model())

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of manually drawn masks."""
        return self.loss_of("train", model, batch, Tally())

    def loss_of(self, role: str, model: nn.Module, batch: Batch, tally: Tally) -> Tensor:
        """Return the loss over the usable examples of a minibatch of the given ``role``; 0 if there are none."""
        assert isinstance(model, Twins)
        x, y = batch
        z1, z2 = model.first(x), model.second(x)
        y1, y2, kept = y, y, torch.ones(len(x), dtype=torch.bool, device=x.device)
        if role != "train":
            y1, y2, kept = self.masks(role, z1.detach(), z2.detach(), y)
        if not bool(kept.any()):
            nothing: Tensor = (z1.sum() + z2.sum()) * 0.0
            return nothing
        # L = ℓ(f₁(x), ŷ₂) + ℓ(f₂(x), ŷ₁)
        first = self.task.loss(Said(z1[kept]), (x[kept], y2[kept]))
        second = self.task.loss(Said(z2[kept]), (x[kept], y1[kept]))
        value: Tensor = first + second
        tally.used += int(kept.sum())
        tally.loss += value.item() * int(kept.sum())
        return value

    def masks(self, role: str, z1: Tensor, z2: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return both networks' masks [b, *spatial], corrected by the annotation, and which examples [b] to use.

        Empty masks are used only if an image is known to have no foreground, because untrained networks agree on empty
        masks.
        """
        y1, y2 = z1.argmax(1), z2.argmax(1)
        classes = z1.shape[1]
        if role == "boxed":
            y1, y2 = y1 * (y > 0), y2 * (y > 0)
        kept = _foreground_dice(y1, y2, classes) >= self.agree
        kept &= (y1 > 0).flatten(1).any(1) & (y2 > 0).flatten(1).any(1)
        if role == "boxed":
            kept &= torch.minimum(_foreground_dice(y1, y, 2), _foreground_dice(y2, y, 2)) >= self.inside
        if role == "tagged":
            empty = (y == 0).view(-1, *[1] * (y1.ndim - 1))
            y1, y2, kept = torch.where(empty, 0, y1), torch.where(empty, 0, y2), kept | (y == 0)
        return y1, y2, kept


def _foreground_dice(a: Tensor, b: Tensor, classes: int) -> Tensor:
    """Return the Dice of each example [b], averaged over foreground classes; with two classes, of any foreground."""
    if classes == 2:
        a, b = (a > 0).long(), (b > 0).long()
    return agreement(a, b, classes)["dice"].mean(1)
