"""The common part of all rules: updates of several sites, processed in chunks, and outlier statistics for each.

Many rules need only the inner products of the updates, a K x K matrix, and return one coefficient per site. Rules that
work by coordinate process a few thousand coordinates of all sites at a time. The memory of a rule is therefore that of
the updates and two trees.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from polyclinic.core.tree import Tree
from polyclinic.errors import ConfigError

CHUNK = 2**15  # coordinates per chunk, which for some twenty sites fit into a processor's cache


@dataclass(frozen=True)
class Updates:
    """The updates of several sites, without a copy.

    Attributes:
        trees: Each site's update, by name, in name order. All have the same leaves.
        weights: The stated weights, such as numbers of examples.
        factors: The factor of each update, float64 [K]; 1 unless it was scaled down.
    """

    trees: Mapping[str, Tree]
    weights: Tensor
    factors: Tensor

    @classmethod
    def of(cls, trees: Mapping[str, Tree], weights: Mapping[str, float] | None = None) -> "Updates":
        """Return the updates in ``trees``, sorted by site; the weight is 1 unless ``weights`` gives another.

        Raises:
            ConfigError: If there are none, or one has other tensors than the others.
        """
        names = sorted(trees)
        if not names:
            raise ConfigError("a rule needs at least one update")
        if wrong := faults(trees):
            raise ConfigError("; ".join(f"{site}: {reason}" for site, reason in wrong.items()))
        claimed = torch.tensor([(weights or {}).get(name, 1.0) for name in names], dtype=torch.float64)
        return cls({name: trees[name] for name in names}, claimed, torch.ones(len(names), dtype=torch.float64))

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites of the updates."""
        return tuple(self.trees)

    def __len__(self) -> int:
        return len(self.trees)

    @cached_property
    def gram(self) -> Tensor:
        """Inner products ⟨x_i, x_j⟩ in double precision. Shape [K, K]."""
        total = torch.zeros(len(self), len(self), dtype=torch.float64)
        for _, _, block in self.blocks():
            wide = block.double()
            total += wide @ wide.T
        return total * self.factors * self.factors[:, None]

    @property
    def norms(self) -> Tensor:
        """Lengths ‖x_i‖. Shape [K]."""
        return self.gram.diagonal().clamp_min(0).sqrt()

    @property
    def distances(self) -> Tensor:
        """Distances ‖x_i − x_j‖. Shape [K, K], and exactly 0 on the diagonal."""
        squares = self.gram.diagonal()
        far = (squares + squares[:, None] - 2 * self.gram).clamp_min(0).sqrt()
        return far.fill_diagonal_(0.0)

    def scaled(self, factors: Tensor) -> "Updates":
        """Return the same updates, the i-th multiplied by ``factors[i]``."""
        return replace(self, factors=self.factors * factors)

    def only(self, sites: tuple[str, ...]) -> "Updates":
        """Return the updates of ``sites`` alone."""
        keep = [i for i, name in enumerate(self.trees) if name in sites]
        part = Updates({self.sites[i]: self.trees[self.sites[i]] for i in keep}, self.weights[keep], self.factors[keep])
        part.__dict__["gram"] = self.gram[keep][:, keep]
        return part

    def blend(self, shares: Tensor) -> Tree:
        """Return ``Σ shares_i · x_i``, reading each update once and holding one tree."""
        coefficients = (shares.double() * self.factors).tolist()
        total: dict[str, Tensor] = {}
        for update, c in zip(self.trees.values(), coefficients, strict=True):
            for name, leaf in update.items():
                if name not in total:
                    total[name] = leaf * c if c else torch.zeros_like(leaf)
                elif c:
                    total[name].add_(leaf, alpha=c)
        return total

    def by_coordinate(self, choose: Callable[[list[Tensor]], Tensor]) -> Tree:
        """Return one update whose coordinates ``choose`` computes from those of all sites.

        Args:
            choose: Maps K rows of c coordinates, which it may overwrite, to c coordinates.
        """
        scaled = bool((self.factors != 1).any())
        first = next(iter(self.trees.values()))
        out = {name: torch.empty_like(leaf, memory_format=torch.contiguous_format) for name, leaf in first.items()}
        for name, where, block in self.blocks():
            if scaled:
                block = block * self.factors[:, None].to(block.dtype)
            out[name].view(-1)[where] = choose(list(block))
        return out

    def blocks(self) -> Iterator[tuple[str, slice, Tensor]]:
        """Yield a leaf's name, a range of its coordinates, and the sites' values there, not scaled: a new [K, c]."""
        first = next(iter(self.trees.values()))
        for name, leaf in first.items():
            rows = [update[name].reshape(-1) for update in self.trees.values()]
            for start in range(0, leaf.numel(), CHUNK):
                where = slice(start, min(start + CHUNK, leaf.numel()))
                yield name, where, torch.stack([row[where] for row in rows])


class Verdict(NamedTuple):
    """The result of a rule.

    Attributes:
        aggregate: The aggregated update.
        shares: Each site's share of it; None if a rule decides coordinate by coordinate.
    """

    aggregate: Tree
    shares: Mapping[str, float] | None


