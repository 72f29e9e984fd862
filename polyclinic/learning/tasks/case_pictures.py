"""Pictures of single cases with their masks: the best, the median and the worst case of a site.

They show slices of patients, who may be identified by a face or a rare finding. They therefore leave a site only in a
job of their own, which its policy has to admit.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from polyclinic.core.execution import Refused
from polyclinic.core.tree import Tree
from polyclinic.learning.networks.model_tree import cached_model
from polyclinic.learning.tasks.segmentation import Segmentation
from polyclinic.learning.tasks.task import Task

FINEST = 256
"""Most pixels along a side of a picture."""
RANKS = ("best", "median", "worst")


def ranked(dice: Tensor, absent: Tensor) -> dict[str, int]:
    """Return the index of the best, the median and the worst case, without a case twice.

    Args:
        dice: Of each case and class [n, K]. A case counts with its mean over classes that it or its prediction has.
        absent: Whether neither has the class [n, K]. Cases without any class are left out.
    """
    present = ~absent.bool()
    mean = (dice.double() * present).sum(1) / present.sum(1).clamp_min(1)
    known = present.any(1).nonzero().flatten()
    order = known[mean[known].argsort(descending=True, stable=True)].tolist()
    places = {"best": 0, "median": len(order) // 2, "worst": len(order) - 1}
    if len(order) < 3:
        del places["median"]
    return {rank: order[place] for rank, place in places.items() if order and (rank == "best" or place)}


def case_pictures(task: Task, params: Tree, data: Any, outputs: Tree, device: str = "cpu") -> Tree:
    """Return slices of the best, the median and the worst case of ``data`` with true and predicted labels.

    Volumes are shown in three planes through the center of the true foreground (of the prediction, or of the image,
    without any), images as they are, all on the grid that the network sees and at most ``FINEST`` pixels wide.

    Args:
        task: A segmentation.
        params: The model.
        data: The cases.
        outputs: ``task_evaluation.outputs`` of the model for ``data``.
        device: The device of PyTorch.

    Returns:
        For each rank and plane ``<rank>/<plane>/image`` [h, w, 1 or 3], ``.../truth`` and ``.../predicted`` [h, w],
        uint8; ``.../aspect`` [1], the height of a pixel divided by its width; and ``<rank>/dice`` [K], NaN for classes
        that the case and its prediction lack.

    Raises:
        Refused: If the task is no segmentation.
    """
    if not isinstance(task, Segmentation):
        raise Refused(f"pictures with outlines are for segmentation, and this task is {task.kind!r}")
    model, found = cached_model(task, params, device).eval(), dict[str, Tensor]()
    for rank, i in ranked(outputs["dice"], outputs["absent"]).items():
        image, truth, spacing = _read(data, i)
        with torch.inference_mode():
            scores = task.predict(model, image[None].to(device), getattr(data, "patch", None))[0].cpu()
        predicted, dice = task.labels(scores), outputs["dice"][i].float()
        found[f"{rank}/dice"] = torch.where(outputs["absent"][i].bool(), torch.nan, dice)
        for plane, slices in enumerate(_planes(_bytes(image), truth.clamp_min(0), predicted, spacing)):
            found |= {f"{rank}/{plane}/{name}": leaf for name, leaf in slices.items()}
    return found


def _read(data: Any, i: int) -> tuple[Tensor, Tensor, tuple[float, ...] | None]:
    """Return an image, its mask on the same grid, and the spacing if it is known."""
    if getattr(data, "measured", None) is not None:
        case = data.case(i)
        return case.inputs, case.truth_on_grid, case.grid_spacing_mm
    x, y = data[torch.tensor([i])]
    return x[0], y[0], None


def _bytes(image: Tensor) -> Tensor:
    """Return colors, or the first channel, with 0.5 % of the values at both ends cut off. uint8 [1 or 3, *spatial]"""
    shown = image if len(image) == 3 else image[:1]
    values = shown.flatten().double().sort().values
    low, high = (values[round(share * (len(values) - 1))] for share in (0.005, 0.995))
    scaled = (shown.double() - low) / (high - low).clamp_min(1e-12)
    return (255 * scaled.clamp(0, 1)).round().to(torch.uint8)


def _planes(
    image: Tensor, truth: Tensor, predicted: Tensor, spacing: tuple[float, ...] | None
) -> list[dict[str, Tensor]]:
    mm = spacing or (1.0,) * truth.ndim
    if truth.ndim == 2:
        return [_slice(image, truth, predicted, mm)]
    shown = next((mask for mask in (truth, predicted) if bool(mask.any())), torch.ones_like(truth))
    center = [round(float(axis)) for axis in shown.nonzero().double().mean(0)]
    return [
        _slice(
            image.select(axis + 1, at),
            truth.select(axis, at),
            predicted.select(axis, at),
            mm[:axis] + mm[axis + 1 :],
        )
        for axis, at in enumerate(center)
    ]


def _slice(image: Tensor, truth: Tensor, predicted: Tensor, mm: tuple[float, ...]) -> dict[str, Tensor]:
    size = (min(truth.shape[0], FINEST), min(truth.shape[1], FINEST))
    factors = [n / m for n, m in zip(truth.shape, size, strict=True)]
    if max(factors) > 1:
        image = functional.adaptive_avg_pool2d(image[None].float(), size)[0].round().to(torch.uint8)
        truth, predicted = (_nearest(labels, size) for labels in (truth, predicted))
    return {
        "image": image.movedim(0, -1).contiguous(),
        "truth": truth.to(torch.uint8).contiguous(),
        "predicted": predicted.to(torch.uint8).contiguous(),
        "aspect": torch.tensor([mm[0] * factors[0] / (mm[1] * factors[1])], dtype=torch.float64),
    }


def _nearest(labels: Tensor, size: tuple[int, int]) -> Tensor:
    return functional.interpolate(labels[None, None].float(), size, mode="nearest-exact")[0, 0]
