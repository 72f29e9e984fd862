"""The type of a minibatch, and passes over all examples of a site."""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

Batch: TypeAlias = tuple[Tensor, Tensor]
"""Inputs [b, ...] and targets [b, ...]."""
MOST_VALUES = 2**24
"""Largest number of input values of a chunk of images that are on disk; 64 MiB as float32."""


def chunks(data: Any, size: int) -> Sequence[Tensor]:
    """Return the positions of all examples of ``data``, in chunks of at most ``size``.

    Chunks of images that are on disk (``data`` has a ``patch``) are smaller if their values would take too much memory.
    """
    if hasattr(data, "patch"):
        size = max(1, min(size, MOST_VALUES // math.prod(data.shape)))
    parts: Sequence[Tensor] = torch.arange(len(data)).split(size)
    return parts


def targets_of(data: Any) -> Tensor:
    """Return the targets of all examples of ``data``, without reading their images if these are on disk."""
    labels: Tensor | None = getattr(data, "labels", None) if hasattr(data, "patch") else None
    return torch.cat([data[chunk][1] for chunk in chunks(data, 256)]) if labels is None else labels
