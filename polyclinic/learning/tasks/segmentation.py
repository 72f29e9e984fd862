"""Segmentation in two and three dimensions, with defined scores for empty masks."""

import math
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyclinic.core.tree import Tree
from polyclinic.learning.batch import Batch
from polyclinic.learning.tasks.task import Task

DEFAULT_TOLERANCE_MM = 2.0
FULL_METRICS = ("hd95", "hd95_px", "nsd", "volume_error", "volume_ml", "area_mm2", "volume_px")
IGNORED = -1
"""Target of pixels without annotation (nnU-Net's "ignore")."""


class ScoredCase(Protocol):
    """One image with the way back to the grid of its file, as data that know it provide for each example."""

    @property
    def inputs(self) -> Tensor:
        """The preprocessed image. Shape [C, *grid]."""

    @property
    def truth(self) -> Tensor:
        """The mask on the original grid, int64. Shape [*original]."""

    @property
    def truth_on_grid(self) -> Tensor:
        """The preprocessed mask, int64. Shape [*grid]."""

    @property
    def spacing_mm(self) -> tuple[float, ...] | None:
        """Millimeters between voxels of the original grid, if known."""

    @property
    def grid_spacing_mm(self) -> tuple[float, ...] | None:
        """Millimeters between voxels of the preprocessed image, if known."""

    def labels(self, scores: Tensor) -> Tensor:
        """Return the best class of each voxel of the original grid, given class scores [C, *grid]."""


@dataclass(frozen=True)
class Segmentation(Task):
    """Segmentation: a class for every pixel. Targets are int64 [b, *spatial], 0 for background.

    Pixels whose target is ``IGNORED`` count in neither loss nor metrics. If only one of prediction and truth contains a
    class, its Dice is 0 and its distance the image's diagonal; ``empty`` marks empty predictions for a nonempty truth.
    If neither contains it, ``absent`` marks the pair, and means leave it out, as in nnU-Net.

    Where the data know how an image was resampled and cropped, predictions are brought back to the grid of its file and
    compared with the file's mask there, so that coarser preprocessing cannot raise a score.

    Attributes:
        spacing_mm: Pixel size along each axis, for distances, if the files do not state it.
        tolerance_mm: Distance up to which two surfaces agree, for the surface Dice; 2 mm by default. If pixel sizes are
            not known, there is no default, and the unit is a pixel.
        window: Patch size for sliding-window prediction of large volumes; the whole image by default.
        space: ``"native"``: scores are on the grid of the files where it is known; ``"grid"``: on that of the network.
    """

    spacing_mm: tuple[float, ...] | None = None
    tolerance_mm: float | None = None
    window: tuple[int, ...] | None = None
    space: Literal["native", "grid"] = "native"

    kind: ClassVar[str] = "segmentation"

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return soft Dice over the foreground classes plus cross-entropy, as in nnU-Net (Isensee et al., 2021).

        Pixels without annotation count in neither.
        """
        from monai.losses import DiceLoss

        prediction = model(batch[0])
        scores: Tensor = prediction if isinstance(prediction, Tensor) else prediction[0]
        target = batch[1].unsqueeze(1)
        known = target != IGNORED
        classes = torch.arange(scores.shape[1], device=scores.device).view(-1, *[1] * (scores.ndim - 2))
        one_hot = (target == classes).to(scores.dtype)  # not by scatter_, which DP-SGD cannot batch
        dice: Tensor = DiceLoss(include_background=False)(scores.softmax(1) * known, one_hot)
        total = F.cross_entropy(scores, batch[1], ignore_index=IGNORED, reduction="sum")
        return dice + total / known.sum().clamp_min(1)

    def predict(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Return class scores [b, C, *spatial], by sliding windows if ``window`` is set."""
        if self.window is None:
            scores = model(inputs)
        else:
            from monai.inferers import sliding_window_inference

            scores = sliding_window_inference(inputs, self.window, 2, model, overlap=0.25, mode="gaussian")
        return scores if isinstance(scores, Tensor) else scores[0]

    def outputs(self, model: nn.Module, batch: Batch, *, full_metrics: bool = False) -> dict[str, Tensor]:
        """Return ``dice``, ``empty`` and ``absent`` [b, K] for K foreground classes, compared on the network's grid.

        With full metrics also ``volume_error``, the relative difference of volumes, and the metrics of
        ``agreement`` in mm if pixel sizes are known, else in pixels.
        """
        scores = self.predict(model, batch[0])
        return self._compared(scores.argmax(1), batch[1], scores.shape[1], self.spacing_mm, full_metrics)

    def outputs_of(
        self, model: nn.Module, data: Any, index: Tensor, device: str = "cpu", *, full_metrics: bool = False
    ) -> dict[str, Tensor]:
        """Return the same for the examples of ``data`` at ``index``, compared on the original grids if known.

        Images are predicted together if they have one shape, and compared one by one.
        """
        measured = getattr(data, "measured", None)
        if measured is None:
            return super().outputs_of(model, data, index, device, full_metrics=full_metrics)
        known: list[ScoredCase] = [data.case(i) for i in index.tolist()]
        parts = []
        one_shape = len({case.inputs.shape for case in known}) == 1
        for group in [known] if one_shape else [[case] for case in known]:
            scores = self.predict(model, torch.stack([case.inputs for case in group]).to(device)).cpu()
            for case, score in zip(group, scores, strict=True):
                parts.append(self._scored(case, score, measured, full_metrics))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _scored(self, case: ScoredCase, scores: Tensor, measured: bool, full_metrics: bool) -> dict[str, Tensor]:
        """Return the outputs of one case, given its class scores [C, *grid]."""
        if self.space == "grid":
            labels, truth, known = scores.argmax(0), case.truth_on_grid, self.spacing_mm or case.grid_spacing_mm
        else:
            labels, truth, known = case.labels(scores).long(), case.truth, case.spacing_mm
        return self._compared(labels[None], truth[None], len(scores), known if measured else None, full_metrics)

    def _compared(
        self, labels: Tensor, truth: Tensor, classes: int, spacing_mm: tuple[float, ...] | None, full_metrics: bool
    ) -> dict[str, Tensor]:
        spacing = spacing_mm or self.spacing_mm
        tolerance = self.tolerance_mm or (None if spacing is None else DEFAULT_TOLERANCE_MM)
        return agreement(labels, truth, classes, spacing, tolerance, full_metrics=full_metrics)

    def summary(self, outputs: Tree) -> dict[str, float]:
        """Compute mean Dice over cases and classes, the fraction of empty predictions, and distances if present.

        Pairs of a case and a class that neither prediction nor truth contains are left out; without any other pair
        there is no Dice.
        """
        metrics, present = {"empty": float(outputs["empty"].float().mean())}, ~outputs["absent"].bool()
        if not bool(present.any()):
            return metrics
        names = [name for name in ("dice", *FULL_METRICS) if name in outputs]
        metrics |= {name: float(outputs[name][present].mean()) for name in names}
        return metrics | {"loss": 1 - metrics["dice"]}


