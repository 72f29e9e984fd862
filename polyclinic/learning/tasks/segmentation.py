"""Segmentation in two and three dimensions, with defined scores for empty masks."""

import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from polyclinic.core.tree import Tree
from polyclinic.learning.batch import Batch
from polyclinic.learning.tasks.segmentation_loss import supervised
from polyclinic.learning.tasks.task import Task

IGNORED = -1
"""Target of pixels without annotation (nnU-Net's "ignore")."""


@dataclass(frozen=True)
class Segmentation(Task):
    """Segmentation: a class for every pixel. Targets are int64 [b, *spatial], 0 for background.

    Pixels whose target is ``IGNORED`` count in neither loss nor metrics. If only one of prediction and truth contains a
    class, its Dice is 0 and its distance the image's diagonal; ``empty`` marks empty predictions for a nonempty truth.
    If neither contains it, ``absent`` marks the pair, and means leave it out, as in nnU-Net.

    Attributes:
        spacing_mm: Pixel size along each axis, for distances.
        tolerance_mm: Distance up to which two surfaces agree, for the surface Dice.
        window: Patch size for sliding-window prediction of large volumes; the whole image by default.
        batch_dice: Whether the loss takes the Dice of all images of a minibatch together.
    """

    spacing_mm: tuple[float, ...] | None = None
    tolerance_mm: float = 2.0
    window: tuple[int, ...] | None = None
    batch_dice: bool = False

    kind: ClassVar[str] = "segmentation"

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return soft Dice over the foreground classes plus cross-entropy, as in nnU-Net (Isensee et al., 2021).

        Pixels without annotation count in neither. The losses of a network with deep supervision are weighted.
        """
        return supervised(model(batch[0]), batch[1], IGNORED, self.batch_dice)

    def predict(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Return class scores [b, C, *spatial], by sliding windows if ``window`` is set."""
        if self.window is None:
            scores = model(inputs)
        else:
            from monai.inferers import sliding_window_inference

            scores = sliding_window_inference(inputs, self.window, 2, model, overlap=0.25, mode="gaussian")
        return scores if isinstance(scores, Tensor) else scores[0]

    def outputs(self, model: nn.Module, batch: Batch, *, full_metrics: bool = False) -> dict[str, Tensor]:
        """Return ``dice``, ``empty`` and ``absent`` [b, K] for K foreground classes; ``hd95`` (mm) and ``nsd`` if full
        metrics.
        """
        scores = self.predict(model, batch[0])
        return agreement(
            scores.argmax(1), batch[1], scores.shape[1], self.spacing_mm, self.tolerance_mm if full_metrics else None
        )

    def summary(self, outputs: Tree) -> dict[str, float]:
        """Compute mean Dice over cases and classes, the fraction of empty predictions, and distances if present.

        Pairs of a case and a class that neither prediction nor truth contains are left out; without any other pair
        there is no Dice.
        """
        metrics, present = {"empty": float(outputs["empty"].float().mean())}, ~outputs["absent"].bool()
        if not bool(present.any()):
            return metrics
        names = [name for name in ("dice", "hd95", "nsd", "volume_error") if name in outputs]
        metrics |= {name: float(outputs[name][present].mean()) for name in names}
        return metrics | {"loss": 1 - metrics["dice"]}


def agreement(
    predicted: Tensor,
    target: Tensor,
    classes: int,
    spacing_mm: tuple[float, ...] | None = None,
    tolerance_mm: float | None = None,
) -> dict[str, Tensor]:
    """Compare two label maps [b, *spatial] for each case and foreground class: tensors [b, classes - 1].

    Dice and surface Dice are 1, and distances 0, for classes that are in neither map. Distances are in mm (pixels
    without ``spacing_mm``), and are computed only if ``tolerance_mm`` is given.
    """
    labels = torch.arange(1, classes, device=target.device).view(1, -1, *[1] * (target.ndim - 1))
    p, t = (predicted.unsqueeze(1) == labels) & (target.unsqueeze(1) != IGNORED), target.unsqueeze(1) == labels
    axes = tuple(range(2, p.ndim))
    both, in_p, in_t = (p & t).sum(axes), p.sum(axes), t.sum(axes)
    neither = (in_p + in_t) == 0
    metrics = {
        "dice": torch.where(neither, 1.0, 2.0 * both / (in_p + in_t).clamp_min(1)),
        "empty": (in_p == 0) & (in_t > 0),
        "absent": neither,
    }
    if tolerance_mm is not None:
        spacing = spacing_mm or (1.0,) * len(axes)
        metrics |= _surfaces(p, t, spacing, tolerance_mm) | {
            "volume_error": torch.where(in_t > 0, (in_p - in_t).abs() / in_t.clamp_min(1), (in_p > 0).float())
        }
    return metrics


def _surfaces(p: Tensor, t: Tensor, spacing: tuple[float, ...], tolerance: float) -> dict[str, Tensor]:
    """Return the 95th percentile of surface distances, and the fraction of surfaces within ``tolerance``."""
    axes = tuple(range(2, p.ndim))
    diagonal = sum((side * mm) ** 2 for side, mm in zip(p.shape[2:], spacing, strict=True)) ** 0.5
    some_p, some_t = p.any(dim=axes), t.any(dim=axes)
    distance = torch.where(some_p == some_t, 0.0, diagonal)
    share = (some_p == some_t).float()
    with warnings.catch_warnings():  # MONAI warns about its internal use of a deprecated option
        warnings.simplefilter("ignore", FutureWarning)
        _measure(p, t, some_p & some_t, spacing, tolerance, distance, share)
    return {"hd95": distance, "nsd": share}


def _measure(
    p: Tensor, t: Tensor, both: Tensor, spacing: tuple[float, ...], tolerance: float, distance: Tensor, share: Tensor
) -> None:
    """Fill in ``distance`` and ``share`` where both surfaces exist."""
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    for case, label in both.nonzero().tolist():
        pair = [mask[case, label][None, None].float() for mask in (p, t)]
        distance[case, label] = compute_hausdorff_distance(
            *pair, include_background=True, percentile=95, spacing=spacing
        )
        share[case, label] = compute_surface_dice(
            *pair, class_thresholds=[tolerance], include_background=True, spacing=spacing
        )
