"""Compression codecs: fewer bits per number, or fewer numbers per matrix.

A codec encodes every tensor of a reply separately, and only in parts that are changes of a model; statistics and other
parts are sent losslessly. Vectors are sent losslessly or as bfloat16: they are few, and a running variance that is
rounded coarsely or sent late can become negative. With ``feedback``, a site stores the error of a codec and adds it to
its next reply (Sai Praneeth Karimireddy, Quentin Rebjock, Sebastian Stich and Martin Jaggi, "Error Feedback Fixes
SignSGD and other Gradient Compression Schemes", ICML 2019, https://arxiv.org/abs/1901.09847). This residual never
leaves the site.

The output of codecs cannot be summed, so they cannot be combined with ``SecureSum``; ``TopK`` and
``PowerSGD(shared=True)`` can.
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
from polyclinic.core import low_rank
from polyclinic.core.aggregates import WeightedMean
from polyclinic.core.pipeline import Transform
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ProtocolError


def too_late(transform: Transform, before: tuple[Transform, ...]) -> list[str]:
    """Return why a transform with error feedback must not follow others that have rearranged the numbers."""
    first = next((type(t).__name__ for t in before if not t.dense), None)
    name = type(transform).__name__
    return (
        [
            f"{name} must come before {first}: its error feedback depends on the position of each number, and {first} "
            "changes positions"
        ]
        if first
        else []
    )


def number_limit(params: Tree) -> Tensor:
    """Return the maximum number of values in a decoded reply: far more than any method needs for this model."""
    return torch.tensor(16 * sum(leaf.numel() for leaf in params.values()) + 2**20)


@dataclass(frozen=True)
class Codec(Transform):
    """A transform that encodes each tensor separately, by ``shrink`` and ``grow``.

    Attributes:
        parts: The parts of a reply that are encoded, by name.
    """

    parts: tuple[str, ...] = field(default=CHANGES, kw_only=True)

    dense: ClassVar[bool] = False

    @property
    def additive(self) -> bool:
        """Always False: the server decodes each site's reply."""
        return False

    @property
    def feedback(self) -> bool:
        """Whether a site uses error feedback."""
        return False

    @property
    def halves(self) -> bool:
        """Whether vectors are sent as bfloat16."""
        return True

    @abstractmethod
    def shrink(self, leaf: Tensor, rng: torch.Generator, round: int) -> Parts | None:
        """Encode ``leaf``; return None to send it unchanged."""

    @abstractmethod
    def grow(self, parts: Parts) -> Tensor:
        """Decode the parts of a leaf."""

    def init(self, params: Tree) -> Trees:
        """Return the maximum size of a decoded reply."""
        return {"limit": {"numbers": number_limit(params)}}

    def encode(
        self, sent: WeightedMean, notes: Trees, memory: Trees, site: Site, round: int
    ) -> tuple[WeightedMean, Trees]:
        """Encode every tensor plus its residual; with error feedback, the encoding error is the new residual."""
        old, leaves = memory.get("residual", {}), dict[str, Parts]()
        left = {name: leaf for name, leaf in old.items() if name not in sent.total}  # sent in other rounds
        rng = site.rng(round, type(self).__name__)
        for name, leaf in sent.total.items():
            total = leaf
            if self.feedback and name in old and old[name].shape == leaf.shape:
                total = leaf + old[name]
            parts: Parts | None = None
            if may_lose(name, leaf, self.parts):
                halved = leaf.ndim < 2 and self.halves
                parts = {"half": total.bfloat16()} if halved else self.shrink(total, rng, round)
            leaves[name] = {"raw": total} if parts is None else parts
            if self.feedback and parts is not None:
                left[name] = total - _grown(self, parts)
        return WeightedMean(pack(leaves), sent.weight), {"residual": left} if self.feedback else {}

    def decode(self, received: WeightedMean, state: Trees) -> tuple[WeightedMean, Trees]:
        """Decode every tensor."""
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
    """Bfloat16: half the bytes, with 8 bits of precision and the range of single precision."""

    def shrink(self, leaf: Tensor, rng: torch.Generator, round: int) -> Parts:
        """Round to the nearest bfloat16."""
        return {"half": leaf.bfloat16()}

    def grow(self, parts: Parts) -> Tensor:
        """Convert to single precision."""
        return parts["half"].float()


@dataclass(frozen=True)
class Int8(Codec):
    """A quarter of the bytes: integers from -127 to 127, with a scale for each output channel."""

    def shrink(self, leaf: Tensor, rng: torch.Generator, round: int) -> Parts:
        """Send ``round(127 · x / max |x|)``, with the maximum over each slice of the first axis."""
        rows = leaf.reshape(leaf.shape[0], -1)
        scale = rows.abs().amax(1, keepdim=True) / 127
        codes = torch.where(scale > 0, rows / scale, 0.0).round().clamp(-127, 127).to(torch.int8)
        return {"codes": codes.reshape(leaf.shape), "scale": scale[:, 0].float()}

    def grow(self, parts: Parts) -> Tensor:
        """Multiply the codes by ``max |x| / 127``."""
        codes, scale = parts["codes"], parts["scale"]
        if codes.dtype != torch.int8 or scale.shape != codes.shape[:1]:
            raise ProtocolError(f"{tuple(scale.shape)} scales do not fit codes of shape {tuple(codes.shape)}")
        return (codes.reshape(len(scale), -1).float() * scale[:, None]).reshape(codes.shape)


