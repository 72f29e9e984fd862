"""Numbers as integers modulo 2³², so that masks hide them perfectly and sums are exact."""

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.method import Request
from polyclinic.core.pipeline import Transform
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError

WEIGHT = "m/~secure/weight"
_contents: ContextVar[list[str] | None] = ContextVar("contents of secure sums", default=None)


@contextmanager
def contents() -> Iterator[list[str]]:
    """Collects a digest of everything that ``SecureSum`` codes within the block, before it is coded.

    Two equal digests are the same values, whatever they are called and in whatever job. An empty one stands for values
    that are all zero. Fresh noise makes fresh values.
    """
    found: list[str] = []
    token = _contents.set(found)
    try:
        yield found
    finally:
        _contents.reset(token)


def content(values: Tree) -> str:
    """SHA-256 of the numbers in ``values``, in the order of their names but without them; empty if all are zero."""
    hasher, zero = hashlib.sha256(), True
    for _, leaf in sorted(values.items()):
        flat = leaf.detach().cpu().contiguous()
        zero = zero and not bool(flat.count_nonzero())
        hasher.update(f"{flat.dtype}{tuple(flat.shape)}".encode())
        hasher.update(flat.view(-1).view(torch.uint8).numpy().data if flat.numel() else b"")
    return "" if zero else hasher.hexdigest()


@dataclass(frozen=True)
class SecureSum(Transform):
    """Sends integers modulo 2³², of which the server learns only the sum. Stands last in a pipeline.

    A number x is sent as round(x · 2^bits). One beyond ``limit``, or not finite, is refused at the site, for after
    masking nobody could see that a sum had wrapped around. So sites · limit · 2^bits must stay below 2³¹.

    Attributes:
        limit: The largest absolute value of any number that a site sends, per unit of weight.
        bits: How many binary places are kept.
        heaviest: The largest weight that a site may have, such as its number of examples; sites' weights are
            summed in secret, too. 1 for methods in which every site counts the same.
        threshold: How many sites must remain to the end of a sum; two thirds by default. More if noise that is
            shared among sites counts on more.
    """

    limit: float = 8.0
    bits: int = 22
    heaviest: float = 1.0
    threshold: int | None = None

    secure: ClassVar[bool] = True

    @property
    def capacity(self) -> int:
        """How many sites can be summed without wrapping around."""
        largest: float = self.limit * 2.0**self.bits + 0.5
        return math.ceil(2**31 / largest) - 1

    @property
    def step(self) -> float:
        """The distance between two numbers that the server can tell apart: they are rounded to multiples of it.

        A site that added all its noise rounds what is hidden already. Noise that several sites share must span some
        steps at each of them, which ``Gaussian`` checks.
        """
        return self.heaviest / 2.0**self.bits

    def validate(self, before: tuple[Transform, ...], after: tuple[Transform, ...]) -> list[str]:
        """Nothing may come after it, three sites must fit, and shared noise must be all there."""
        found = []
        if after:
            found.append(f"SecureSum must come last: {type(after[0]).__name__} cannot read what is masked")
        if not 0 < self.limit < math.inf or not 0 <= self.bits <= 30 or not 0 < self.heaviest < math.inf:
            found.append("SecureSum: limit and heaviest must be above 0, and bits from 0 to 30")
        elif self.capacity < 3:
            found.append(
                f"SecureSum: with limit={self.limit:g} and bits={self.bits} the sum of {self.capacity + 1} "
                "sites can wrap around: lower one of them"
            )
        if self.threshold is not None and self.threshold < 3:
            found.append(f"SecureSum: threshold must be at least 3, not {self.threshold}")
        for transform in before:
            if (share := getattr(transform, "share", 1)) > 1 and (self.threshold or 0) < share:
                found.append(
                    f"SecureSum: threshold must be at least {share}, for the noise of as many sites is "
                    f"counted on: write SecureSum(threshold={share})"
                )
        return found

    def describe(self, state: Trees) -> Trees:
        """What engine and sites must know of the protocol; ``terms`` reads it."""
        return {"secure": {"threshold": torch.tensor(self.threshold or 0), "capacity": torch.tensor(self.capacity)}}

    def encode(
        self, sent: WeightedMean, notes: Trees, memory: Trees, site: Site, round: int
    ) -> tuple[WeightedMean, Trees]:
        """Sends round(2^bits · x / heaviest) mod 2³² for every x, and the weight beside it.

        Raises:
            ValueError: Where a number is beyond ``limit`` or the weight beyond ``heaviest``. Nothing has been sent.
        """
        if not 0 < sent.weight <= self.heaviest:
            raise ConfigError(
                f"SecureSum(heaviest={self.heaviest:g}): {site.name} weighs {sent.weight:g}. Set "
                "heaviest to the examples of the largest site, or make the method uniform"
            )
        if (seen := _contents.get()) is not None:
            seen.append(content(sent.total))
        coded = {name: self._coded(name, leaf, 2.0**self.bits / self.heaviest) for name, leaf in sent.total.items()}
        coded[WEIGHT] = torch.tensor([round_(sent.weight / self.heaviest * self._weight_scale)], dtype=torch.int32)
        return WeightedMean(coded, 1.0), memory

    def decode(self, received: WeightedMean, state: Trees) -> tuple[WeightedMean, Trees]:
        """The inverse, on the sum."""
        if received.weight != round_(received.weight) or not 0 < received.weight <= self.capacity:
            raise ConfigError(
                f"a secure sum counts whole sites, {self.capacity} at most, and this one counts "
                f"{received.weight:g}: secure sums cannot be discounted"
            )
        if wrong := [name for name, leaf in received.total.items() if leaf.dtype != torch.int32]:
            raise ConfigError(f"{wrong[0]} is not what SecureSum sends")
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
            raise ConfigError(f"SecureSum sums real numbers, and {name} holds {leaf.dtype}")
        largest = float(leaf.abs().max()) / self.heaviest
        if not largest <= self.limit:  # also where it is NaN
            raise ConfigError(
                f"SecureSum(limit={self.limit:g}): {name} holds {largest:g}. Nothing was sent. Clip what "
                "is sent, lower the learning rate, or raise limit (and lower bits)"
            )
        exact = math.frexp(scale)[0] == 0.5  # a power of two loses nothing in single precision
        return ((leaf if exact else leaf.double()) * scale).round_().to(torch.int32)


