"""Aggregatable values. Each class defines how two site contributions are combined.

Model updates, metrics and data statistics are all values that merge by ``+``, in any order and any grouping. One method
can therefore run synchronously, with a buffer, over a hierarchy of servers, or under secure summation. Representing a
mean as two sums follows TensorFlow Federated.
"""

import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Self, TypeAlias, TypeVar

from polyclinic.core import tree
from polyclinic.core.serialization import savable
from polyclinic.core.tree import Tree
from polyclinic.errors import RunError

WEIGHT = "/weight"
"""The leaf of a site's contribution to a ``PerSite`` that states its weight, if it does: one number of at least 0."""


class Weightless(RunError, ZeroDivisionError):
    """No site has a weight above 0, so that no mean of the sites is defined."""

    def __init__(self) -> None:
        super().__init__(
            "the mean is undefined: its weights sum to 0. The weight of a site is usually its number of training "
            "examples: at least one site needs some"
        )

    def __reduce__(self) -> tuple[type["Weightless"], tuple[()]]:
        """Rebuild without arguments, since worker processes send errors to their parent."""
        return type(self), ()


@savable("core.WeightedMean", 1)
@dataclass(frozen=True)
class WeightedMean:
    """A weighted mean, stored as its two sums.

    Attributes:
        total: Σ w·x, leaf by leaf.
        weight: Σ w.
    """

    total: Tree
    weight: float

    @classmethod
    def of(cls, value: Tree, weight: float = 1.0) -> Self:
        """Return the mean of the single ``value``."""
        return cls(tree.scale(value, weight), float(weight))

    @classmethod
    def of_own(cls, value: Tree, weight: float = 1.0) -> Self:
        """Return the mean of the single ``value``, which is scaled in place: no one else may use it."""
        tree.scale_(value, weight)
        return cls(value, float(weight))

    @property
    def value(self) -> Tree:
        """``Σ w·x / Σ w``."""
        return tree.scale(self.total, self._share)

    def apply_to(self, a: Tree, by: float = 1.0) -> Tree:
        """Return ``a + by · mean``, leaf by leaf without materializing the mean. ``a`` may have more leaves."""
        return tree.shift(a, self.total, by * self._share)

    @property
    def _share(self) -> float:
        if self.weight == 0:
            raise Weightless
        return 1.0 / self.weight

    @property
    def trees(self) -> tuple[Tree, ...]:
        """The tensors that are transmitted."""
        return (self.total,)

    def __add__(self, other: Self) -> Self:
        return type(self)(tree.add(self.total, other.total), self.weight + other.weight)

    def __mul__(self, by: float) -> Self:
        return type(self)(tree.scale(self.total, by), self.weight * by)


@savable("core.ElementwiseMean", 1)
@dataclass(frozen=True)
class ElementwiseMean:
    """A mean with one weight per element, as in Fisher merging.

    Attributes:
        total: Σ w·x, element by element.
        weight: Σ w, with the names and shapes of ``total``.
    """

    total: Tree
    weight: Tree

    @classmethod
    def of(cls, value: Tree, weight: Tree) -> Self:
        """Return the mean of the single ``value``."""
        return cls(tree.mul(value, weight), weight)

    @property
    def value(self) -> Tree:
        """``Σ w·x / Σ w``, and 0 where ``Σ w`` is 0."""
        return tree.zip_with(lambda x, w: x / w.clamp_min(1e-12), self.total, self.weight)

    @property
    def trees(self) -> tuple[Tree, ...]:
        """The tensors that are transmitted."""
        return (self.total, self.weight)

    def __add__(self, other: Self) -> Self:
        return type(self)(tree.add(self.total, other.total), tree.add(self.weight, other.weight))

    def __mul__(self, by: float) -> Self:
        return type(self)(tree.scale(self.total, by), tree.scale(self.weight, by))


@savable("core.PerSite", 1)
@dataclass(frozen=True)
class PerSite:
    """Separate contributions of each site. Incompatible with secure summation; a site's policy must allow it.

    Attributes:
        items: The contribution of each site, by site name.
    """

    items: Mapping[str, Tree]

    @property
    def trees(self) -> tuple[Tree, ...]:
        """The tensors that are transmitted."""
        return tuple(self.items.values())

    def stated_weights(self) -> dict[str, float]:
        """Return the weight of each site that states one."""
        return {site: float(leaves[WEIGHT]) for site, leaves in self.items.items() if WEIGHT in leaves}

    def __add__(self, other: Self) -> Self:
        if twice := self.items.keys() & other.items.keys():
            raise ValueError(f"two contributions from the same site: {sorted(twice)}")
        return type(self)(dict(sorted({**self.items, **other.items}.items())))

    def __mul__(self, by: float) -> Self:
        return self


def require_weight(weights: dict[str, float]) -> dict[str, float]:
    """Return the ``weights`` of sites.

    Raises:
        Weightless: If none is above 0.
    """
    if not any(weight > 0 for weight in weights.values()):
        raise Weightless
    return weights


@savable("core.PerSiteUniform", 1)
@dataclass(frozen=True)
class PerSiteUniform(PerSite):
    """Per-site contributions with the same leaves: names, shapes and types are checked as those of a mean."""


Stat: TypeAlias = WeightedMean | ElementwiseMean | PerSite
Form: TypeAlias = tuple[tuple[object, ...], ...]
S = TypeVar("S", WeightedMean, ElementwiseMean, PerSite)


