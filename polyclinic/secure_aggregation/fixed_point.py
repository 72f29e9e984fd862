"""Fixed-point numbers as integers modulo 2³², so that masks hide them perfectly and sums are exact."""

import hashlib
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.metering import collected
from polyclinic.core.method import Request
from polyclinic.core.pipeline import Transform
from polyclinic.core.serialization import bytes_of
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError

WEIGHT = "m/~secure/weight"
_contents: ContextVar[list[str] | None] = ContextVar("contents of secure sums", default=None)


def contents() -> AbstractContextManager[list[str]]:
    """Collect a digest of all values that ``SecureSum`` encodes within the context, before encoding.

    Equal digests mean equal values, under any name and in any job. The digest of all-zero values is empty. Fresh noise
    gives fresh values.
    """
    return collected(_contents)


def content(values: Tree) -> str:
    """Return the SHA-256 of the numbers in ``values``, in the order of names but without the names; empty if 0."""
    hasher, zero = hashlib.sha256(), True
    for _, leaf in sorted(values.items()):
        zero = zero and not bool(leaf.count_nonzero())
        hasher.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
        hasher.update(bytes_of(leaf))
    return "" if zero else hasher.hexdigest()


@dataclass(frozen=True)
class SecureSum(Transform):
    """Sends integers modulo 2³², of which the server learns only the sum. Must be the last transform.

    A number x is sent as ``round(x · 2^bits)``. A number above ``limit``, or not finite, is refused at the site,
    because wrap-around of a sum cannot be detected after masking. ``sites · limit · 2^bits`` must be below 2³¹.

    Attributes:
        limit: The largest absolute value of any number, per unit of weight.
        bits: Number of fractional bits.
        heaviest: The largest weight of a site, such as its number of examples, since weights are summed securely, too.
            1 for methods with equal weights.
        threshold: Minimum number of sites that must remain to the end of a sum; two thirds by default. Set more if
            noise that is shared among sites requires more.
    """

    limit: float = 8.0
    bits: int = 22
    heaviest: float = 1.0
    threshold: int | None = None

    secure: ClassVar[bool] = True

    @property
    def capacity(self) -> int:
        """Maximum number of sites whose sum cannot wrap around."""
        largest: float = self.limit * 2.0**self.bits + 0.5
        return math.ceil(2**31 / largest) - 1

    @property
    def step(self) -> float:
        """Resolution of the sum: numbers are rounded to multiples of it.

        If a site added all its noise, rounding is post-processing. Noise that is shared among sites must span several
        steps at each of them, which ``Gaussian`` checks.
        """
        return self.heaviest / 2.0**self.bits

    def validate(self, before: tuple[Transform, ...], after: tuple[Transform, ...]) -> list[str]:
        """Check that no transform follows, that three sites can be summed, and that all shared noise is included."""
        problems = []
        if after:
            problems.append(f"SecureSum must come last: {type(after[0]).__name__} cannot read masked values")
        if not 0 < self.limit < math.inf or not 0 <= self.bits <= 30 or not 0 < self.heaviest < math.inf:
            problems.append("SecureSum: limit and heaviest must be above 0, and bits from 0 to 30")
        elif self.capacity < 3:
            problems.append(
                f"SecureSum: with limit={self.limit:g} and bits={self.bits} the sum of {self.capacity + 1} "
                "sites can wrap around: lower one of them"
            )
        if self.threshold is not None and self.threshold < 3:
            problems.append(f"SecureSum: threshold must be at least 3, not {self.threshold}")
        for transform in before:
            if (share := getattr(transform, "share", 1)) > 1 and (self.threshold or 0) < share:
                problems.append(
                    f"SecureSum: threshold must be at least {share}, because the noise of {share} sites is "
                    f"required: write SecureSum(threshold={share})"
                )
        return problems

    def describe(self, state: Trees) -> Trees:
        """Return the parameters of the protocol for engine and sites; see ``terms``."""
        return {"secure": {"threshold": torch.tensor(self.threshold or 0), "capacity": torch.tensor(self.capacity)}}

    def encode(
        self, sent: WeightedMean, notes: Trees, memory: Trees, site: Site, round: int
    ) -> tuple[WeightedMean, Trees]:
        """Send ``round(2^bits · x / heaviest) mod 2³²`` for every x, and the weight.

        Raises:
            ValueError: If a number exceeds ``limit`` or the weight exceeds ``heaviest``. Nothing is sent.
        """
        if not 0 < sent.weight <= self.heaviest:
            raise ConfigError(
                f"SecureSum(heaviest={self.heaviest:g}): {site.name} has weight {sent.weight:g}. Set "
                "heaviest to the examples of the largest site, or make the method uniform"
            )
        if (seen := _contents.get()) is not None:
            seen.append(content(sent.total))
        coded = {name: self._coded(name, leaf, 2.0**self.bits / self.heaviest) for name, leaf in sent.total.items()}
        coded[WEIGHT] = torch.tensor([round_(sent.weight / self.heaviest * self._weight_scale)], dtype=torch.int32)
        return WeightedMean(coded, 1.0), memory

    def decode(self, received: WeightedMean, state: Trees) -> tuple[WeightedMean, Trees]:
        """Decode the sum."""
        if received.weight != round_(received.weight) or not 0 < received.weight <= self.capacity:
            raise ConfigError(
                f"a secure sum is over a whole number of sites of at most {self.capacity}, not {received.weight:g}: "
                "secure sums cannot be discounted"
            )
        if wrong := [name for name, leaf in received.total.items() if leaf.dtype != torch.int32]:
            raise ConfigError(f"{wrong[0]} is not a value of SecureSum")
        weight = int(received.total[WEIGHT]) / self._weight_scale * self.heaviest
        if self.heaviest == 1:
            weight = float(round_(weight)) if abs(weight - round_(weight)) < 1e-6 else weight
        by = self.heaviest / 2.0**self.bits
        rest = {name: (leaf.double() * by).float() for name, leaf in received.total.items() if name != WEIGHT}
        return WeightedMean(rest, weight), state

    @property
    def _weight_scale(self) -> float:
        return 2.0 ** math.floor(math.log2((2**31 - 1) / self.capacity))

    def _coded(self, name: str, leaf: Tensor, scale: float) -> Tensor:
        if leaf.numel() == 0:
            return leaf.to(torch.int32)
        if not leaf.is_floating_point():
            raise ConfigError(f"SecureSum sums real numbers, and {name} contains {leaf.dtype}")
        largest = float(leaf.abs().max()) / self.heaviest
        if not largest <= self.limit:  # also if it is NaN
            raise ConfigError(
                f"SecureSum(limit={self.limit:g}): {name} contains {largest:g}. Nothing was sent. Clip replies, lower "
                "the learning rate, or raise limit (and lower bits)"
            )
        exact = math.frexp(scale)[0] == 0.5  # scaling by a power of two is exact in single precision
        return ((leaf if exact else leaf.double()) * scale).round_().to(torch.int32)