class Terms(NamedTuple):
    """What an ask with ``secure`` demands: the least number of sites in a sum (None: the default), and the most."""

    threshold: int | None
    capacity: int


def terms(request: Request) -> Terms | None:
    """The terms that ``SecureSum`` set for the replies to ``request``; None where there are none."""
    for name, note in request.trees.items():
        if name.startswith("~") and name.endswith("/secure"):
            return Terms(int(note["threshold"]) or None, int(note["capacity"]))
    return None


def layout_of(reply: Reply) -> dict[str, Tree]:
    """The names and shapes of what is to be summed: public, the same at every site, without numbers.

    Raises:
        ValueError: Where the reply holds what cannot be summed in secret.
    """
    layout: dict[str, Tree] = {}
    for part, stat in sorted(reply.parts.items()):
        if not isinstance(stat, WeightedMean) or any(leaf.dtype != torch.int32 for leaf in stat.total.values()):
            raise ConfigError(
                f"the part {part!r} was not made by SecureSum: a secure ask is answered only with sums "
                "in the ring. Send the method through SecureSum()"
            )
        layout[part] = {name: torch.empty(0, *leaf.shape, dtype=torch.int32) for name, leaf in stat.total.items()}
    return layout


def vector_of(reply: Reply) -> Tensor:
    """All numbers of a reply that was made by ``SecureSum``, in a fixed order. Shape [size], int32."""
    layout_of(reply)
    flat = [tree.flatten(reply.mean(part).total) for part in sorted(reply.parts)]
    return torch.cat(flat) if flat else torch.zeros(0, dtype=torch.int32)


def reply_of(vector: Tensor, layout: Mapping[str, Tree], sites: int) -> Reply:
    """The inverse of ``vector_of``, for the sum over ``sites`` sites."""
    parts, start = {}, 0
    for part, leaves in sorted(layout.items()):
        total = {}
        for name, tag in leaves.items():
            size = math.prod(tag.shape[1:])
            total[name] = vector[start : start + size].reshape(tag.shape[1:])
            start += size
        parts[part] = WeightedMean(total, float(sites))
    if start != len(vector):
        raise ConfigError(f"{len(vector)} numbers, where the layout has {start}")
    return Reply(parts)


def round_(x: float) -> int:
    """The nearest whole number."""
    return math.floor(x + 0.5)
