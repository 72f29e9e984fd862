"""Pseudo-labels: a confident prediction on one view of an image is the target for another view.

Sohn et al., "FixMatch: Simplifying Semi-Supervised Learning with Consistency and Confidence", NeurIPS 2020, equation 4.
https://arxiv.org/abs/2001.07685.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from polyclinic.learning.training.augmentation import STRONG, WEAK, move


def two_views(kind: str, x: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return a weak and a strong view of ``x``. For segmentation, both have the same geometry."""
    weak = move(x, WEAK.moves(x, rng))
    return weak, STRONG.recolour(weak, rng) if kind == "segmentation" else STRONG.view(x, rng)


def pseudo_loss(logits: Tensor, probability: Tensor, threshold: float) -> Tensor:
    """Return the cross-entropy of ``logits`` [b, C, ...] with the most likely class if it is likely enough, else 0.

    The mean is over all examples or pixels, so that a few confident ones have little weight.

    Args:
        logits: Outputs for the strong view.
        probability: [b, C, ...], predicted probabilities for the weak view.
        threshold: The least probability of the most likely class.
    """
    sure, label = probability.detach().max(1)
    return (F.cross_entropy(logits, label, reduction="none") * (sure >= threshold)).mean()
