"""Simulated weak annotation and simulated accelerated acquisition of a site's data.

A study file may give a site boxes, image labels or no annotation instead of masks or classes. Boxes and labels are
derived from the existing masks (a mask that is a box remains unchanged), so that methods for weak annotation can be
studied, and also used at sites whose masks are boxes.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from polyclinic.data.cases.cases import Cases
from polyclinic.data.examples import DataError, Dataset, Examples, in_memory
from polyclinic.data.splits import rng_for
from polyclinic.learning.tasks.mr_reconstruction import columns, undersample

Annotation = Literal["full", "boxes", "labels", "none"]
ROLE: Mapping[Annotation, str] = {"full": "train", "boxes": "boxed", "labels": "tagged", "none": "unlabeled"}


def annotated(roles: Mapping[str, Dataset], kind: Annotation, site: str) -> dict[str, Dataset]:
    """Return the ``roles`` of ``site`` with its training examples moved to the role of ``kind``, leaving ``train``
    empty.

    Raises:
        DataError: If boxes or labels are requested and the targets are not masks.
    """
    if kind == "full" or not roles.keys() & {"train", ROLE[kind]}:
        return dict(roles)
    weak = roles[ROLE[kind]] if kind == "none" else roles["train"]
    nothing = weak.subset(torch.zeros(0, dtype=torch.int64))
    if kind != "none" and weak.labels is not None:
        raise DataError(
            f'annotations gives {site} "{kind}", which are made from masks; this data has none: use "full" or "none"'
        )
    if kind == "boxes" and isinstance(weak, Cases):
        weak = weak.boxed()
    elif kind == "boxes":
        images = in_memory(weak, "boxes")
        weak = replace(images, targets=boxes(images.targets), truths=None)
    if kind == "labels":  # the class of an image says nothing about a patch of it
        images = in_memory(weak, f'annotations gives {site} "labels", which')
        weak = replace(images, targets=images.targets.flatten(1).amax(1).long(), geometries=None, truths=None)
    return {"train": nothing, **without(roles, "train"), ROLE[kind]: weak}


def without(roles: Mapping[str, Dataset], role: str) -> dict[str, Dataset]:
    """Return all but one of ``roles``."""
    return {name: examples for name, examples in roles.items() if name != role}


def boxes(masks: Tensor) -> Tensor:
    """Return for each mask [n, *spatial] the smallest box around its foreground, filled with the mask's largest
    class.
    """
    filled = torch.zeros_like(masks)
    for out, mask in zip(filled, masks, strict=True):
        where = (mask > 0).nonzero()
        if len(where):
            low, high = where.amin(0).tolist(), where.amax(0).tolist()
            out[tuple(slice(a, b + 1) for a, b in zip(low, high, strict=True))] = mask.amax()
    return filled


def column_generator(seed: int, site: str) -> torch.Generator:
    """Return the generator that draws the columns of k-space which ``site`` measures, for a study's ``seed``."""
    return torch.Generator().manual_seed(int(rng_for(seed, "columns", site).integers(2**31)))


def accelerated(examples: Examples, factor: float, center: float, rng: torch.Generator) -> Examples:
    """Return undersampled images as inputs, with the full images as targets.

    One in ``factor`` columns of k-space is kept, including a share ``center`` around the middle; the same columns for
    all ``examples``, as in one protocol.
    """
    if examples.inputs.ndim < 4:
        raise DataError("accelerate = ... is for images; these examples are rows of a table")
    kept = columns(examples.inputs.shape[-1], factor, center, rng)
    full = examples.inputs.float() / 255 if examples.inputs.dtype == torch.uint8 else examples.inputs
    return replace(examples, inputs=undersample(full, kept) if len(full) else full, targets=full)
