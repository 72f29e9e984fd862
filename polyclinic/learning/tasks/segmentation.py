"""Segmentation in two and three dimensions, with defined scores for empty masks."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from polyclinic.core.tree import Tree
from polyclinic.errors import ConfigError
from polyclinic.learning.batch import Batch
from polyclinic.learning.tasks.lesions import Lesions, lesion_scores
from polyclinic.learning.tasks.own_metrics import value_of
from polyclinic.learning.tasks.segmentation_loss import in_regions, supervised
from polyclinic.learning.tasks.surface_distances import surfaces
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

    def labels(self, scores: Tensor, decide: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the label of each voxel of the original grid, given class scores [C, *grid].

        ``decide`` returns the labels [...] of scores [C, ...].
        """


@dataclass(frozen=True)
class Segmentation(Task):
    """Segmentation: a class for every pixel. Targets are int64 [b, *spatial], 0 for background.

    Pixels whose target is ``IGNORED`` count in neither loss nor metrics. If only one of prediction and truth contains a
    class, its Dice is 0 and its distance the image's diagonal; ``empty`` marks empty predictions for a nonempty truth.
    If neither contains it, ``absent`` marks the pair, and means leave it out, as in nnU-Net.

    Where the data know how an image was resampled and cropped, predictions are brought back to the grid of its file and
    compared with the file's mask there, so that coarser preprocessing cannot raise a score.

    With ``regions`` the network gives a logit for each region. Where it is above 0, the region's own label is assigned,
    in the order of the regions, so that later ones are painted over earlier ones, as in nnU-Net. Scores are those of
    the regions in the painted labels, in place of classes.

    Attributes:
        spacing_mm: Pixel size along each axis, for distances, if the files do not state it.
        tolerance_mm: Distance up to which two surfaces agree, for the surface Dice; 2 mm by default. If pixel sizes are
            not known, there is no default, and the unit is a pixel.
        window: Patch size for sliding-window prediction of large volumes; the whole image by default.
        lesions: Whether to compare lesions one by one in full metrics (``lesions.py``).
        lesion_dilation: Times the true lesions are dilated before they are separated.
        lesion_smallest: Volume in mm³ (pixels if spacings are unknown) up to which true lesions are left out.
        space: ``"native"``: scores are on the grid of the files where it is known; ``"grid"``: on that of the network.
        batch_dice: Whether the loss takes the Dice of all images of a minibatch together.
        regions: The labels of each region, such as ``((1, 2, 3), (2, 3), (3,))``; the classes by default.
    """

    spacing_mm: tuple[float, ...] | None = None
    tolerance_mm: float | None = None
    window: tuple[int, ...] | None = None
    space: Literal["native", "grid"] = "native"
    lesions: bool = False
    lesion_dilation: int = 3
    lesion_smallest: float = 50.0
    batch_dice: bool = False
    regions: tuple[tuple[int, ...], ...] = ()

    kind: ClassVar[str] = "segmentation"

    @property
    def label_count(self) -> int:
        """Number of labels of a mask, with the background."""
        return 1 + max(map(max, self.regions)) if self.regions else super().label_count

    def labels(self, scores: Tensor) -> Tensor:
        """Return the predicted labels of class scores, or of logits of regions, [C, ...]: int64 [...]."""
        if not self.regions:
            return scores.argmax(0)
        found = torch.zeros_like(scores[0], dtype=torch.int64)
        for label, score in zip(own_labels(self.regions), scores, strict=True):
            found = torch.where(score > 0, label, found)
        return found

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return soft Dice over the foreground classes plus cross-entropy, as in nnU-Net (Isensee et al., 2021).

        Pixels without annotation count in neither. The losses of a network with deep supervision are weighted.
        """
        return supervised(model(batch[0]), batch[1], IGNORED, self.batch_dice, self.regions)

    def predict(self, model: nn.Module, inputs: Tensor, patch: tuple[int, ...] | None = None) -> Tensor:
        """Return class scores [b, C, *spatial], by sliding windows if ``window`` or ``patch`` is set.

        Args:
            model: The network.
            inputs: Images [b, C, *spatial] of any size.
            patch: Shape of the patches that the network was trained on; ``window`` takes precedence.
        """
        if (window := self.window or patch) is None:
            scores = model(inputs)
        else:
            from monai.inferers import sliding_window_inference

            scores = sliding_window_inference(inputs, window, 2, model, overlap=0.5, mode="gaussian")
        return scores if isinstance(scores, Tensor) else scores[0]

    def outputs(self, model: nn.Module, batch: Batch, *, full_metrics: bool = False) -> dict[str, Tensor]:
        """Return ``dice``, ``empty``, ``absent`` and ``blank`` [b, K] for K foreground classes, or regions.

        Masks are compared on the network's grid. ``blank`` marks empty truth. With full metrics also ``volume_error``,
        the relative difference of volumes, and the metrics of ``agreement`` in mm if pixel sizes are known, else in
        pixels.
        """
        scores = self.predict(model, batch[0])
        return self._compared(
            self.labels(scores.movedim(1, 0)), batch[1], scores.shape[1], self.spacing_mm, full_metrics
        )

    def outputs_of(
        self, model: nn.Module, data: Any, index: Tensor, device: str = "cpu", *, full_metrics: bool = False
    ) -> dict[str, Tensor]:
        """Return the same for the examples of ``data`` at ``index``, compared on the original grids if known.

        Images are predicted together if they have one shape, and compared one by one. Images of data with a ``patch``
        are on disk: they are read and predicted one by one, by sliding windows. If the data are slices with known
        positions, the numbers of pixels are added and ``sliced`` marks them, so that the slices of a patient are scored
        as one volume.
        """
        measured, sliced = getattr(data, "measured", None), getattr(data, "positions", None) is not None
        patch = getattr(data, "patch", None)
        if measured is None:
            x, y = data[index]
            scores = self.predict(model, x.to(device))
            labels = self.labels(scores.movedim(1, 0))
            return self._compared(labels, y.to(device), scores.shape[1], self.spacing_mm, full_metrics, sliced)
        parts = []
        if patch is not None:
            for i in index.tolist():
                case: ScoredCase = data.case(i)
                scores = self.predict(model, case.inputs[None].to(device), patch)[0].cpu()
                parts.append(self._scored(case, scores, measured, full_metrics, sliced))
            return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        known: list[ScoredCase] = [data.case(i) for i in index.tolist()]
        one_shape = len({case.inputs.shape for case in known}) == 1
        for group in [known] if one_shape else [[case] for case in known]:
            scores = self.predict(model, torch.stack([case.inputs for case in group]).to(device)).cpu()
            for case, score in zip(group, scores, strict=True):
                parts.append(self._scored(case, score, measured, full_metrics, sliced))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _scored(
        self, case: ScoredCase, scores: Tensor, measured: bool, full_metrics: bool, sliced: bool
    ) -> dict[str, Tensor]:
        """Return the outputs of one case, given its class scores [C, *grid]."""
        if self.space == "grid":
            labels, truth, known = self.labels(scores), case.truth_on_grid, self.spacing_mm or case.grid_spacing_mm
        else:
            labels, truth, known = case.labels(scores, self.labels).long(), case.truth, case.spacing_mm
        spacing = known if measured else None
        return self._compared(labels[None], truth[None], len(scores), spacing, full_metrics, sliced)

    def _compared(
        self,
        labels: Tensor,
        truth: Tensor,
        classes: int,
        spacing_mm: tuple[float, ...] | None,
        full_metrics: bool,
        sliced: bool = False,
    ) -> dict[str, Tensor]:
        spacing = spacing_mm or self.spacing_mm
        tolerance = self.tolerance_mm or (None if spacing is None else DEFAULT_TOLERANCE_MM)
        lesions = Lesions(self.lesion_dilation, self.lesion_smallest) if self.lesions and full_metrics else None
        found = agreement(
            labels,
            truth,
            classes,
            spacing,
            tolerance,
            full_metrics=full_metrics,
            counts=sliced,
            lesions=lesions,
            regions=self.regions,
        )
        own = {name: self._own_values(name, labels, truth, classes) for name in self.metrics}
        return found | own | ({"sliced": torch.ones(len(labels), dtype=torch.uint8)} if sliced else {})

    def _own_values(self, name: str, labels: Tensor, truth: Tensor, classes: int) -> Tensor:
        """Return the values of a package's metric for each case and foreground class, or region, [b, K]."""
        p, t = _masks(labels, truth, classes, self.regions)
        pairs = zip(p.cpu().numpy(), t.cpu().numpy(), strict=True)
        values = [[value_of(name, one, other) for one, other in zip(*pair, strict=True)] for pair in pairs]
        return torch.tensor(values, dtype=torch.float64)

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
        if "sliced" in outputs:
            metrics["dice"] = _dice_of_volumes(outputs)
        return metrics | {"loss": 1 - metrics["dice"]}


