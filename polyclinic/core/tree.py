"""Trees: flat mappings from dotted names to tensors, and arithmetic on them.

A ``state_dict`` is a tree, so models, messages and files share one structure. Functions do not modify their arguments,
except those whose names end in ``_``, as in PyTorch.
"""

import cmath
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TypeAlias

import torch
from torch import Tensor

Tree: TypeAlias = Mapping[str, Tensor]
Trees: TypeAlias = Mapping[str, Tree]
CACHED = 2**21
"""Bytes of a block of a sum, so that it stays in the cache of a processor while all summands are added."""


def zip_with(f: Callable[..., Tensor], first: Tree, *others: Tree) -> Tree:
    """Apply ``f`` leaf by leaf. Every tree must have the names of ``first``."""
    for other in others:
        _require_same_names(first, other)
    return {name: f(leaf, *(other[name] for other in others)) for name, leaf in first.items()}


def add(a: Tree, b: Tree) -> Tree:
    """Return ``a + b``."""
    return zip_with(torch.add, a, b)


def add_(a: Tree, b: Tree) -> None:
    """Compute ``a ← a + b`` in place."""
    _require_same_names(a, b)
    for name, leaf in a.items():
        leaf.add_(b[name])


def sum_of(trees: Sequence[Tree], buffer: Tree | None = None) -> tuple[Tree, bool]:
    """Return the sum of trees of the same form, and whether it is finite, in one pass over memory.

    Of one tree, the sum is the tree itself. Otherwise blocks that fit the processor's cache are summed from left to
    right and checked while they are there. The bits are those of ``add``. A sum that is finite has finite summands.

    Args:
        trees: The trees, on one device.
        buffer: A tree of the same form, to which the sum is written; it must share no memory with ``trees``.
    """
    if len(trees) == 1:
        return trees[0], finite(trees[0])
    for other in trees[1:]:
        _require_same_names(trees[0], other)
    total = {name: _space(leaf, None if buffer is None else buffer[name]) for name, leaf in trees[0].items()}
    if nbytes(total) <= CACHED:
        _sum_small(trees, total)
        return total, finite(total)
    sound = True
    for name, leaf in total.items():
        checks = []
        for block, one, two, *others in _blocks(leaf, [tree[name] for tree in trees]):
            torch.add(one, two, out=block)
            for summand in others:
                block.add_(summand)
            checks.append(_finite_sum(block))
        sound = sound and (all(checks) or finite_leaf(leaf))
    return total, sound


def _space(like: Tensor, buffer: Tensor | None) -> Tensor:
    """Return ``buffer``, or a new tensor if there is none on the device of ``like``."""
    if buffer is not None and buffer.device == like.device:
        return buffer
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


def _sum_small(trees: Sequence[Tree], total: Tree) -> None:
    """Write the sum of ``trees`` to ``total``, tree by tree: many small tensors are added in one call."""
    sums = list(total.values())
    for leaf, one, two in zip(sums, trees[0].values(), map(trees[1].__getitem__, total), strict=True):
        torch.add(one, two, out=leaf)
    for other in trees[2:] if sums else ():
        torch._foreach_add_(sums, [other[name] for name in total])


