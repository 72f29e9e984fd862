"""Random changes of the mask that a cascade's previous stage predicted, as in nnU-Net v2.

They make the network of full resolution less dependent on the mask (``nnUNetTrainer.get_training_transforms``; Isensee
et al., Nature Methods 18:203, 2021). Distances are in voxels.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyclinic.learning.training.image_transforms import happens, uniform

BALL = (0.4, 1.0, 8.0)
"""Probability of a binary operation for each label, and the smallest and the largest radius of its ball."""
COMPONENT = (0.2, 0.15)
"""Probability that each label loses a component, and the share of the patch that it may cover at most."""
Mask = np.ndarray[Any, Any]


def labels_of(channels: Tensor) -> Tensor:
    """Return the mask [*spatial] whose labels 1, 2, ... are the ``channels`` [K, *spatial], 0 or 1."""
    numbers = torch.arange(1, len(channels) + 1).view(-1, *[1] * (channels.ndim - 1))
    return ((channels > 0.5) * numbers).amax(0)


def changed(labels: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """Return the channels of labels 1 to ``count`` of a mask [*spatial] after its random changes: [count, *spatial].

    Args:
        labels: The mask.
        count: The number of labels.
        rng: Source of every random number.
    """
    masks: list[Mask] = [(labels == label).numpy() for label in range(1, count + 1)]
    if happens(BALL[0], rng):
        for k in torch.randperm(count, generator=rng).tolist():
            operation, radius = int(torch.randint(4, (), generator=rng)), uniform(*BALL[1:], rng)
            before, masks[k] = masks[k], _operated(masks[k], operation, radius)
            added = masks[k] & ~before
            masks = [mask if j == k else mask & ~added for j, mask in enumerate(masks)]
    if happens(COMPONENT[0], rng):
        masks = [_without_component(mask, rng) for mask in masks]
    return torch.from_numpy(np.stack(masks)).float()


def _operated(mask: Mask, operation: int, radius: float) -> Mask:
    """Return a mask after its dilation (0), erosion (1), closing (2) or opening (3) by a ball."""
    if operation == 0:
        return _dilated(mask, radius)
    if operation == 1:
        return ~_dilated(~mask, radius)
    if operation == 2:
        return ~_dilated(~_dilated(mask, radius), radius)
    return _dilated(~_dilated(~mask, radius), radius)


def _dilated(mask: Mask, radius: float) -> Mask:
    """Return where a voxel of ``mask`` is at most ``radius`` away."""
    from scipy.ndimage import distance_transform_edt

    if not mask.any():
        return mask
    near: Mask = distance_transform_edt(~mask) <= radius
    return near


def _without_component(mask: Mask, rng: torch.Generator) -> Mask:
    """Return a mask without one of its components, drawn among those that are not too large."""
    from scipy.ndimage import label

    parts, count = label(mask, np.ones((3,) * mask.ndim))
    sizes = np.bincount(parts.reshape(-1), minlength=count + 1)
    small = [i for i in range(1, count + 1) if sizes[i] < COMPONENT[1] * mask.size]
    if not small:
        return mask
    removed = small[int(torch.randint(len(small), (), generator=rng))]
    rest: Mask = mask & (parts != removed)
    return rest
