"""Smaller messages: fewer bits for each number, or fewer numbers for each matrix.

A codec treats every tensor of a reply by itself, and only of the parts that are changes to a model: statistics and the
like travel whole. So do vectors, or in half the bytes: they are few, and a running variance that is rounded coarsely,
or sent late, becomes negative. What a codec of ``feedback`` loses, the site remembers and adds to its next reply (Sai
Praneeth Karimireddy, Quentin Rebjock, Sebastian Stich and Martin Jaggi, "Error Feedback Fixes SignSGD and other
Gradient Compression Schemes", ICML 2019, https://arxiv.org/abs/1901.09847). That memory is private, and never leaves.

What codecs send does not add up, so they do not go with ``SecureSum``; ``TopK`` and ``PowerSGD(shared=True)`` do.
"""

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from polyclinic.compression.leaf_packing import (
    CHANGES,
    Parts,
    may_lose,
    pack,
    pack_bits,
    shape_in,
    shape_tag,
    unpack,
    unpack_bits,
)
from polyclinic.core.aggregates import WeightedMean
from polyclinic.core.pipeline import Transform
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ProtocolError


def too_late(transform: Transform, before: tuple[Transform, ...]) -> list[str]:
    """What is wrong with a transform that remembers, if others have rearranged the numbers ``before`` it."""
    first = next((type(t).__name__ for t in before if not t.dense), None)
    name = type(transform).__name__
    return (
        [
            f"{name} must come before {first}: it remembers what it has not sent, place by place, and {first} moves "
            "numbers to other places"
        ]
        if first
        else []
    )


def number_limit(params: Tree) -> Tensor:
    """How many numbers a reply may unfold to at the server: far more than any method needs for this model."""
    return torch.tensor(16 * sum(leaf.numel() for leaf in params.values()) + 2**20)


@dataclass(frozen=True)
class Codec(Transform):
    """A transform that encodes each tensor by itself. A codec says how: ``shrink`` and ``grow``.

    Attributes:
        parts: The parts of a reply that are encoded, by name.
    """

    parts: tuple[str, ...] = field(default=CHANGES, kw_only=True)

    dense: ClassVar[bool] = False

    @property
    def additive(self) -> bool:
        """No: the server decodes what each site sent."""
        return False

    @property
    def feedback(self) -> bool:
        """Whether a site remembers what it has not sent."""
        return False

    @property
    def halves(self) -> bool:
        """Whether vectors are sent as ``BFloat16`` sends them."""
        return True

    @abstractmethod
    def shrink(self, leaf: Tensor, rng: torch.Generator, round: int) -> Parts | None:
        """What to send instead of ``leaf``; None to send it as it is."""

    @abstractmethod
    def grow(self, parts: Parts) -> Tensor:
        """What the server makes of them."""

    def init(self, params: Tree) -> Trees:
        """How much a reply may unfold to."""
        return {"limit": {"numbers": number_limit(params)}}

    def encode(
        self, sent: WeightedMean, notes: Trees, memory: Trees, site: Site, round: int
    ) -> tuple[WeightedMean, Trees]:
        """Every tensor, plus what was left of it, shrunk; what is left now is kept."""
        old, left, leaves = memory.get("residual", {}), dict[str, Tensor](), dict[str, Parts]()
        rng = site.rng(round, type(self).__name__)
        for name, leaf in sent.total.items():
            whole = leaf
            if self.feedback and name in old and old[name].shape == leaf.shape:
                whole = leaf + old[name]
            parts: Parts | None = None
            if may_lose(name, leaf, self.parts):
                halved = leaf.ndim < 2 and self.halves
                parts = {"half": whole.bfloat16()} if halved else self.shrink(whole, rng, round)
            leaves[name] = {"raw": whole} if parts is None else parts
            if self.feedback and parts is not None:
                left[name] = whole - _grown(self, parts)
        return WeightedMean(pack(leaves), sent.weight), {"residual": left} if self.feedback else {}

    def decode(self, received: WeightedMean, state: Trees) -> tuple[WeightedMean, Trees]:
        """Every tensor, grown again."""
        leaves, limit = unpack(received.total), int(state["limit"]["numbers"])
        for parts in leaves.values():
            if "shape" in parts:
                limit -= math.prod(shape_in(parts["shape"], limit))
        return WeightedMean({name: _grown(self, parts) for name, parts in leaves.items()}, 1.0), state


