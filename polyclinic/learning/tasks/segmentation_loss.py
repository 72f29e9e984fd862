"""The loss of segmentation: soft Dice plus cross-entropy, of classes or of regions, at one or several resolutions.

Isensee, Jaeger, Kohl, Petersen and Maier-Hein, "nnU-Net: a self-configuring method for deep learning-based biomedical
image segmentation", Nature Methods 2021, https://doi.org/10.1038/s41592-020-01008-z. A network with deep supervision
returns a list of scores in training, the finest first. Their weights are 1, 1/2, 1/4, ..., normalized to the sum 1; of
three or more, the coarsest has weight 0. Masks are reduced by nearest neighbor.

A region is a set of labels; regions may overlap, such as the tumor and its core. Each one is learned as a mask of its
own (region-based training, Isensee et al., "nnU-Net for Brain Tumor Segmentation", BrainLes 2020,
https://doi.org/10.1007/978-3-030-72087-2_11). Departure: with pixels without annotation, the binary cross-entropy is
the mean over regions and known pixels, where nnU-Net's code divides the sum over regions by the known pixels alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def supervision_weights(outputs: int) -> list[float]:
    """Return the weight of each of ``outputs`` scores, the finest first."""
    weights = [0.5**i for i in range(outputs)]
    if outputs >= 3:
        weights[-1] = 0.0
    return [weight / sum(weights) for weight in weights]


def dice_and_cross_entropy(scores: Tensor, target: Tensor, ignored: int, batch_dice: bool = False) -> Tensor:
    """Return soft Dice loss over the foreground classes plus the mean cross-entropy. Shape [].

    Args:
        scores: Class scores [b, C, *spatial].
        target: Classes [b, *spatial], int64.
        ignored: The target of pixels that count in neither part.
        batch_dice: Whether Dice is that of all images of the minibatch together, instead of the mean over images.
    """
    from monai.losses import DiceLoss

    mask = target.unsqueeze(1)
    known = mask != ignored
    classes = torch.arange(scores.shape[1], device=scores.device).view(-1, *[1] * (scores.ndim - 2))
    one_hot = (mask == classes).to(scores.dtype)  # not by scatter_, which DP-SGD cannot batch
    dice: Tensor = DiceLoss(include_background=False, batch=batch_dice)(scores.softmax(1) * known, one_hot)
    total = F.cross_entropy(scores, target, ignore_index=ignored, reduction="sum")
    return dice + total / known.sum().clamp_min(1)


def dice_and_binary_cross_entropy(
    scores: Tensor, target: Tensor, regions: Sequence[Sequence[int]], ignored: int, batch_dice: bool = False
) -> Tensor:
    """Return soft Dice loss over regions plus the mean binary cross-entropy. Shape [].

    Args:
        scores: A logit for each region [b, R, *spatial].
        target: Labels [b, *spatial], int64.
        regions: The labels of each region.
        ignored: The target of pixels that count in neither part.
        batch_dice: Whether Dice is that of all images of the minibatch together, instead of the mean over images.
    """
    from monai.losses import DiceLoss

    known = (target != ignored).unsqueeze(1)
    truth = in_regions(target, regions).to(scores.dtype)
    dice: Tensor = DiceLoss(batch=batch_dice)(scores.sigmoid() * known, truth)
    total = (F.binary_cross_entropy_with_logits(scores, truth, reduction="none") * known).sum()
    return dice + total / (known.sum() * len(regions)).clamp_min(1)


def in_regions(labels: Tensor, regions: Sequence[Sequence[int]]) -> Tensor:
    """Return for labels [b, *spatial] whether each region contains them: bool [b, R, *spatial]."""
    return torch.stack([_any_of([labels == label for label in region]) for region in regions], 1)


def _any_of(masks: Sequence[Tensor]) -> Tensor:
    found = masks[0]
    for mask in masks[1:]:
        found = found | mask
    return found


def supervised(
    prediction: Tensor | Sequence[Tensor],
    target: Tensor,
    ignored: int,
    batch_dice: bool = False,
    regions: Sequence[Sequence[int]] = (),
) -> Tensor:
    """Return the loss of a network's output in training: scores, or a list of them with the finest first. Shape []."""
    heads = [prediction] if isinstance(prediction, Tensor) else list(prediction)

    def loss(scores: Tensor, masks: Tensor) -> Tensor:
        if regions:
            return dice_and_binary_cross_entropy(scores, masks, regions, ignored, batch_dice)
        return dice_and_cross_entropy(scores, masks, ignored, batch_dice)

    if len(heads) == 1:
        return loss(heads[0], target)
    losses = []
    for weight, scores in zip(supervision_weights(len(heads)), heads, strict=True):
        if weight:
            losses.append(weight * loss(scores, _reduced(target, scores)))
    return torch.stack(losses).sum()


def _reduced(target: Tensor, scores: Tensor) -> Tensor:
    if target.shape[1:] == scores.shape[2:]:
        return target
    reduced = F.interpolate(target[:, None].to(scores.dtype), scores.shape[2:], mode="nearest-exact")
    return reduced[:, 0].to(target.dtype)
