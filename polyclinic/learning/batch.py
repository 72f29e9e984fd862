"""The type of a minibatch."""

from typing import TypeAlias

from torch import Tensor

Batch: TypeAlias = tuple[Tensor, Tensor]
"""Inputs [b, ...] and targets [b, ...]."""