def _blocks(leaf: Tensor, others: Sequence[Tensor]) -> Iterable[Sequence[Tensor]]:
    """Return the blocks of ``leaf``, each with those of ``others``."""
    if leaf.nbytes <= CACHED or not leaf.is_contiguous():
        return [(leaf, *others)]
    size = max(CACHED // leaf.element_size(), 1)
    return zip(leaf.view(-1).split(size), *(other.reshape(-1).split(size) for other in others), strict=True)


def sub(a: Tree, b: Tree, out: Tree = MappingProxyType({})) -> Tree:
    """Return ``a - b``; the leaves of ``out`` are overwritten with those of their names."""
    _require_same_names(a, b)
    return {name: torch.sub(leaf, b[name], out=out.get(name)) for name, leaf in a.items()}


def sub_(a: Tree, b: Tree) -> None:
    """Compute ``a ← a - b`` in place."""
    _require_same_names(a, b)
    for name, leaf in a.items():
        leaf.sub_(b[name])


def mul(a: Tree, b: Tree) -> Tree:
    """Return ``a · b``, element by element."""
    return zip_with(torch.mul, a, b)


def scale(a: Tree, by: float) -> Tree:
    """Return ``by · a``."""
    return {name: leaf * by for name, leaf in a.items()}


def scale_(a: Tree, by: float) -> None:
    """Compute ``a ← by · a`` in place."""
    if a:
        torch._foreach_mul_(list(a.values()), by)


def lerp(a: Tree, b: Tree, share: float) -> Tree:
    """Return ``(1 - share) · a + share · b``."""
    return zip_with(lambda x, y: torch.lerp(x, y, share), a, b)


def shift(a: Tree, by: Tree, times: float = 1.0) -> Tree:
    """Return ``a + times · by``. ``by`` may have only some of the leaves of ``a``."""
    if unknown := by.keys() - a.keys():
        raise ValueError(f"cannot add to unknown leaves {sorted(unknown)[:5]}")
    return {**a, **{name: _shifted(a[name], step, times) for name, step in by.items()}}


def _shifted(leaf: Tensor, step: Tensor, times: float) -> Tensor:
    if times == 1.0 or step.dtype != leaf.dtype or step.shape != leaf.shape:
        return leaf + (step if times == 1.0 else step * times)
    return (step * times).add_(leaf)  # the same bits with one tensor less


def zeros(a: Tree) -> Tree:
    """Return zeros in the shapes of ``a``."""
    return {name: torch.zeros_like(leaf) for name, leaf in a.items()}


def copy(a: Tree) -> Tree:
    """Return a copy that shares no memory with ``a``."""
    return {name: leaf.clone() for name, leaf in a.items()}


def dot(a: Tree, b: Tree) -> float:
    """Return ``⟨a, b⟩`` over all leaves as one vector, in double precision."""
    _require_same_names(a, b)
    return math.fsum(float(torch.sum(leaf.double() * b[name].double())) for name, leaf in a.items())


def norm(a: Tree) -> float:
    """Return the Euclidean norm of all leaves as one vector, in double precision."""
    return math.sqrt(dot(a, a))


def cosine(a: Tree, b: Tree) -> float:
    """Return ``cos ∠(a, b)``; 0 if either is 0."""
    size = norm(a) * norm(b)
    return dot(a, b) / size if size else 0.0


def select(a: Tree, keep: Callable[[str], bool]) -> Tree:
    """Return the leaves whose names satisfy ``keep``."""
    return {name: leaf for name, leaf in a.items() if keep(name)}


def flatten(a: Tree) -> Tensor:
    """Concatenate all leaves in order to one vector of shape [size]."""
    return torch.cat([leaf.reshape(-1) for leaf in a.values()]) if a else torch.zeros(0)


def unflatten(vector: Tensor, like: Tree) -> Tree:
    """Split ``vector`` into leaves with the names and shapes of ``like``, the inverse of ``flatten``."""
    leaves = vector.split([leaf.numel() for leaf in like.values()])
    return {name: leaf.reshape(like[name].shape) for name, leaf in zip(like, leaves, strict=True)}


def size(a: Tree) -> int:
    """Return the number of elements of ``a``."""
    return sum(leaf.numel() for leaf in a.values())


def nbytes(a: Tree) -> int:
    """Return the size of the elements of ``a`` in bytes."""
    return sum(leaf.nbytes for leaf in a.values())


def finite(a: Tree) -> bool:
    """Return whether no leaf contains NaN or infinity."""
    return all(finite_leaf(leaf) for leaf in a.values())


def finite_leaf(leaf: Tensor) -> bool:
    """Return whether ``leaf`` contains neither NaN nor infinity.

    A sum over NaN or infinity is not finite, and computing it is faster than a mask of the same size. The elements are
    checked only if the sum is not finite, which an overflow can also cause.
    """
    return _finite_sum(leaf) or bool(torch.isfinite(leaf).all())


def _finite_sum(leaf: Tensor) -> bool:
    """Return whether the sum of all elements is finite; True for integers."""
    return not (leaf.is_floating_point() or leaf.is_complex()) or cmath.isfinite(leaf.sum().item())


def prefixed(prefix: str, a: Tree) -> Tree:
    """Prefix every name of ``a`` with ``prefix.``, so that several trees can be sent as one."""
    return {f"{prefix}.{name}": leaf for name, leaf in a.items()}


def under(prefix: str, a: Tree) -> Tree:
    """Return the leaves of ``a`` whose names begin with ``prefix.``, without it. The inverse of ``prefixed``."""
    start = f"{prefix}."
    return {name.removeprefix(start): leaf for name, leaf in a.items() if name.startswith(start)}


def _require_same_names(a: Tree, b: Tree) -> None:
    if a.keys() != b.keys():
        raise ValueError(f"trees differ in {sorted(a.keys() ^ b.keys())[:5]}")
