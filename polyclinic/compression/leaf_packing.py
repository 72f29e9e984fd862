"""Packing of a leaf that a codec splits into several tensors."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from polyclinic.core.tree import Tree
from polyclinic.errors import ProtocolError

Parts = dict[str, Tensor]
CHANGES = ("update", "control", "change")  # names of reply parts that the server adds to its state


def pack(leaves: Mapping[str, Parts]) -> Tree:
    """Combine the parts of all leaves in one tree, with names ``leaf:part``. ``unpack`` is the inverse."""
    return {f"{name}:{part}": x for name, parts in leaves.items() for part, x in parts.items()}


def unpack(packed: Tree) -> dict[str, Parts]:
    """Return the parts of every leaf, by the leaf's name.

    Raises:
        ValueError: If a name has no part.
    """
    leaves: dict[str, Parts] = {}
    for key, x in packed.items():
        name, colon, part = key.rpartition(":")
        if not colon:
            raise ProtocolError(f"{key!r} is not the name of a packed part")
        leaves.setdefault(name, {})[part] = x
    return leaves


def may_lose(key: str, leaf: Tensor, parts: tuple[str, ...]) -> bool:
    """Return whether a lossy codec may encode a leaf: real, more than one number, and of a part in ``parts``.

    Other parts, such as statistics, prototypes and weights, do not accumulate over rounds, so an error in them would
    not be corrected later. They are sent without loss.
    """
    return leaf.numel() > 1 and leaf.is_floating_point() and not set(parts).isdisjoint(key.split("/")[1:])


def shape_tag(leaf: Tensor) -> Tensor:
    """Return an empty tensor that carries the shape of ``leaf``. It can be summed, and takes no bytes."""
    return torch.empty(0, *leaf.shape)


def shape_in(tag: Tensor, limit: int) -> torch.Size:
    """Return the shape in the result of ``shape_tag``.

    Raises:
        ValueError: If a tensor of this shape would have more than ``limit`` numbers, so that a small message would
            make the server allocate much memory.
    """
    if tag.ndim < 1 or tag.shape[0] != 0:
        raise ProtocolError(f"{tuple(tag.shape)} has no shape")
    if (size := math.prod(tag.shape[1:])) > limit:
        raise ProtocolError(f"a tensor of {size} numbers exceeds the limit of {limit} for this model")
    return tag.shape[1:]


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack integers below 2^bits (shape [n], uint8), 8 / bits per byte. ``bits`` is 1, 2, 4 or 8."""
    each = 8 // bits
    padded = torch.nn.functional.pad(codes, (0, -len(codes) % each)).reshape(-1, each)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    packed: Tensor = (padded << shifts).sum(1, dtype=torch.uint8)
    return packed


def unpack_bits(packed: Tensor, bits: int, size: int) -> Tensor:
    """Unpack the result of ``pack_bits``. Shape [size], uint8.

    Raises:
        ValueError: If ``packed`` does not have the length for ``size`` numbers.
    """
    each = 8 // bits
    if packed.dtype != torch.uint8 or packed.shape != (-(-size // each),):
        raise ProtocolError(f"{tuple(packed.shape)} bytes do not contain {size} numbers of {bits} bits")
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    codes: Tensor = (packed[:, None] >> shifts) & (2**bits - 1)
    return codes.reshape(-1)[:size]
