"""How one leaf becomes several tensors under its name, and one leaf again."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from polyclinic.core.tree import Tree
from polyclinic.errors import ProtocolError

Parts = dict[str, Tensor]
CHANGES = ("update", "control", "change")  # what methods call the parts that the server adds to what it has


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
            raise ProtocolError(f"{key!r} was not packed")
        leaves.setdefault(name, {})[part] = x
    return leaves


def may_lose(key: str, leaf: Tensor, parts: tuple[str, ...]) -> bool:
    """Whether a codec that loses something may have this leaf: more than one number, real, and of a part in ``parts``.

    Statistics, prototypes and weights are not changes that add up over rounds: what is not sent of them now would be
    wrong later. They travel whole.
    """
    return leaf.numel() > 1 and leaf.is_floating_point() and not set(parts).isdisjoint(key.split("/")[1:])


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
        raise ProtocolError(f"{tuple(tag.shape)} carries no shape")
    if (size := math.prod(tag.shape[1:])) > limit:
        raise ProtocolError(f"a tensor of {size} numbers, where at most {limit} fit this model")
    return tag.shape[1:]


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Whole numbers below 2^bits (shape [n], uint8), 8 / bits to a byte. ``bits`` is 1, 2, 4 or 8."""
    each = 8 // bits
    padded = torch.nn.functional.pad(codes, (0, -len(codes) % each)).reshape(-1, each)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    packed: Tensor = (padded << shifts).sum(1, dtype=torch.uint8)
    return packed


def unpack_bits(packed: Tensor, bits: int, size: int) -> Tensor:
    """The inverse of ``pack_bits``. Shape [size], uint8.

    Raises:
        ValueError: Where ``packed`` is not as long as ``size`` numbers take.
    """
    each = 8 // bits
    if packed.dtype != torch.uint8 or packed.shape != (-(-size // each),):
        raise ProtocolError(f"{tuple(packed.shape)} bytes do not hold {size} numbers of {bits} bits")
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    codes: Tensor = (packed[:, None] >> shifts) & (2**bits - 1)
    return codes.reshape(-1)[:size]