@dataclass(frozen=True)
class Rule(ABC):
    """A rule that aggregates several updates into one."""

    @abstractmethod
    def aggregate(self, updates: Updates, last: Tree) -> Verdict:
        """Aggregate ``updates``.

        Args:
            last: The previous result of this rule for the same kind of update; empty the first time.

        Raises:
            ConfigError: If there are too few updates for the rule's guarantee.
        """

    @property
    def remembers(self) -> bool:
        """Whether the rule needs ``last``."""
        return False


@dataclass(frozen=True)
class Average(Rule):
    """The plain mean, which a single site can move arbitrarily; for comparison, and to monitor sites without a rule.

    With ``bound``, no update is longer than that multiple of the median length. A site is an outlier by the median of
    its distances to the others (Iglewicz and Hoaglin, "How to detect and handle outliers", 1993).

    Attributes:
        weighted: Whether to use the weights that the sites state.
    """

    weighted: bool = True

    def aggregate(self, updates: Updates, last: Tree) -> Verdict:
        """Aggregate by ``Σ w_i x_i / Σ w_i``."""
        return blended(updates, updates.weights if self.weighted else torch.ones(len(updates)))


def blended(updates: Updates, weights: Tensor) -> Verdict:
    """Return the mean of ``updates`` with ``weights``, which need not sum to 1."""
    shares = weights.double() / weights.double().sum()
    return Verdict(updates.blend(shares), dict(zip(updates.sites, shares.tolist(), strict=True)))


def presumed(corrupt: float, count: int, floor: int, times: int, rule: str) -> int:
    """Return f, the number of corrupt sites among ``count`` updates that are to be tolerated.

    Raises:
        ConfigError: If that takes more updates: ``times`` · f + ``floor``.
    """
    if not 0 <= corrupt < 0.5:
        raise ConfigError(
            f"{rule}: corrupt is the share of sites presumed corrupt, at least 0 and below 0.5, not {corrupt}"
        )
    f = int(corrupt * count + 1e-9)
    if count < times * f + floor:
        raise ConfigError(
            f"{rule} needs {times * f + floor} updates to withstand {f} corrupt sites, and there are "
            f"{count}: lower corrupt, choose another rule, or wait for more sites"
        )
    return f


def faults(trees: Mapping[str, Tree]) -> dict[str, str]:
    """Return the sites whose updates cannot be combined with the others, each with the reason.

    The required names, shapes and types are those of the majority.
    """
    forms = {site: tuple((n, tuple(x.shape), str(x.dtype)) for n, x in sorted(t.items())) for site, t in trees.items()}
    counted = sorted(forms.values(), key=lambda form: list(forms.values()).count(form))
    found = {}
    for site, form in sorted(forms.items()):
        if form != counted[-1]:
            odd = sorted(set(form) ^ set(counted[-1]))
            found[site] = f"its update has other tensors than most ({odd[0][0]} differs)" if odd else "no update"
        elif bad := [n for n, x in trees[site].items() if x.is_floating_point() and not bool(x.isfinite().all())]:
            found[site] = f"{bad[0]} holds NaN or an infinity"
    return found


class Standing(NamedTuple):
    """Outlier statistics of one update in its round.

    Attributes:
        score: By how many robust standard deviations its median distance to the others exceeds the usual one.
        norm: Its length, in multiples of the median length.
        cosine: The cosine of its direction with the others' mean direction, -1 to 1.
    """

    score: float
    norm: float
    cosine: float

    @property
    def outlying(self) -> bool:
        """Whether it is an outlier: a score above 3.5, after Iglewicz and Hoaglin, 1993."""
        return self.score > 3.5


def standings(updates: Updates) -> dict[str, Standing]:
    """Return the outlier statistics of each update. With fewer than four updates every score is 0."""
    n, gram, norms = len(updates), updates.gram, updates.norms
    middle = median(norms)
    unit = gram / (norms * norms[:, None]).clamp_min(1e-300)
    others = (unit.sum(1) - unit.diagonal()) / torch.stack(
        [_without(unit, i).sum().clamp_min(1e-30).sqrt() for i in range(n)]
    )
    far = torch.stack([median(_drop(row, i)) for i, row in enumerate(updates.distances)]) if n > 1 else norms
    spread = 1.4826 * median((far - median(far)).abs())
    # If the spread is 0 (identical updates), a millionth of the median distance replaces it.
    scores = (far - median(far)) / spread.clamp_min(1e-6 * float(median(far)) + 1e-300)
    found = {}
    for i, site in enumerate(updates.sites):
        ratio = float(norms[i] / middle) if middle > 0 else float(norms[i] > 0)
        found[site] = Standing(float(scores[i]) if n > 3 else 0.0, ratio, float(others[i]) if n > 1 else 1.0)
    return found


def median(x: Tensor) -> Tensor:
    """Return the median of x [n], the mean of the two middle values if n is even (``torch.median`` gives the lower)."""
    ordered = x.sort().values
    return (ordered[(len(x) - 1) // 2] + ordered[len(x) // 2]) / 2


def _drop(row: Tensor, i: int) -> Tensor:
    return torch.cat([row[:i], row[i + 1 :]])


def _without(square: Tensor, i: int) -> Tensor:
    keep = [j for j in range(len(square)) if j != i]
    return square[keep][:, keep]