@savable("core.Reply", 1)
@dataclass(frozen=True)
class Reply:
    """Named aggregates. Replies merge by ``+``, part by part; ``reply * by`` multiplies every weight by ``by``."""

    parts: Mapping[str, Stat] = field(default_factory=dict)

    def mean(self, part: str) -> WeightedMean:
        """Return the weighted mean named ``part``."""
        return self._get(part, WeightedMean)

    def applied(self, part: str, params: Tree) -> Tree:
        """Return ``params`` plus the mean ``part``. They do not change if no site sent it, or all weights are 0."""
        if part not in self.parts or not (mean := self.mean(part)).weight:
            return params
        return mean.apply_to(params)

    def leaf_mean(self, part: str) -> ElementwiseMean:
        """Return the elementwise mean named ``part``."""
        return self._get(part, ElementwiseMean)

    def gather(self, part: str) -> Mapping[str, Tree]:
        """Return each site's contribution to ``part``, by site name."""
        return self._get(part, PerSite).items

    @functools.cached_property
    def nbytes(self) -> int:
        """Size of the transmitted tensors in bytes."""
        return sum(tree.nbytes(t) for stat in self.parts.values() for t in stat.trees)

    @functools.cached_property
    def form(self) -> Form:
        """Parts, classes, names, shapes and types; of a ``PerSite`` that may differ between sites, the part only."""
        leaves: list[tuple[object, ...]] = []
        for part, stat in sorted(self.parts.items()):
            leaves.append((part, type(stat).__name__))
            if isinstance(stat, (WeightedMean, ElementwiseMean, PerSiteUniform)):
                for first in stat.trees[:1]:  # a reply that is not validated yet may have none
                    leaves += [(part, name, first[name].shape, first[name].dtype) for name in sorted(first)]
        return tuple(leaves)

    def __add__(self, other: "Reply") -> "Reply":
        merged = dict(self.parts)
        for part, stat in other.parts.items():
            merged[part] = merged[part] + stat if part in merged else stat  # type: ignore[operator]
        return Reply(merged)

    def __mul__(self, by: float) -> "Reply":
        return Reply({part: stat * by for part, stat in self.parts.items()})

    def _get(self, part: str, kind: type[S]) -> S:
        stat = self.parts.get(part)
        if not isinstance(stat, kind):
            raise KeyError(f"no {kind.__name__} named {part!r} in the reply, which has {sorted(self.parts)}")
        return stat


class RunningSum:
    """A sum to which replies are added one by one or in groups. It is bit-identical to adding with ``+``.

    A part that only some sites sent is summed over those. No reply is kept or modified.

    Attributes:
        total: The sum so far. Its tensors may change when a reply is added.
        spare: Tensors of the form of the sum, by part, to which no one refers and the next sum may be written.
    """

    def __init__(self, spare: Mapping[str, Tree] = MappingProxyType({})) -> None:
        """Create an empty sum, which may use the tensors ``spare`` of an earlier sum of replies of the same form."""
        self.total = Reply()
        self.spare = dict(spare)
        self._own = set[str]()  # the parts of `total` whose tensors were allocated here

    def add(self, reply: Reply) -> None:
        """Add ``reply``, which is read once."""
        for part, stat in reply.parts.items():
            sum_ = self.total.parts.get(part)
            if part in self._own and isinstance(sum_, WeightedMean) and isinstance(stat, WeightedMean):
                tree.add_(sum_.total, stat.total)
                stat = WeightedMean(sum_.total, sum_.weight + stat.weight)
            elif sum_ is not None:
                stat = sum_ + stat  # type: ignore[operator]
                self._own.add(part)
            self.total = Reply({**self.total.parts, part: stat})

    def add_if_finite(self, replies: Sequence[Reply]) -> bool:
        """Add ``replies`` if all their values are finite and ``total`` stays so; return whether they were added.

        They have the form of ``total``, and all parts are weighted means. The new sum is written to other tensors than
        the old one, block by block, and each block is checked while it is in the cache: values are read once, and a
        sum that is not finite is discarded. A single reply, for which this saves nothing, is read twice instead.
        """
        if len(replies) == 1 and self._own.issuperset(replies[0].parts):
            if not all(tree.finite(mean.total) for mean in map(replies[0].mean, replies[0].parts)):
                return False
            self.add(replies[0])
            return True
        summands = [self.total, *replies] if self.total.parts else replies
        sums = {part: self._sum([reply.mean(part) for reply in summands], part) for part in replies[0].parts}
        if all(finite for _, finite in sums.values()):
            self.spare |= {part: self.total.mean(part).total for part in self._own}
            self._own = set(sums) if len(summands) > 1 else set()
            self.total = Reply({part: mean for part, (mean, _) in sums.items()})
            return True
        if len(summands) > 1:
            self.spare |= {part: mean.total for part, (mean, _) in sums.items()}
        return False

    def _sum(self, means: Sequence[WeightedMean], part: str) -> tuple[WeightedMean, bool]:
        """Return the sum of ``means`` in other tensors than theirs, unless there is one, and whether it is finite."""
        leaves, finite = tree.sum_of([mean.total for mean in means], self.spare.pop(part, None))
        return WeightedMean(leaves, functools.reduce(operator.add, [mean.weight for mean in means])), finite


def merge(replies: Iterable[Reply]) -> Reply:
    """Return the sum of ``replies`` from left to right (see ``RunningSum``)."""
    total = RunningSum()
    for reply in replies:
        total.add(reply)
    return total.total
