"""Labels of masks: masks of several channels as one label per voxel, and which values are classes.

A stray value (a JPEG artifact, a mask of 0 and 255 among masks of 0 and 1) must not become a class. The loader and
``data check`` both decide with ``label_problems``.
"""

import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from polyclinic.data.formats.safe_reading import Unreadable
from polyclinic.learning.tasks.segmentation import IGNORED as IGNORED

WHITE = 255


def single_map(path: str | os.PathLike[str], channels: Tensor, regions: Sequence[int]) -> Tensor:
    """Return one label per voxel from a mask of several channels [C, Z, Y, X].

    Args:
        path: The file, for errors.
        channels: Labels of each channel; a channel is a region where it is not 0.
        regions: The label of each channel, in the order in which they are painted, later over earlier: ``(0, 1, 2)``
            for one-hot masks, ``(1, 2, 3)`` for nested regions from the outermost.

    Raises:
        Unreadable: If the mask has several channels and ``regions`` does not describe them.
    """
    count = len(channels)
    if count == 1 and not regions:
        return channels[0]
    inside = channels != 0
    together = inside.sum(0)
    exclusive = bool((together == 1).all())
    binary = bool((channels <= 1).all()) or bool(((channels == 0) | (channels == WHITE)).all())
    if not regions:
        kind = "one-hot" if exclusive else "overlapping" if bool((together > 1).any()) else "separate"
        example = list(range(count)) if exclusive else list(range(1, count + 1))
        hint = f"state the label of each with regions = {example}, if this is right" if binary else "save one label map"
        values = f"{kind} regions" if binary else "numbers other than 0 and 1"
        raise Unreadable(path, f"is a mask of {count} channels that hold {values}: {hint}")
    if len(regions) != count:
        raise Unreadable(path, f"is a mask of {count} channels, and regions names {len(regions)} labels")
    if not binary:
        raise Unreadable(path, f"is a mask of {count} channels that hold other values than 0 and 1")
    if 0 in regions and not exclusive:
        raise Unreadable(path, "is not a one-hot mask: some voxels are in several channels or in none")
    labels = torch.zeros(channels.shape[1:], dtype=channels.dtype)
    for label, region in zip(regions, inside, strict=True):
        labels[region] = label
    return labels


def labels_in(mask: Tensor) -> tuple[int, ...]:
    """Return the values of a mask, in ascending order; ``IGNORED`` may be among them."""
    counts = (mask.flatten().long() - IGNORED).bincount()
    return tuple(int(value) + IGNORED for value in counts.nonzero().flatten())


def black_and_white(found: Mapping[str, Collection[int]], declared: Collection[int] | None = None) -> bool:
    """Return whether all masks have only the values 0 and 255, which mean 0 and 1."""
    used = {label for labels in found.values() for label in labels} - {0, IGNORED}
    return used == {WHITE} and WHITE not in (declared or ())


def label_problems(found: Mapping[str, Collection[int]], declared: Collection[int] | None = None) -> list[str]:
    """Return what is wrong with the values of masks, with counts.

    Values must be declared. Without a declaration they must be 0, 1, 2, ... without gaps, and if there are several
    foreground labels each must occur in every mask that is not empty.

    Args:
        found: The values in each mask, by name of the example.
        declared: The allowed values; None if nothing declares them.
    """
    if black_and_white(found, declared):
        return []
    masks = [set(labels) - {0, IGNORED} for labels in found.values()]
    counts = Counter(label for labels in masks for label in labels)
    drawn = sum(bool(labels) for labels in masks)
    remedy = 'correct the masks, or map their values with {step = "relabel", values = [...]}'
    if declared is not None:
        strange = {label: n for label, n in counts.items() if label not in declared}
        if not strange:
            return []
        known = _some(sorted({0, *declared}))
        return [
            f"masks contain values that are not declared as labels: {_counted(strange, len(masks))}. Declared are "
            f"{known}: {remedy}"
        ]
    if {WHITE} in masks and any(labels and WHITE not in labels for labels in masks):
        return [
            f"some masks mark the foreground with 255 and others with other numbers: "
            f"{_counted(counts, len(masks))}. Save all with the same labels"
        ]
    if sorted(counts) != list(range(1, len(counts) + 1)):
        return [
            f"mask values are not 0, 1, 2, ...: {_counted(counts, len(masks))}. Correct the masks, or map their "
            'values with {step = "relabel", values = [...]}'
        ]
    rare = {label: n for label, n in counts.items() if n < drawn}
    if len(counts) > 1 and rare:
        return [
            f"labels that are not in every mask may be stray values: {_counted(rare, drawn)}. If they are classes, "
            "name all with classes = [...]"
        ]
    return []


def _counted(counts: Mapping[int, int], total: int) -> str:
    """Return ``2 (in 4 of 10 masks), 7 (in 1)``."""
    listed = [
        f"{label} (in {counts[label]}{f' of {total} masks' if i == 0 else ''})"
        for i, label in enumerate(sorted(counts)[:8])
    ]
    return ", ".join(listed) + (f" and {len(counts) - 8} more values" if len(counts) > 8 else "")


def _some(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:12])) + (", ..." if len(numbers) > 12 else "")