def _grown(codec: Codec, parts: Parts) -> Tensor:
    if "raw" in parts:
        return parts["raw"]
    return parts["half"].float() if "half" in parts else codec.grow(parts)


@dataclass(frozen=True)
class BFloat16(Codec):
    """Half the bytes: 8 bits of precision, the range of single precision."""

    def shrink(self, leaf: Tensor, rng: torch.Generator, round: int) -> Parts:
        """Rounds to the nearest."""
        return {"half": leaf.bfloat16()}

    def grow(self, parts: Parts) -> Tensor:
        """Single precision again."""
        return parts["half"].float()


@dataclass(frozen=True)
class Int8(Codec):
    """A quarter of the bytes: whole numbers from -127 to 127, with a scale for each output channel."""

    def shrink(self, leaf: Tensor, rng: torch.Generator, round: int) -> Parts:
        """Sends round(127 · x / max |x|), the maximum over each slice of the first axis."""
        rows = leaf.reshape(leaf.shape[0], -1)
        scale = rows.abs().amax(1, keepdim=True) / 127
        codes = torch.where(scale > 0, rows / scale, 0.0).round().clamp(-127, 127).to(torch.int8)
        return {"codes": codes.reshape(leaf.shape), "scale": scale[:, 0].float()}

    def grow(self, parts: Parts) -> Tensor:
        """The codes, times max |x| / 127."""
        codes, scale = parts["codes"], parts["scale"]
        if codes.dtype != torch.int8 or scale.shape != codes.shape[:1]:
            raise ProtocolError(f"{tuple(scale.shape)} scales do not fit codes of shape {tuple(codes.shape)}")
        return (codes.reshape(len(scale), -1).float() * scale[:, None]).reshape(codes.shape)


