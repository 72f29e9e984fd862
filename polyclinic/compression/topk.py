"""Sparse replies: the largest coordinates now, the rest later.

Sebastian Stich, Jean-Baptiste Cordonnier and Martin Jaggi, "Sparsified SGD with Memory", NeurIPS 2018, Algorithm 1,
https://arxiv.org/abs/1809.07599. What a site does not send, it adds to its next reply ("error feedback").

A support that each site chooses by itself does not add up. So there are two ways: ``shared=False`` is the
paper's, with positions sent beside the values; with ``shared=True`` the server names the positions for all, and
only values travel. The server's choice is ours: those that lately gained most in a round, and, for the share
``explore``, those that were not sent for the longest time. So every coordinate is sent at least once in
2 / (fraction · explore) rounds or so, and what sites remember stays small.
"""

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from polyclinic.compression.leaf_packing import CHANGES, Parts, may_lose, pack, shape_in, shape_tag, unpack
from polyclinic.compression.quantization import number_limit, too_late
from polyclinic.core.aggregates import WeightedMean
from polyclinic.core.pipeline import Transform
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ProtocolError


@dataclass(frozen=True)
class TopK(Transform):
    """Sends ``fraction`` of the coordinates of every tensor.

    Attributes:
        fraction: How many, of 1. A tensor always sends one at least.
        shared: Whether all sites send the same positions. Left out, they do where sums or privacy come after.
        explore: Which share of a shared support goes to the coordinates that have waited longest.
        feedback: Whether a site remembers what it has not sent.
        parts: The parts of a reply that are encoded, by name. Vectors travel whole.
    """

    fraction: float
    shared: bool | None = None
    explore: float = 0.5
    feedback: bool = True
    parts: tuple[str, ...] = field(default=CHANGES, kw_only=True)

    dense: ClassVar[bool] = False

    @property
    def additive(self) -> bool:
        """With a shared support."""
        return self.shared is True

    def resolve(self, after: tuple[Transform, ...]) -> Transform:
        """With ``shared`` decided."""
        if self.shared is not None:
            return self
        return replace(self, shared=any(t.secure or t.private for t in after))

    def validate(self, before: tuple[Transform, ...], after: tuple[Transform, ...]) -> list[str]:
        """Fractions are fractions; and where it remembers, places are places."""
        found = too_late(self, before) if self.feedback else []
        if not 0 < self.fraction <= 1:
            found.append(f"TopK: fraction must be above 0 and at most 1, not {self.fraction}")
        if not 0 <= self.explore <= 1:
            found.append(f"TopK: explore must be between 0 and 1, not {self.explore}")
        return found

    def init(self, params: Tree) -> Trees:
        """No support yet: the first is drawn from the tensors' names."""
        return {"support": {}, "gain": {}, "age": {}, "limit": {"numbers": number_limit(params)}}

    def describe(self, state: Trees) -> Trees:
        """The shared support."""
        return {"support": state["support"]} if self.shared else {}

    def encode(
        self, sent: WeightedMean, notes: Trees, memory: Trees, site: Site, round: int
    ) -> tuple[WeightedMean, Trees]:
        """The chosen coordinates of reply plus residual; what is left is the new residual."""
        old = memory.get("residual", {})
        leaves: dict[str, Parts] = {}
        residual: dict[str, Tensor] = {}
        for name, leaf in sent.total.items():
            if leaf.ndim < 2 or not may_lose(name, leaf, self.parts):
                leaves[name] = {"raw": leaf}
                continue
            whole = leaf.reshape(-1)
            if self.feedback and name in old and old[name].numel() == whole.numel():
                whole = whole + old[name]
            if self.shared:
                index = notes.get("support", {}).get(name)
                index = self._first(name, whole.numel()) if index is None else index.long()
                leaves[name] = {"values": whole[index], "shape": shape_tag(leaf)}
            else:
                index = whole.abs().topk(self._size(whole.numel())).indices.sort().values
                leaves[name] = {"values": whole[index], "index": index.int(), "shape": shape_tag(leaf)}
            if self.feedback:
                residual[name] = whole.index_fill(0, index, 0.0)
        return WeightedMean(pack(leaves), sent.weight), {"residual": residual} if self.feedback else {}

    def decode(self, received: WeightedMean, state: Trees) -> tuple[WeightedMean, Trees]:
        """Zeros, with the received values in their places."""
        limit, dense = int(state["limit"]["numbers"]), dict[str, Tensor]()
        support, gain, age = dict(state["support"]), dict(state["gain"]), dict(state["age"])
        for name, parts in unpack(received.total).items():
            if "raw" in parts:
                dense[name] = parts["raw"]
                continue
            values, shape = parts["values"], shape_in(parts["shape"], limit)
            size = math.prod(shape)
            limit -= size
            if values.shape != (self._size(size),):
                raise ProtocolError(f"{name}: {tuple(values.shape)} values, where {self._size(size)} were asked for")
            index = self._index(name, parts, size, state)
            dense[name] = torch.zeros(size, dtype=values.dtype).index_put_((index,), values).reshape(shape)
            if self.shared:
                waited = age.get(name, torch.zeros(size)) + 1
                known = gain.get(name, torch.zeros(size))
                gain[name] = known.index_put((index,), values.abs() / waited[index])
                age[name] = waited.index_fill(0, index, 0.0)
                support[name] = self._choose(gain[name], age[name]).int()
        return WeightedMean(dense, received.weight), {**state, "support": support, "gain": gain, "age": age}

    def _index(self, name: str, parts: Parts, size: int, state: Trees) -> Tensor:
        if self.shared:
            known = state["support"].get(name)
            return self._first(name, size) if known is None else known.long()
        index = parts["index"].long()
        if index.shape != parts["values"].shape or not bool((index[1:] > index[:-1]).all()):
            raise ProtocolError(f"{name}: positions must rise, one for each value")
        if int(index[0]) < 0 or int(index[-1]) >= size:
            raise ProtocolError(f"{name}: a position beyond {size} numbers")
        return index

    def _choose(self, gain: Tensor, age: Tensor) -> Tensor:
        """The best, and of the others the oldest."""
        size = self._size(gain.numel())
        best = gain.topk(size - int(size * self.explore)).indices
        oldest = age.index_fill(0, best, -1.0).topk(size - best.numel()).indices
        return torch.cat([best, oldest]).sort().values

    def _first(self, name: str, numel: int) -> Tensor:
        """A support that everyone draws alike, before anything is known."""
        drawn = torch.rand(numel, generator=Site("everyone").rng("support", name))
        return self._choose(drawn, torch.zeros(numel))

    def _size(self, numel: int) -> int:
        return max(1, math.ceil(self.fraction * numel))
