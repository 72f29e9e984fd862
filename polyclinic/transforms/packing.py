"""How one leaf becomes several tensors under its name, and one leaf again."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from polyclinic.core.tree import Tree

Parts = dict[str, Tensor]


def pack(leaves: Mapping[str, Parts]) -> Tree:
    """One tree with the names ``leaf:part``. ``unpack`` is its inverse."""
    return {f"{name}:{part}": x for name, parts in leaves.items() for part, x in parts.items()}


def unpack(packed: Tree) -> dict[str, Parts]:
    """The parts of every leaf, by the leaf's name.

    Raises:
        ValueError: Where a name has no part.
    """
    leaves: dict[str, Parts] = {}
    for key, x in packed.items():
        name, colon, part = key.rpartition(":")
        if not colon:
            raise ValueError(f"{key!r} was not packed")
        leaves.setdefault(name, {})[part] = x
    return leaves


def shape_tag(leaf: Tensor) -> Tensor:
    """A tensor without numbers that carries the shape of ``leaf``. It adds up, and takes no bytes."""
    return torch.empty(0, *leaf.shape)


def shape_in(tag: Tensor, limit: int) -> torch.Size:
    """The inverse of ``shape_tag``.

    Raises:
        ValueError: Where a tensor of this shape would hold more than ``limit`` numbers: a small message must not
            make the server reserve much memory.
    """
    if tag.ndim < 1 or tag.shape[0] != 0:
        raise ValueError(f"{tuple(tag.shape)} carries no shape")
    if (size := math.prod(tag.shape[1:])) > limit:
        raise ValueError(f"a tensor of {size} numbers, where at most {limit} fit this model")
    return tag.shape[1:]
