"""Segmentation from masks, boxes, image labels or no annotation, by two networks.

The parts of FedMix: Wicaksana et al., IEEE TMI 2023. https://arxiv.org/abs/2205.01840. Two networks with different
initial weights see every image; where their masks agree, each learns the other's. As in the published code, the masks
are those of the received networks in evaluation mode, once in a round.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polyclinic.core.tree import Tree
from polyclinic.learning.batch import Batch
from polyclinic.learning.networks.model_tree import cached_model
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


@dataclass(frozen=True, eq=False)
class Masked:
    """Some examples of ``data``, with given masks.

    Attributes:
        chosen: Their positions [n].
        masks: [n, 2, *spatial], the masks of both networks.
    """

    data: Any
    chosen: Tensor
    masks: Tensor

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: Tensor) -> Batch:
        return self.data[self.chosen[index]][0], self.masks[index]


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
        """Return the loss of a minibatch of the given ``role``: with masks, or with those of ``masked``."""
        assert isinstance(model, Twins)
        x, y = batch
        y1, y2 = (y, y) if role == "train" else (y[:, 0], y[:, 1])
        # L = ℓ(f₁(x), ŷ₂) + ℓ(f₂(x), ŷ₁)
        value = self.task.loss(model.first, (x, y2)) + self.task.loss(model.second, (x, y1))
        tally.used += len(x)
        tally.loss += value.item() * len(x)
        return value

    def masked(self, role: str, twins: Tree, data: Any, device: str = "cpu") -> "Masked":
        """Return the examples of ``data`` that can be used, with the masks of both networks in place of their targets.

        Args:
            role: The role of ``data``.
            twins: The parameters of both networks, which are used in evaluation mode.
        """
        model = cached_model(self, twins, device, "masks").eval()
        assert isinstance(model, Twins)
        chosen, masks = [], []
        with torch.no_grad():
            for chunk in torch.arange(len(data)).split(64):
                x, y = (part.to(device) for part in data[chunk])
                y1, y2, kept = self.masks(role, model.first(x), model.second(x), y)
                chosen.append(chunk[kept.cpu()])
                masks.append(torch.stack([y1, y2], 1)[kept].cpu())
        return Masked(data, torch.cat(chosen), torch.cat(masks))

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