def agreement(
    predicted: Tensor,
    target: Tensor,
    classes: int,
    spacing_mm: tuple[float, ...] | None = None,
    tolerance_mm: float | None = None,
    *,
    full_metrics: bool = False,
) -> dict[str, Tensor]:
    """Compare two label maps [b, *spatial] for each case and foreground class: tensors [b, classes - 1].

    Dice and surface Dice are 1, and distances 0, for classes that are in neither map. ``hd95`` is the larger of the two
    directed 95th percentiles of surface distances, as in MONAI.

    Args:
        predicted: Predicted labels.
        target: True labels; ``IGNORED`` counts in nothing.
        classes: Number of classes with the background.
        spacing_mm: Pixel size. Without it distances and volumes are in pixels, and their names end in ``_px``.
        tolerance_mm: Tolerance of the surface Dice ``nsd`` in mm (pixels without ``spacing_mm``); None for no ``nsd``.
        full_metrics: Whether to compute distances and volumes.
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
    if full_metrics:
        spacing = spacing_mm or (1.0,) * len(axes)
        surfaces = _surfaces(p, t, spacing, tolerance_mm)
        metrics["hd95" if spacing_mm else "hd95_px"] = surfaces["hd95"]
        if tolerance_mm is not None:
            metrics["nsd"] = surfaces["nsd"]
        difference = (in_p - in_t).abs()
        metrics["volume_error"] = torch.where(in_t > 0, difference / in_t.clamp_min(1), (in_p > 0).float())
        if spacing_mm and len(axes) > 2:
            metrics["volume_ml"] = difference * (math.prod(spacing) / 1000)
        elif spacing_mm:
            metrics["area_mm2"] = difference * math.prod(spacing)
        else:
            metrics["volume_px"] = difference.float()
    return metrics


def _surfaces(p: Tensor, t: Tensor, spacing: tuple[float, ...], tolerance: float | None) -> dict[str, Tensor]:
    """Return the 95th percentile of surface distances, and the fraction of surfaces within ``tolerance``, if given."""
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
    p: Tensor,
    t: Tensor,
    both: Tensor,
    spacing: tuple[float, ...],
    tolerance: float | None,
    distance: Tensor,
    share: Tensor,
) -> None:
    """Fill in ``distance`` and ``share`` where both surfaces exist."""
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    for case, label in both.nonzero().tolist():
        pair = [mask[case, label][None, None].float() for mask in (p, t)]
        distance[case, label] = compute_hausdorff_distance(
            *pair, include_background=True, percentile=95, spacing=spacing
        )
        if tolerance is not None:
            share[case, label] = compute_surface_dice(
                *pair, class_thresholds=[tolerance], include_background=True, spacing=spacing
            )
