"""Lesion-wise comparison of masks: each true lesion with what was predicted for it, and false detections.

The rule of the BraTS 2023 challenges (Saluja, https://github.com/rachitsaluja/BraTS-2023-Metrics; description in
Synapse syn51156910): the true mask is dilated, and the parts of the mask within one connected component of the dilation
are one lesion. The predicted components (26 neighbors, 8 in 2-D) that touch the dilation of a lesion are its
prediction. The lesion-wise Dice is the sum of the Dice of the lesions, divided by their number plus that of the
predicted components that touch no lesion. The lesion-wise HD95 is the same mean, with the largest possible distance for
missed and for false lesions. Lesions up to a smallest volume are left out. Without lesions and false components the two
are 1 and 0.

Departures: the largest distance is the image's diagonal (374 mm in BraTS), and surfaces are those of MONAI.

The numbers of lesions give sensitivity, F1 and false positives a case, as in the WMH challenge
(https://wmh.isi.uu.nl/evaluation/), whose overlap without dilation is ``dilation = 0``.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyclinic.learning.tasks.surface_distances import surfaces

NAMES = ("lesion_dice", "lesion_hd95", "lesions", "lesions_found", "lesions_predicted", "lesions_false")


@dataclass(frozen=True)
class Lesions:
    """How lesions are separated.

    Attributes:
        dilation: Times the true mask is dilated by one voxel (without the corners of the cube of 27).
        smallest: Volume in mm³ up to which a true lesion is left out; in voxels if the voxel size is unknown.
    """

    dilation: int = 3
    smallest: float = 50.0


def lesion_scores(
    predicted: Tensor, truth: Tensor, spacing_mm: tuple[float, ...] | None, how: Lesions
) -> dict[str, Tensor]:
    """Compare the lesions of each case and class.

    Args:
        predicted: Predicted masks, bool. Shape [b, K, *spatial].
        truth: True masks, bool. Shape [b, K, *spatial].
        spacing_mm: Voxel size; None if unknown.
        how: How lesions are separated.

    Returns:
        Tensors [b, K]: ``lesion_dice``; ``lesion_hd95`` (``lesion_hd95_px`` without voxel size); the numbers of
        ``lesions``, of ``lesions_found``, of components ``lesions_predicted``, and of those that are ``lesions_false``.
    """
    spacing = spacing_mm or (1.0,) * (predicted.ndim - 2)
    rows = [
        [_compare(p.cpu().numpy(), t.cpu().numpy(), spacing, how) for p, t in zip(ps, ts, strict=True)]
        for ps, ts in zip(predicted, truth, strict=True)
    ]
    found = torch.tensor(rows, dtype=torch.float32).reshape(*predicted.shape[:2], len(NAMES))
    named = dict(zip(NAMES, found.unbind(-1), strict=True))
    if spacing_mm is None:
        named["lesion_hd95_px"] = named.pop("lesion_hd95")
    return named


def _compare(
    predicted: "np.ndarray[Any, Any]", truth: "np.ndarray[Any, Any]", spacing: tuple[float, ...], how: Lesions
) -> tuple[float, ...]:
    """Return the values of ``NAMES`` for one case and class."""
    from scipy import ndimage

    axes = predicted.ndim
    neighbors, ball = np.ones((3,) * axes), ndimage.generate_binary_structure(axes, 2)

    def dilated(mask: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
        return ndimage.binary_dilation(mask, ball, iterations=how.dilation) if how.dilation else mask

    components, predictions = ndimage.label(predicted, neighbors)
    groups, count = ndimage.label(dilated(truth), neighbors)
    groups = np.where(truth, groups, 0)
    diagonal = math.sqrt(sum((n * mm) ** 2 for n, mm in zip(truth.shape, spacing, strict=True)))
    touched: set[int] = set()
    dice, distance, lesions, detected = 0.0, 0.0, 0, 0
    for k in range(1, count + 1):
        lesion = groups == k
        mine = set(np.unique(components[dilated(lesion)]).tolist()) - {0}
        touched |= mine
        if lesion.sum() * math.prod(spacing) <= how.smallest:
            continue
        lesions += 1
        if not mine:
            distance += diagonal
            continue
        detected += 1
        part = np.isin(components, list(mine))
        dice += 2 * float((part & lesion).sum()) / float(part.sum() + lesion.sum())
        distance += min(_hd95(part, lesion, spacing), diagonal)
    false = predictions - len(touched)
    total = lesions + false
    mean_dice = dice / total if total else 1.0
    mean_distance = (distance + false * diagonal) / total if total else 0.0
    return mean_dice, mean_distance, lesions, detected, predictions, false


def _hd95(a: "np.ndarray[Any, Any]", b: "np.ndarray[Any, Any]", spacing: tuple[float, ...]) -> float:
    """Return the HD95 of two masks that are not empty, within the box around both."""
    where = np.argwhere(a | b)
    box = tuple(slice(max(low - 1, 0), high + 2) for low, high in zip(where.min(0), where.max(0), strict=True))
    pair = [torch.from_numpy(mask[box].copy())[None, None] for mask in (a, b)]
    return float(surfaces(pair[0], pair[1], spacing, None)["hd95"])
