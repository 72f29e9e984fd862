"""Losses just inside and outside of annotated structures, which tell whether these are drawn too large or too small.

Part of FedA3I: Wu et al., AAAI 2024, https://arxiv.org/abs/2312.12838, after the published code.
"""

from typing import Any

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from polyclinic.core.tree import Tree
from polyclinic.learning.objectives.distillation_loss import answers
from polyclinic.learning.tasks.task import Task


def boundary_losses(task: Task, params: Tree, data: Any, device: str = "cpu") -> Tensor:
    """Return the mean loss inside and outside of each foreground class of masks: float64 [2C], 0 for absent classes.

    The loss of a pixel is ``−log p`` inside of a structure and ``−log(1 − p)`` outside.
    """
    logits, masks = answers(task, params, data, device)
    found = []
    for c in range(1, logits.shape[1]):
        own, other = logits.log_softmax(1)[:, c], rest(logits, c)
        sides = [
            torch.stack([-own[i][inside].double().mean(), -other[i][outside].double().mean()])
            for i, (inside, outside) in enumerate(bands(masks == c))
            if inside.any() and outside.any()
        ]
        found.append(torch.stack(sides).mean(0) if sides else torch.zeros(2, dtype=torch.float64))
    return torch.cat(found)


def rest(logits: Tensor, c: int) -> Tensor:
    """Return ``log(1 − p_c)`` [b, *spatial] for logits [b, C, *spatial]."""
    others = torch.cat([logits[:, :c], logits[:, c + 1 :]], 1)
    return others.logsumexp(1) - logits.logsumexp(1)


def bands(masks: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return for each of ``masks`` [b, *spatial] the pixels within the same distance of its edge, inside and outside.

    The distance is the largest that both sides have.
    """
    found = []
    for mask in masks.numpy():
        if not mask.any() or mask.all():
            found.append((torch.zeros(mask.shape, dtype=torch.bool),) * 2)
            continue
        inside, outside = distance_transform_edt(mask), distance_transform_edt(~mask)
        far = min(inside.max(), outside.max())
        pair = (mask & (inside <= far), ~mask & (outside <= far))
        found.append((torch.from_numpy(np.asarray(pair[0])), torch.from_numpy(np.asarray(pair[1]))))
    return found
