"""What a site's data hold besides inputs and targets: weak annotation, and what images look like when measured fast.

A study file may say that a site has boxes, labels of images or nothing where others have masks or classes. Boxes and
labels are made from the masks there are (a mask that is a box stays as it is), so that methods for weak annotation can
be studied, and used where a site's masks are boxes already.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from polyclinic.data.examples import DataError, Examples
from polyclinic.learning.tasks.mr_reconstruction import columns, undersample

Annotation = Literal["full", "boxes", "labels", "none"]
ROLE: Mapping[Annotation, str] = {"full": "train", "boxes": "boxed", "labels": "tagged", "none": "unlabeled"}


def annotated(roles: Mapping[str, Examples], kind: Annotation, site: str) -> dict[str, Examples]:
    """``roles`` of ``site`` with its training examples under the role of ``kind``; its ``train`` is then empty.

    Raises:
        DataError: Where boxes or labels are asked for and the targets are no masks.
    """
    if kind == "full" or not roles.keys() & {"train", ROLE[kind]}:
        return dict(roles)
    weak = roles[ROLE[kind]] if kind == "none" else roles["train"]
    nothing = weak.subset(torch.zeros(0, dtype=torch.int64))
    if kind != "none" and weak.targets.ndim < 3:
        raise DataError(
            f'annotations gives {site} "{kind}", which are made from masks; this data has none: say "full" or "none"'
        )
    if kind == "boxes":
        weak = replace(weak, targets=boxes(weak.targets))
    if kind == "labels":
        weak = replace(weak, targets=weak.targets.flatten(1).amax(1).long())
    return {"train": nothing, **without(roles, "train"), ROLE[kind]: weak}


def without(roles: Mapping[str, Examples], role: str) -> dict[str, Examples]:
    """All but one of ``roles``."""
    return {name: examples for name, examples in roles.items() if name != role}


def boxes(masks: Tensor) -> Tensor:
    """Around the foreground of each mask [n, *spatial] the smallest box, filled with the mask's largest class."""
    found = torch.zeros_like(masks)
    for out, mask in zip(found, masks, strict=True):
        where = mask.nonzero()
        if len(where):
            low, high = where.amin(0).tolist(), where.amax(0).tolist()
            out[tuple(slice(a, b + 1) for a, b in zip(low, high, strict=True))] = mask.amax()
    return found


def accelerated(examples: Examples, factor: float, center: float, rng: torch.Generator) -> Examples:
    """Images as an accelerated scanner would show them, with the full images as targets.

    Of the columns of k-space one in ``factor`` is measured, a share ``center`` around the middle among them; the same
    columns for all ``examples``, as of one protocol.
    """
    if examples.inputs.ndim < 4:
        raise DataError("accelerate = ... is for images; these examples are rows of a table")
    kept = columns(examples.inputs.shape[-1], factor, center, rng)
    full = examples.inputs.float() / 255 if examples.inputs.dtype == torch.uint8 else examples.inputs
    return replace(examples, inputs=undersample(full, kept) if len(full) else full, targets=full)