@dataclass(frozen=True)
class QSGD(Codec):
    """Stochastic rounding to a few levels, which is unbiased.

    Dan Alistarh, Demjan Grubic, Jerry Li, Ryota Tomioka and Milan Vojnovic, "QSGD: Communication-Efficient SGD via
    Gradient Quantization and Encoding", NeurIPS 2017, section 3.1 with buckets, https://arxiv.org/abs/1610.02132.
    Codes take 2, 4 or 8 bits each; instead of Elias coding, ``Zstd`` can follow.

    Attributes:
        levels: s. A number takes 2 bits for 1, 4 up to 7, 8 up to 127.
        bucket: Number of values that share one norm.
    """

    levels: int = 7
    bucket: int = 512

    def validate(self, before: tuple[Transform, ...], after: tuple[Transform, ...]) -> list[str]:
        """Check that codes fit one byte."""
        fine = 1 <= self.levels <= 127 and self.bucket >= 1
        return [] if fine else ["QSGD: levels must be from 1 to 127, and bucket at least 1"]

    def shrink(self, leaf: Tensor, rng: torch.Generator, round: int) -> Parts:
        """Encode ``ξ(v) = ‖v‖ · sign(v) · ⌊s |v| / ‖v‖ + u⌋ / s``, u uniform in [0, 1)."""
        flat = leaf.reshape(-1)
        rows = torch.nn.functional.pad(flat, (0, -len(flat) % self.bucket)).reshape(-1, self.bucket)
        norm = rows.norm(dim=1, keepdim=True)
        size = torch.where(norm > 0, self.levels * rows.abs() / norm, 0.0)
        size = (size + torch.rand(rows.shape, generator=rng)).floor().clamp_max(self.levels)
        codes = (rows.sign() * size + self.levels).to(torch.uint8).reshape(-1)[: len(flat)]
        return {"codes": pack_bits(codes, self._bits), "norm": norm[:, 0].float(), "shape": shape_tag(leaf)}

    def grow(self, parts: Parts) -> Tensor:
        """Multiply the levels by the norms."""
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
    """One sign bit per number, and one magnitude per tensor: Karimireddy et al., Algorithm 1."""

    @property
    def feedback(self) -> bool:
        """Always True: without error feedback, signs need not converge."""
        return True

    def validate(self, before: tuple[Transform, ...], after: tuple[Transform, ...]) -> list[str]:
        """Check the position of error feedback."""
        return too_late(self, before)

    def shrink(self, leaf: Tensor, rng: torch.Generator, round: int) -> Parts:
        """Encode ``Δ = ‖p‖₁ / d · sign(p)``."""
        bits = pack_bits((leaf.reshape(-1) >= 0).to(torch.uint8), 1)
        return {"bits": bits, "size": leaf.abs().mean().float().reshape(1), "shape": shape_tag(leaf)}

    def grow(self, parts: Parts) -> Tensor:
        """Decode to ``±‖p‖₁ / d``."""
        shape = parts["shape"].shape[1:]
        bits = unpack_bits(parts["bits"], 1, math.prod(shape))
        return ((bits.float() * 2 - 1) * parts["size"]).reshape(shape)


@dataclass(frozen=True)
class LowRank(Codec):
    """Sends matrices as two factors of the least rank with a given fraction of their energy, which rises over rounds.

    Chuhan Wu, Fangzhao Wu, Lingjuan Lyu, Yongfeng Huang and Xing Xie, "Communication-efficient federated learning
    via knowledge distillation", Nature Communications 13:2032 (2022), and, for medical images,
    Ren et al., "Federated Distillation for Medical Image Classification", https://arxiv.org/abs/2407.02261.
    A convolution is treated as a matrix of outputs × (inputs · height · width). Factors are sent only if they are
    smaller, and only from sites to the server; the server's model is sent losslessly.

    Attributes:
        start: The initial fraction of the squared singular values.
        end: The fraction after ``rounds`` rounds.
        rounds: Number of rounds from ``start`` to ``end``.
        remember: Whether to use error feedback. Not in the papers.
    """

    start: float = 0.95
    end: float = 0.98
    rounds: int = 100
    remember: bool = False

    @property
    def feedback(self) -> bool:
        """Whether error feedback is used, as ``remember`` says."""
        return self.remember

    def validate(self, before: tuple[Transform, ...], after: tuple[Transform, ...]) -> list[str]:
        """Check the fractions, and the position of error feedback."""
        fine = 0 < self.start <= 1 and 0 < self.end <= 1 and self.rounds >= 1
        problems = [] if fine else ["LowRank: start and end must be above 0 and at most 1, and rounds at least 1"]
        return problems + (too_late(self, before) if self.remember else [])

    @property
    def halves(self) -> bool:
        """Always False: vectors are sent losslessly."""
        return False

    def energy(self, round: int) -> float:
        """Return ``T(t) = T_start + (t + 1) / R · (T_end − T_start)``, and T_end from round R on."""
        return low_rank.rising(self.start, self.end, self.rounds, round)

    def shrink(self, leaf: Tensor, rng: torch.Generator, round: int) -> Parts | None:
        """Return U·s and V of the least rank whose squared singular values have the required energy."""
        found = low_rank.factors(leaf, self.energy(round))
        return None if found is None else {"left": found[0], "right": found[1], "shape": shape_tag(leaf)}

    def grow(self, parts: Parts) -> Tensor:
        """Multiply the factors: ``(U·s) V``."""
        return multiplied(parts["left"], parts["right"], parts["shape"].shape[1:])


def multiplied(left: Tensor, right: Tensor, shape: torch.Size) -> Tensor:
    """Compute ``left @ right`` in ``shape`` after checking sizes, because a product can be much larger than both.

    Raises:
        ValueError: If the factors do not have matching shapes.
    """
    if left.ndim != 2 or right.ndim != 2 or left.shape[0] * right.shape[1] != math.prod(shape):
        raise ProtocolError(f"factors of {tuple(left.shape)} and {tuple(right.shape)} do not make {tuple(shape)}")
    return (left @ right).reshape(shape)
