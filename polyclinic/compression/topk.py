"""Sparse replies: the largest coordinates now, the rest by error feedback later.

Sebastian Stich, Jean-Baptiste Cordonnier and Martin Jaggi, "Sparsified SGD with Memory", NeurIPS 2018, Algorithm 1,
https://arxiv.org/abs/1809.07599. A site adds the values that it does not send to its next reply ("error feedback").

Supports that sites choose individually cannot be summed. With ``shared=False``, as in the paper, positions are sent
with the values. With ``shared=True`` the server determines the positions for all sites, and only values are sent. The
server's choice is not from the paper: it selects the coordinates with the largest recent gain per round and, for the
fraction ``explore``, those that were not sent for the longest time. Every coordinate is therefore sent at least once in
about 2 / (fraction · explore) rounds, which limits the residuals.
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
        fraction: Fraction of the coordinates, at least one per tensor.
        shared: Whether all sites send the same positions. By default if secure summation or privacy follows.
        explore: Fraction of a shared support for the coordinates that were not sent for the longest time.
        feedback: Whether a site uses error feedback.
        parts: The parts of a reply that are encoded, by name. Vectors are sent losslessly.
    """

    fraction: float
    shared: bool | None = None
    explore: float = 0.5
    feedback: bool = True
    parts: tuple[str, ...] = field(default=CHANGES, kw_only=True)

    dense: ClassVar[bool] = False

    @property
    def additive(self) -> bool:
        """Whether the support is shared."""
        return self.shared is True

    def resolve(self, after: tuple[Transform, ...]) -> Transform:
        """Return the transform with ``shared`` decided."""
        if self.shared is not None:
            return self
        return replace(self, shared=any(t.secure or t.private for t in after))

    def validate(self, before: tuple[Transform, ...], after: tuple[Transform, ...]) -> list[str]:
        """Check the fractions, and the position of error feedback."""
        problems = too_late(self, before) if self.feedback else []
        if not 0 < self.fraction <= 1:
            problems.append(f"TopK: fraction must be above 0 and at most 1, not {self.fraction}")
        if not 0 <= self.explore <= 1:
            problems.append(f"TopK: explore must be between 0 and 1, not {self.explore}")
        return problems

    def init(self, params: Tree) -> Trees:
        """Return a state without a support; the first is drawn from the tensors' names."""
        return {"support": {}, "gain": {}, "age": {}, "limit": {"numbers": number_limit(params)}}

    def describe(self, state: Trees) -> Trees:
        """Return the shared support."""
        return {"support": state["support"]} if self.shared else {}

    def encode(
        self, sent: WeightedMean, notes: Trees, memory: Trees, site: Site, round: int
    ) -> tuple[WeightedMean, Trees]:
        """Send the chosen coordinates of reply plus residual; the others are the new residual."""
        old = memory.get("residual", {})
        leaves: dict[str, Parts] = {}
        residual = {name: leaf for name, leaf in old.items() if name not in sent.total}  # sent in other rounds
        for name, leaf in sent.total.items():
            if leaf.ndim < 2 or not may_lose(name, leaf, self.parts):
                leaves[name] = {"raw": leaf}
                continue
            flat = leaf.reshape(-1)
            if self.feedback and name in old and old[name].numel() == flat.numel():
                flat = flat + old[name]
            if self.shared:
                index = notes.get("support", {}).get(name)
                index = self._first(name, flat.numel()) if index is None else index.long()
                leaves[name] = {"values": flat[index], "shape": shape_tag(leaf)}
            else:
                index = flat.abs().topk(self._size(flat.numel())).indices.sort().values
                leaves[name] = {"values": flat[index], "index": index.int(), "shape": shape_tag(leaf)}
            if self.feedback:
                residual[name] = flat.index_fill(0, index, 0.0)
        return WeightedMean(pack(leaves), sent.weight), {"residual": residual} if self.feedback else {}

    def decode(self, received: WeightedMean, state: Trees) -> tuple[WeightedMean, Trees]:
        """Return zeros with the received values in their positions."""
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
                raise ProtocolError(f"{name}: {tuple(values.shape)} values received, {self._size(size)} expected")
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
            raise ProtocolError(f"{name}: positions must be increasing, one for each value")
        if int(index[0]) < 0 or int(index[-1]) >= size:
            raise ProtocolError(f"{name}: a position is out of range for {size} numbers")
        return index

    def _choose(self, gain: Tensor, age: Tensor) -> Tensor:
        """Return the coordinates with the largest gain and, of the others, the oldest."""
        size = self._size(gain.numel())
        best = gain.topk(size - int(size * self.explore)).indices
        oldest = age.index_fill(0, best, -1.0).topk(size - best.numel()).indices
        return torch.cat([best, oldest]).sort().values

    def _first(self, name: str, numel: int) -> Tensor:
        """Draw the initial support, which is the same at every site."""
        drawn = torch.rand(numel, generator=Site("everyone").rng("support", name))
        return self._choose(drawn, torch.zeros(numel))

    def _size(self, numel: int) -> int:
        return max(1, math.ceil(self.fraction * numel))