@dataclass(frozen=True)
class QSGD(Codec):
    """Rounds at random to a few levels, so that it is right on average.

    Dan Alistarh, Demjan Grubic, Jerry Li, Ryota Tomioka and Milan Vojnovic, "QSGD: Communication-Efficient SGD via
    Gradient Quantization and Encoding", NeurIPS 2017, section 3.1 with buckets, https://arxiv.org/abs/1610.02132.
    Codes take 2, 4 or 8 bits each; instead of Elias codes, let ``Zstd`` follow.

    Attributes:
        levels: s. A number takes 2 bits for 1, 4 up to 7, 8 up to 127.
        bucket: How many numbers share one norm.
    """

    levels: int = 7
    bucket: int = 512

    def validate(self, before: tuple[Transform, ...], after: tuple[Transform, ...]) -> list[str]:
        """Codes fit one byte."""
        fine = 1 <= self.levels <= 127 and self.bucket >= 1
        return [] if fine else ["QSGD: levels must be from 1 to 127, and bucket at least 1"]

    def shrink(self, leaf: Tensor, rng: torch.Generator, round: int) -> Parts:
        """ξ(v) = ‖v‖ · sign(v) · ⌊s |v| / ‖v‖ + u⌋ / s, u uniform in [0, 1)"""
        flat = leaf.reshape(-1)
        rows = torch.nn.functional.pad(flat, (0, -len(flat) % self.bucket)).reshape(-1, self.bucket)
        norm = rows.norm(dim=1, keepdim=True)
        size = torch.where(norm > 0, self.levels * rows.abs() / norm, 0.0)
        size = (size + torch.rand(rows.shape, generator=rng)).floor().clamp_max(self.levels)
        codes = (rows.sign() * size + self.levels).to(torch.uint8).reshape(-1)[: len(flat)]
        return {"codes": pack_bits(codes, self._bits), "norm": norm[:, 0].float(), "shape": shape_tag(leaf)}

    def grow(self, parts: Parts) -> Tensor:
        """The levels, times the norms."""
        shape = parts["shape"].shape[1:]
        codes = unpack_bits(parts["codes"], self._bits, size := math.prod(shape))
        if parts["norm"].shape != (-(-size // self.bucket),):
            raise ProtocolError(f"{tuple(parts['norm'].shape)} norms do not fit {size} numbers")
        norm = parts["norm"].repeat_interleave(self.bucket)[:size]
        return ((codes.float() - self.levels) / self.levels * norm).reshape(shape)

    @property
    def _bits(self) -> int:
        return next(bits for bits in (2, 4, 8) if 2**bits > 2 * self.levels)


@dataclass(frozen=True)
class Sign(Codec):
    """One bit for each number, its sign, and one size for all: Karimireddy et al., Algorithm 1."""

    @property
    def feedback(self) -> bool:
        """Yes: without it, signs need not converge."""
        return True

    def validate(self, before: tuple[Transform, ...], after: tuple[Transform, ...]) -> list[str]:
        """It remembers."""
        return too_late(self, before)

    def shrink(self, leaf: Tensor, rng: torch.Generator, round: int) -> Parts:
        """Δ = ‖p‖₁ / d · sign(p)"""
        bits = pack_bits((leaf.reshape(-1) >= 0).to(torch.uint8), 1)
        return {"bits": bits, "size": leaf.abs().mean().float().reshape(1), "shape": shape_tag(leaf)}

    def grow(self, parts: Parts) -> Tensor:
        """±‖p‖₁ / d"""
        shape = parts["shape"].shape[1:]
        bits = unpack_bits(parts["bits"], 1, math.prod(shape))
        return ((bits.float() * 2 - 1) * parts["size"]).reshape(shape)


@dataclass(frozen=True)
class LowRank(Codec):
    """Sends matrices as two factors of the rank that holds a share of their energy, more of it as training goes on.

    Chuhan Wu, Fangzhao Wu, Lingjuan Lyu, Yongfeng Huang and Xing Xie, "Communication-efficient federated learning
    via knowledge distillation", Nature Communications 13:2032 (2022), and its sibling for medical images,
    Ren et al., "Federated Distillation for Medical Image Classification", https://arxiv.org/abs/2407.02261.
    A convolution counts as a matrix of outputs × (inputs · height · width). We send factors only where they are
    smaller, and what a site sends to the server only: the server's model travels whole.

    Attributes:
        start: The share of the squared singular values at first.
        end: The share after ``rounds`` rounds.
        rounds: How long it takes from the one to the other.
        remember: Whether a site adds to its next reply what it has not sent. Not in the papers.
    """

    start: float = 0.95
    end: float = 0.98
    rounds: int = 100
    remember: bool = False

    @property
    def feedback(self) -> bool:
        """As ``remember`` says."""
        return self.remember

    def validate(self, before: tuple[Transform, ...], after: tuple[Transform, ...]) -> list[str]:
        """Shares are shares; and where it remembers, places are places."""
        fine = 0 < self.start <= 1 and 0 < self.end <= 1 and self.rounds >= 1
        found = [] if fine else ["LowRank: start and end must be above 0 and at most 1, and rounds at least 1"]
        return found + (too_late(self, before) if self.remember else [])

    @property
    def halves(self) -> bool:
        """No: vectors travel whole."""
        return False

    def energy(self, round: int) -> float:
        """T(t) = T_start + (t + 1) / R · (T_end − T_start), and T_end from round R on."""
        return self.start + min((round + 1) / self.rounds, 1.0) * (self.end - self.start)

    def shrink(self, leaf: Tensor, rng: torch.Generator, round: int) -> Parts | None:
        """U·s and V of the smallest rank whose squared singular values hold the energy."""
        if leaf.ndim < 2:
            return None
        rows, columns = leaf.shape[0], leaf[0].numel()
        u, s, v = torch.linalg.svd(leaf.reshape(rows, columns).double(), full_matrices=False)
        held = s.square().cumsum(0)
        # r = min k with Σ_{i ≤ k} s_i² ≥ T · Σ s_i²; never 0, and all of them where rounding hides the last
        rank = min(len(s), int(torch.searchsorted(held, self.energy(round) * held[-1])) + 1)
        if rank * (rows + columns) >= rows * columns:
            return None
        left, right = (u[:, :rank] * s[:rank]).to(leaf.dtype), v[:rank].to(leaf.dtype)
        return {"left": left, "right": right.contiguous(), "shape": shape_tag(leaf)}

    def grow(self, parts: Parts) -> Tensor:
        """(U·s) V"""
        return multiplied(parts["left"], parts["right"], parts["shape"].shape[1:])


def multiplied(left: Tensor, right: Tensor, shape: torch.Size) -> Tensor:
    """``left`` @ ``right`` in ``shape``, once it is certain that they fit: a product can be far larger than both.

    Raises:
        ValueError: Where they do not.
    """
    if left.ndim != 2 or right.ndim != 2 or left.shape[0] * right.shape[1] != math.prod(shape):
        raise ProtocolError(f"factors of {tuple(left.shape)} and {tuple(right.shape)} do not make {tuple(shape)}")
    return (left @ right).reshape(shape)