class Terms(NamedTuple):
    """Terms of a secure request: the minimum number of sites in a sum (None for the default), and the maximum."""

    threshold: int | None
    capacity: int


def terms(request: Request) -> Terms | None:
    """Return the terms that ``SecureSum`` set for the replies to ``request``; None if there are none."""
    for name, note in request.trees.items():
        if name.startswith("~") and name.endswith("/secure"):
            return Terms(int(note["threshold"]) or None, int(note["capacity"]))
    return None


def layout_of(reply: Reply) -> dict[str, Tree]:
    """Return the names and shapes of the values to sum: public, equal at every site, without numbers.

    Raises:
        ValueError: If the reply contains values that cannot be summed securely.
    """
    layout: dict[str, Tree] = {}
    for part, stat in sorted(reply.parts.items()):
        if not isinstance(stat, WeightedMean) or any(leaf.dtype != torch.int32 for leaf in stat.total.values()):
            raise ConfigError(
                f"the part {part!r} was not made by SecureSum: a secure request is answered only with sums "
                "in the ring. Send the method through SecureSum()"
            )
        layout[part] = {name: torch.empty(0, *leaf.shape, dtype=torch.int32) for name, leaf in stat.total.items()}
    return layout


def vector_of(reply: Reply) -> Tensor:
    """Concatenate all numbers of a reply of ``SecureSum`` in a fixed order. Shape [size], int32."""
    layout_of(reply)
    flat = [tree.flatten(reply.mean(part).total) for part in sorted(reply.parts)]
    return torch.cat(flat) if flat else torch.zeros(0, dtype=torch.int32)


def reply_of(vector: Tensor, layout: Mapping[str, Tree], sites: int) -> Reply:
    """Rebuild the reply from the summed vector of ``sites`` sites, the inverse of ``vector_of``."""
    parts, start = {}, 0
    for part, leaves in sorted(layout.items()):
        total = {}
        for name, tag in leaves.items():
            size = math.prod(tag.shape[1:])
            total[name] = vector[start : start + size].reshape(tag.shape[1:])
            start += size
        parts[part] = WeightedMean(total, float(sites))
    if start != len(vector):
        raise ConfigError(f"{len(vector)} numbers received, but the layout has {start}")
    return Reply(parts)


def round_(x: float) -> int:
    """Round to the nearest integer."""
    return math.floor(x + 0.5)
