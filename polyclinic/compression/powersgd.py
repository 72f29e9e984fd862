"""Low-rank compression by power iteration, which is faster than an SVD and has an additive variant.

Thijs Vogels, Sai Praneeth Karimireddy and Martin Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression for
Distributed Optimization", NeurIPS 2019, Algorithm 1, https://arxiv.org/abs/1905.13727. There, workers sum P and then
Q within one step. Between sites this would take two messages per round. Instead, with ``shared=False`` a site iterates
on its own matrix and sends both factors; with ``shared=True`` the server sends one basis for all, alternately right and
left ones, and sites send only the other factor, which can be summed. Alternation is from Lin Zhang,
Longteng Zhang, Shaohuai Shi, Xiaowen Chu and Bo Li, "Evaluation and Optimization of Gradient Compression for
Distributed Deep Learning", ICDCS 2023.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from polyclinic.compression.leaf_packing import CHANGES, Parts, may_lose, pack, shape_in, shape_tag, unpack
from polyclinic.compression.quantization import multiplied, number_limit, too_late
from polyclinic.core.aggregates import WeightedMean
from polyclinic.core.pipeline import Transform
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees


@dataclass(frozen=True)
class PowerSGD(Transform):
    """Sends matrices as factors of rank ``rank`` with error feedback. Smaller tensors are unchanged.

    Attributes:
        rank: r.
        shared: Whether all sites use one basis, so that their factors can be summed.
        parts: The parts of a reply that are encoded, by name.
    """

    rank: int = 4
    shared: bool = False
    parts: tuple[str, ...] = field(default=CHANGES, kw_only=True)

    dense: ClassVar[bool] = False

    @property
    def additive(self) -> bool:
        """Whether the basis is shared."""
        return self.shared

    def validate(self, before: tuple[Transform, ...], after: tuple[Transform, ...]) -> list[str]:
        """Check the rank, and the position of error feedback."""
        problems = [] if self.rank >= 1 else [f"PowerSGD: rank must be at least 1, not {self.rank}"]
        return problems + too_late(self, before)

    def init(self, params: Tree) -> Trees:
        """Return a state without bases; the first are drawn from the tensors' names."""
        return {"basis": {}, "side": {}, "limit": {"numbers": number_limit(params)}}

    def describe(self, state: Trees) -> Trees:
        """Return the shared bases and their sides."""
        return {"basis": state["basis"], "side": state["side"]} if self.shared else {}

    def encode(
        self, sent: WeightedMean, notes: Trees, memory: Trees, site: Site, round: int
    ) -> tuple[WeightedMean, Trees]:
        """Factorize reply plus residual; the approximation error is the new residual."""
        old, warm = memory.get("residual", {}), memory.get("basis", {})
        leaves = dict[str, Parts]()
        left = {name: leaf for name, leaf in old.items() if name not in sent.total}  # sent in other rounds
        bases = {name: leaf for name, leaf in warm.items() if name not in sent.total}
        for name, leaf in sent.total.items():
            if not self._shrinks(leaf.shape) or not may_lose(name, leaf, self.parts):
                leaves[name] = {"raw": leaf}
                continue
            total = leaf + old[name] if name in old and old[name].shape == leaf.shape else leaf
            matrix = total.reshape(len(leaf), -1)
            if self.shared:
                basis, on_left = self._shared(name, leaf.shape, notes)
                factor = matrix.T @ basis if on_left else matrix @ basis
                leaves[name] = {"factor": factor, "shape": shape_tag(leaf)}
                approximation = basis @ factor.T if on_left else factor @ basis.T
            else:
                basis = warm.get(name, self._drawn(name, matrix.shape[1]))
                # P = M Q;  P ← orthogonalized P;  Q = Mᵀ P;  M̂ = P Qᵀ
                p = _orthogonal(matrix @ basis)
                q = matrix.T @ p
                leaves[name] = {"p": p, "q": q, "shape": shape_tag(leaf)}
                approximation, bases[name] = p @ q.T, _orthogonal(q)
            left[name] = total - approximation.reshape(leaf.shape)
        return WeightedMean(pack(leaves), sent.weight), {"residual": left} | ({} if self.shared else {"basis": bases})

    def decode(self, received: WeightedMean, state: Trees) -> tuple[WeightedMean, Trees]:
        """Multiply the factors. The next shared basis is the orthogonalized sum of the received factors."""
        limit, decoded = int(state["limit"]["numbers"]), dict[str, Tensor]()
        bases, sides = dict(state["basis"]), dict(state["side"])
        for name, parts in unpack(received.total).items():
            if "raw" in parts:
                decoded[name] = parts["raw"]
                continue
            shape = shape_in(parts["shape"], limit)
            limit -= math.prod(shape)
            if self.shared:
                basis, on_left = self._shared(name, shape, state)
                factor = parts["factor"]
                decoded[name] = multiplied(*((basis, _turned(factor)) if on_left else (factor, basis.T)), shape)
                bases[name], sides[name] = _orthogonal(factor), torch.tensor(not on_left)
            else:
                decoded[name] = multiplied(parts["p"], _turned(parts["q"]), shape)
        return WeightedMean(decoded, received.weight), {**state, "basis": bases, "side": sides}

    def _shared(self, name: str, shape: torch.Size, notes: Trees) -> tuple[Tensor, bool]:
        """Return a tensor's shared basis, with orthonormal columns, and whether it is the left factor."""
        if name in notes["basis"]:
            return notes["basis"][name], bool(notes["side"][name])
        return self._drawn(name, math.prod(shape[1:])), False

    def _drawn(self, name: str, columns: int) -> Tensor:
        rng = Site("everyone").rng("basis", name)
        return _orthogonal(torch.randn(columns, self.rank, generator=rng))

    def _shrinks(self, shape: torch.Size) -> bool:
        if len(shape) < 2 or not math.prod(shape):
            return False
        rows, columns = shape[0], math.prod(shape[1:])
        return self.rank < min(rows, columns) and self.rank * (rows + columns) < rows * columns


def _turned(factor: Tensor) -> Tensor:
    """Transpose ``factor`` after checking that it is a matrix."""
    if factor.ndim != 2:
        raise ValueError(f"a factor must have two axes, but this one has shape {tuple(factor.shape)}")
    return factor.T


def _orthogonal(matrix: Tensor) -> Tensor:
    """Return orthonormal columns that span those of ``matrix``, contiguous as after loading, for identical sums."""
    basis: Tensor = torch.linalg.qr(matrix).Q
    return basis.contiguous()
