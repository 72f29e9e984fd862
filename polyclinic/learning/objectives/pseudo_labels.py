"""Pseudo-labels: what a model says of one view of an image is the target of another, where it is sure enough.

Sohn et al., "FixMatch: Simplifying Semi-Supervised Learning with Consistency and Confidence", NeurIPS 2020, equation 4.
https://arxiv.org/abs/2001.07685.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from polyclinic.learning.training.augmentation import STRONG, WEAK, move


def two_views(kind: str, x: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """A weak and a strong view of ``x``. For segmentation, both show every pixel in the same place."""
    weak = move(x, WEAK.moves(x, rng))
    return weak, STRONG.recolour(weak, rng) if kind == "segmentation" else STRONG.view(x, rng)


def pseudo_loss(logits: Tensor, probability: Tensor, threshold: float) -> Tensor:
    """Cross-entropy of ``logits`` [b, C, ...] with the likeliest class, where it is likely enough; else 0.

    The mean is over all examples (pixels), so that few sure ones weigh little.

    Args:
        logits: What the model says of the strong view.
        probability: [b, C, ...], what is believed from the weak view.
        threshold: The least probability of the likeliest class.
    """
    sure, label = probability.detach().max(1)
    return (F.cross_entropy(logits, label, reduction="none") * (sure >= threshold)).mean()
