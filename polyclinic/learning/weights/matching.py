"""Match the tensors of a weights file with those of a network, and account for every one of both.

There is no silent partial loading: a tensor that is neither loaded nor named as skipped is an error, and all of them
are listed together. Adaptations are linear maps of the given tensor, which a study must ask for:

* ``stem``: convolutions of another number of input channels. ``sum`` gives ``W'[:, j] = Σ_c W[:, c] / m`` for m
  channels, which is exact for a gray image that was replicated; ``mean`` divides that by the number of given channels.
* ``inflate``: 2-D convolutions for volumes, of size k along the added axis. ``mean`` gives ``W / k`` at each position,
  which is exact for inputs that are constant along the axis (Carreira and Zisserman, "Quo vadis, action recognition?",
  CVPR 2017, section 2.3, https://arxiv.org/abs/1705.07750); ``center`` puts W in the middle and 0 on either side.
* ``grid``: learned position embeddings of another grid of patches, by bicubic interpolation (Dosovitskiy et al., "An
  Image is Worth 16x16 Words", ICLR 2021, section 3.2, https://arxiv.org/abs/2010.11929); trilinear for volumes. Class
  and register tokens are not interpolated.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from polyclinic.core.tree import Tree
from polyclinic.errors import ConfigError

LEAST = 0.5
"""The least share of the numbers before the head that must come from the file."""
TOKENS = (0, 1, 2, 5)
"""Numbers of class and register tokens in front of a grid of position embeddings."""
SHOWN = 20
"""The number of tensors that a message lists."""


class Mismatch(ConfigError):
    """Start weights that do not fit a network. The message accounts for every tensor that does not fit."""


@dataclass(frozen=True)
class StartWeights:
    """Weights by their hash, and how their names and shapes become those of a network.

    Attributes:
        sha256: Hash of the file in the store.
        strip: Prefix that is removed from names. Tensors without it are not used.
        rename: Pairs of prefixes: the file's, and the network's that replaces it. Applied after ``strip``.
        skip: Patterns of names, of the network's tensors that keep their random start, and of the file's that are not
            used.
        head: Whether the head, from representation to prediction, is loaded too. By default it starts at random,
            because a head of equal shape may belong to another task.
        stem: How convolutions of another number of input channels are adapted.
        inflate: How 2-D convolutions become 3-D.
        inflate_axis: The axis of volumes that 2-D weights lack: 0, 1 or 2.
        grid: How position embeddings of another grid are adapted.
        norm_momentum: Momentum of the running statistics of batch normalization, in (0, 1]; None for the network's own.
    """

    sha256: str
    strip: str = ""
    rename: tuple[tuple[str, str], ...] = ()
    skip: tuple[str, ...] = ()
    head: bool = False
    stem: Literal["refuse", "sum", "mean"] = "refuse"
    inflate: Literal["refuse", "mean", "center"] = "refuse"
    inflate_axis: int = 2
    grid: Literal["refuse", "interpolate"] = "refuse"
    norm_momentum: float | None = None


@dataclass(frozen=True)
class Matched:
    """The account of a match. Each tensor of the network is in ``loaded`` or ``new``.

    Attributes:
        leaves: The tensors for the network, by its names.
        loaded: Names of the network's tensors that come from the file.
        new: Names of those that keep their random start: the head, and what ``skip`` names.
        adapted: Of ``loaded``, those that were adapted, with a sentence each.
        unused: Names of the file's tensors that are not used, on purpose.
        numbers: How many numbers of the network were loaded, and how many it has.
    """

    leaves: Tree
    loaded: tuple[str, ...]
    new: tuple[str, ...]
    adapted: Mapping[str, str]
    unused: tuple[str, ...]
    numbers: tuple[int, int]

    @property
    def summary(self) -> str:
        """The account in one sentence."""
        share = 100 * self.numbers[0] / max(self.numbers[1], 1)
        parts = [
            f"{len(self.loaded)} of {len(self.loaded) + len(self.new)} tensors loaded ({share:.1f} % of the numbers)"
        ]
        if self.adapted:
            parts.append(f"{len(self.adapted)} of them adapted")
        if self.new:
            parts.append(f"{len(self.new)} start at random ({_some(self.new)})")
        if self.unused:
            parts.append(f"{len(self.unused)} of the file not used ({_some(self.unused)})")
        return "; ".join(parts)


def match(
    own: Mapping[str, Tensor],
    given: Tree,
    start: StartWeights,
    in_head: Callable[[str], bool],
    aliases: Collection[str] = (),
) -> Matched:
    """Match the tensors ``given`` by a file with those of a network.

    Args:
        own: The network's floating-point tensors, each under its first name. Only their shapes are used.
        given: The file's tensors.
        start: How names and shapes are mapped.
        in_head: Whether a name belongs to the network's head.
        aliases: Further names of the network's tensors, which a file may repeat.

    Raises:
        Mismatch: If a tensor of either is unaccounted for, or less than half of the numbers before the head are loaded.
            The message lists all of them and suggests what to set.
    """
    named, unused = _renamed(given, start)
    leaves: dict[str, Tensor] = {}
    new, wrong, adapted = list[str](), list[str](), dict[str, str]()
    for name, leaf in own.items():
        if _any(name, start.skip) or (in_head(name) and not start.head):
            new.append(name)
        elif name not in named:
            wrong.append(f"{name} {_shape(leaf)} is not in the file")
        else:
            try:
                leaves[name], how = _adapted(name, leaf, named[name], start)
            except Mismatch as error:
                wrong.append(str(error))
            else:
                adapted |= {name: how} if how else {}
    for name in named.keys() - own.keys():
        if _any(name, start.skip) or in_head(name) or name in aliases:
            unused.append(name)
        else:
            wrong.append(f"{name} {_shape(named[name])} of the file is not in the network")
    unused += sorted(named.keys() & set(new))
    before = [name for name in own if not in_head(name)]
    total = sum(own[name].numel() for name in before)
    loaded = sum(own[name].numel() for name in before if name in leaves)
    if wrong:
        raise Mismatch(_explained(wrong, own, named, start))
    if loaded < LEAST * total:
        raise Mismatch(
            f"only {loaded} of the {total} numbers before the head come from the file, less than {LEAST:.0%}: "
            "this is nearly a random start. Shorten skip, or choose the network that the weights are for"
        )
    numbers = sum(own[n].numel() for n in leaves), sum(leaf.numel() for leaf in own.values())
    return Matched(leaves, tuple(leaves), tuple(new), adapted, tuple(sorted(unused)), numbers)


def _renamed(given: Tree, start: StartWeights) -> tuple[dict[str, Tensor], list[str]]:
    """Return the file's tensors under the network's names, and the names without the prefix ``strip``."""
    named, apart = dict[str, Tensor](), list[str]()
    for name, leaf in given.items():
        if not name.startswith(start.strip):
            apart.append(name)
            continue
        own = name.removeprefix(start.strip)
        for old, new in start.rename:
            if own.startswith(old):
                own = new + own.removeprefix(old)
                break
        if own in named:
            raise Mismatch(f"two tensors of the file become {own!r} after strip and rename")
        named[own] = leaf
    if start.strip and not named:
        raise Mismatch(
            f"no name in the file begins with strip = {start.strip!r}; they begin with {_some(sorted(given))}"
        )
    return named, apart


def _adapted(name: str, own: Tensor, given: Tensor, start: StartWeights) -> tuple[Tensor, str]:
    """Return ``given`` in the shape of ``own``, and what was changed.

    Raises:
        Mismatch: If the shapes differ in a way that the study did not ask to adapt.
    """
    if own.shape == given.shape:
        return given, ""
    leaf, how, key = given, list[str](), ""
    if own.ndim == 5 and leaf.ndim == 4:
        key, size = "inflate", own.shape[2 + start.inflate_axis]
        if start.inflate != "refuse":
            leaf = _inflated(leaf, size, start)
            how.append(f"inflated to {size} along axis {start.inflate_axis} ({start.inflate})")
    if own.ndim == leaf.ndim >= 3 and own.shape[1] != leaf.shape[1] and own.shape[2:] == leaf.shape[2:]:
        channels = leaf.shape[1], own.shape[1]
        if min(channels) == 1 or 3 in channels:
            key = key or "stem"
            if start.stem != "refuse":
                by = own.shape[1] if start.stem == "sum" else leaf.shape[1]
                leaf = (leaf.sum(1, keepdim=True) / by).expand_as(own)
                how.append(f"{channels[0]} input channels to {channels[1]} ({start.stem})")
    if own.ndim == leaf.ndim == 3 and own.shape[0] == leaf.shape[0] == 1 and own.shape[2] == leaf.shape[2]:
        key = "grid"
        if start.grid != "refuse":
            leaf = _regridded(name, leaf, own.shape[1])
            how.append(f"{given.shape[1]} positions to {own.shape[1]}")
    if leaf.shape != own.shape:
        ways = {"inflate": '"mean" or "center"', "stem": '"sum" or "mean"', "grid": '"interpolate"'}
        hint = f"; set {key} = {ways[key]}" if key and getattr(start, key) == "refuse" else ""
        raise Mismatch(f"{name} has shape {_shape(given)} in the file and {_shape(own)} in the network{hint}")
    return leaf.contiguous(), ", ".join(how)


def _inflated(leaf: Tensor, size: int, start: StartWeights) -> Tensor:
    axis = 2 + start.inflate_axis
    if start.inflate == "mean":
        return (leaf / size).unsqueeze(axis).repeat_interleave(size, axis)
    inflated = leaf.new_zeros(*leaf.shape[:axis], size, *leaf.shape[axis:])
    inflated.select(axis, size // 2).copy_(leaf)
    return inflated


def _regridded(name: str, leaf: Tensor, positions: int) -> Tensor:
    """Interpolate position embeddings [1, tokens + grid, width] of a square or cubic grid."""
    for tokens in TOKENS:
        for dims in (2, 3):
            old, new = (round(max(n - tokens, 0) ** (1 / dims)) for n in (leaf.shape[1], positions))
            if old and new and old**dims == leaf.shape[1] - tokens and new**dims == positions - tokens:
                extra, grid = leaf[:, :tokens], leaf[:, tokens:]
                cube = grid.mT.reshape(1, -1, *[old] * dims)
                mode = "bicubic" if dims == 2 else "trilinear"
                moved = F.interpolate(cube, [new] * dims, mode=mode, align_corners=False)
                return torch.cat([extra, moved.flatten(2).mT], 1)
    raise Mismatch(
        f"{name}: {leaf.shape[1]} positions in the file and {positions} in the network are not square or cubic grids "
        f"with the same number of class and register tokens ({', '.join(map(str, TOKENS))})"
    )


def _explained(wrong: list[str], own: Mapping[str, Tensor], named: Tree, start: StartWeights) -> str:
    listed = wrong[:SHOWN] + ([f"... and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else [])
    lines = "".join(f"\n  {line}" for line in listed)
    return f"{len(wrong)} tensors do not fit:{lines}{_hint(own, named, start)}"


def _hint(own: Mapping[str, Tensor], named: Tree, start: StartWeights) -> str:
    """Return a suggestion, if one prefix explains most of the names."""
    for candidate in {name[: name.index(".", i) + 1] for name in named for i in _dots(name)}:
        if sum(name.startswith(candidate) and name.removeprefix(candidate) in own for name in named) >= 0.9 * len(
            named
        ):
            return f'\nDid you mean strip = "{start.strip}{candidate}"?'
    inner = sum(name in own for name in named)
    for candidate in {name[: name.index(".", i) + 1] for name in own for i in _dots(name)}:
        if inner < sum(f"{candidate}{name}" in own for name in named) >= 0.5 * len(named):
            return f'\nDid you mean rename = {{ "" = "{candidate}" }}?'
    strange = [name for name in named if name not in own]
    tops = {name.split(".")[0] for name in strange}
    if strange and len(tops) <= 3 and len(strange) < 0.2 * len(named):
        patterns = ", ".join(f'"{top}.*"' for top in sorted(tops))
        return f"\nIf they are not needed, set skip = [{patterns}]"
    return ""


def _dots(name: str) -> list[int]:
    """Return the starts of the first three parts of a dotted name that end with a dot."""
    places, begin = list[int](), 0
    while len(places) < 3 and (end := name.find(".", begin)) >= 0:
        places.append(begin)
        begin = end + 1
    return places


def _any(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _shape(leaf: Tensor) -> str:
    return "x".join(map(str, leaf.shape)) or "scalar"


def _some(names: Collection[str]) -> str:
    first = list(names)[:3]
    return ", ".join(first) + (", ..." if len(names) > 3 else "")