def _dice_of_volumes(outputs: Tree) -> float:
    """Return the mean Dice over patients and classes, with the slices of a patient as one volume."""
    patient = outputs["patient"].long()
    sums = {}
    for name in ("overlap", "predicted", "reference"):
        values = outputs[name].double()
        sums[name] = values.new_zeros(int(patient.max()) + 1, values.shape[1]).index_add_(0, patient, values)
    both = sums["predicted"] + sums["reference"]
    return float((2 * sums["overlap"] / both)[both > 0].mean())


def own_labels(regions: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return the label that each region is painted with: its one label that no later region contains.

    Raises:
        ConfigError: If regions are empty or equal, labels are not from 1 to 255, or a region has no such label, or
            several.
    """
    for region in regions:
        if not region or not all(1 <= label <= 255 for label in region) or len(set(region)) < len(region):
            raise ConfigError(f"regions: {list(region)} must be different labels from 1 to 255, without the background")
    found = []
    for i, region in enumerate(regions):
        left = sorted(set(region) - {label for later in regions[i + 1 :] for label in later})
        if len(left) != 1:
            what = "no label" if not left else f"the labels {', '.join(map(str, left))}"
            raise ConfigError(
                f"regions: {list(region)} has {what} outside of the regions after it, and needs exactly one, which its "
                "pixels get in a mask. List larger regions before those inside them, and split labels or leave some out"
            )
        found.append(left[0])
    return tuple(found)


def _masks(predicted: Tensor, target: Tensor, classes: int, regions: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return predicted and true masks of each foreground class, or region, bool [b, K, *spatial]."""
    sets = regions or [(k,) for k in range(1, classes)]
    return in_regions(predicted, sets) & (target.unsqueeze(1) != IGNORED), in_regions(target, sets)


def agreement(
    predicted: Tensor,
    target: Tensor,
    classes: int,
    spacing_mm: tuple[float, ...] | None = None,
    tolerance_mm: float | None = None,
    *,
    full_metrics: bool = False,
    counts: bool = False,
    lesions: Lesions | None = None,
    regions: Sequence[Sequence[int]] = (),
) -> dict[str, Tensor]:
    """Compare two label maps [b, *spatial] for each case and foreground class, or region: tensors [b, K].

    Dice and surface Dice are 1, and distances 0, for classes that are in neither map. ``hd95`` is the larger of the two
    directed 95th percentiles of surface distances, as in MONAI.

    Args:
        predicted: Predicted labels.
        target: True labels; ``IGNORED`` counts in nothing.
        classes: Number of classes with the background.
        spacing_mm: Pixel size. Without it distances and volumes are in pixels, and their names end in ``_px``.
        tolerance_mm: Tolerance of the surface Dice ``nsd`` in mm (pixels without ``spacing_mm``); None for no ``nsd``.
        full_metrics: Whether to compute distances and volumes.
        counts: Whether to include the numbers of pixels: ``predicted``, ``reference``, and in both (``overlap``).
        lesions: How lesions are separated, to compare them one by one; None to leave this out.
        regions: The labels of each region, which are compared in place of the classes.
    """
    p, t = _masks(predicted, target, classes, regions)
    axes = tuple(range(2, p.ndim))
    both, in_p, in_t = (p & t).sum(axes), p.sum(axes), t.sum(axes)
    neither = (in_p + in_t) == 0
    metrics = {
        "dice": torch.where(neither, 1.0, 2.0 * both / (in_p + in_t).clamp_min(1)),
        "empty": (in_p == 0) & (in_t > 0),
        "absent": neither,
        "blank": in_t == 0,
    }
    if counts:
        metrics |= {"overlap": both, "predicted": in_p, "reference": in_t}
    if lesions is not None:
        metrics |= lesion_scores(p, t, spacing_mm, lesions)
    if full_metrics:
        spacing = spacing_mm or (1.0,) * len(axes)
        distances = surfaces(p, t, spacing, tolerance_mm)
        metrics["hd95" if spacing_mm else "hd95_px"] = distances["hd95"]
        if tolerance_mm is not None:
            metrics["nsd"] = distances["nsd"]
        difference = (in_p - in_t).abs()
        metrics["volume_error"] = torch.where(in_t > 0, difference / in_t.clamp_min(1), (in_p > 0).float())
        if spacing_mm and len(axes) > 2:
            metrics["volume_ml"] = difference * (math.prod(spacing) / 1000)
        elif spacing_mm:
            metrics["area_mm2"] = difference * math.prod(spacing)
        else:
            metrics["volume_px"] = difference.float()
    return metrics
