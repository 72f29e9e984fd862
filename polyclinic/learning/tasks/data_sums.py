"""Additive sums over data, from which means, deviations, quantiles and class counts are computed."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polyclinic.core.serialization import savable
from polyclinic.core.tree import Tree
from polyclinic.learning.batch import chunks, targets_of


@savable("statistics.Summary", 1)
@dataclass(frozen=True)
class Summary:
    """Statistics of a data set, by channel for images and by column for tables.

    Attributes:
        sums: The sums of ``count_up`` and ``spread_out``, added over sites.
        edges: Edges of the histogram's inner bins: [channels, bins + 1].
    """

    sums: Tree
    edges: Tensor

    @property
    def examples(self) -> int:
        """Number of examples."""
        return int(self.sums["examples"])

    @property
    def classes(self) -> Tensor:
        """Number of examples (for masks: pixels) of each class, or with each label positive. [classes], float64."""
        return self.sums["classes"]

    @property
    def missing(self) -> Tensor:
        """Fraction of values that are not finite. [channels]"""
        return self.sums["missing"] / (self.sums["missing"] + self.sums["count"]).clamp_min(1)

    @property
    def mean(self) -> Tensor:
        """Mean of the finite values. [channels]"""
        return self.sums["sum"] / self.sums["count"].clamp_min(1)

    @property
    def std(self) -> Tensor:
        """``√(Σ(x − m)²/n − (mean − m)²)``, the standard deviation, with m the histogram's middle or else 0."""
        n = self.sums["count"].clamp_min(1)
        if "around" not in self.sums:
            return (self.sums["square"] / n - self.mean.square()).clamp_min(0).sqrt()
        return (self.sums["around"] / n - (self.mean - middle(self.edges)).square()).clamp_min(0).sqrt()

    def quantile(self, q: float) -> Tensor:
        """Return the ``q`` quantile to within a bin of the histogram. [channels]

        A quantile beyond the histogram's range is given as the end of the range.
        """
        counts = self.sums["histogram"]
        below = torch.cat([torch.zeros_like(counts[:, :1]), counts.cumsum(1)], 1)  # up to each edge, from -∞
        wanted = max(q, 1e-12) * below[:, -1:]  # quantile 0 is the position of the first value
        lower, upper = below[:, 1:-2], below[:, 2:-1]
        index = (upper < wanted).sum(1, keepdim=True).clamp_max(upper.shape[1] - 1)
        inside = upper.gather(1, index) - lower.gather(1, index)
        share = ((wanted - lower.gather(1, index)) / inside.clamp_min(1e-12)).clamp(0, 1)
        left, right = self.edges[:, :-1].gather(1, index), self.edges[:, 1:].gather(1, index)
        return (left + share * (right - left)).squeeze(1)


def count_up(data: Any, classes: int) -> dict[str, Tensor]:
    """Sum over ``data`` in double precision: counts and moments by channel, examples, and targets by class."""
    sums: dict[str, Tensor] = {"examples": torch.tensor(float(len(data)), dtype=torch.float64)}
    for chunk in chunks(data, 256):
        x, y = data[chunk]
        values = x.double().transpose(0, 1).flatten(1)
        known = values.isfinite()
        values = values.nan_to_num(0, 0, 0)
        part = {
            "count": known.sum(1).double(),
            "missing": (~known).sum(1).double(),
            "sum": values.sum(1),
            "square": values.square().sum(1),
            "classes": _classes(y, classes),
        }
        sums |= {name: sums[name] + leaf if name in sums else leaf for name, leaf in part.items()}
    return sums


def class_counts(data: Any, classes: int) -> Tensor:
    """Return the number of examples of each class in ``data``, whose targets are classes: [classes], float64."""
    labels = targets_of(data) if len(data) else torch.zeros(0, dtype=torch.int64)
    return torch.bincount(labels, minlength=classes).double()


def spread_out(data: Any, edges: Tensor) -> dict[str, Tensor]:
    """Sum over ``data`` in a second pass, for a histogram with ``edges`` [channels, bins + 1] around the mean.

    Returns:
        ``histogram`` [channels, bins + 2]: numbers of values below, in each bin, and above; and ``around``
        [channels]: ``Σ(x − m)²`` around the middle m, which is more precise than ``Σx²``.
    """
    counts = torch.zeros(edges.shape[0], edges.shape[1] + 1, dtype=torch.float64)
    around = torch.zeros(edges.shape[0], dtype=torch.float64)
    for chunk in chunks(data, 256):
        values = data[chunk][0].double().transpose(0, 1).flatten(1)
        for channel, (row, own) in enumerate(zip(values, edges, strict=True)):
            known = row[row.isfinite()]
            counts[channel] += torch.bucketize(known, own).bincount(minlength=counts.shape[1])
            around[channel] += (known - middle(edges)[channel]).square().sum()
    return {"histogram": counts, "around": around}


def middle(edges: Tensor) -> Tensor:
    """Return the middle of a histogram: [channels]."""
    return (edges[:, 0] + edges[:, -1]) / 2


def _classes(targets: Tensor, classes: int) -> Tensor:
    if targets.is_floating_point():  # labels or regression targets, which are summed
        return targets.double().nan_to_num().sum(0)
    known = targets.flatten()
    return known[known >= 0].bincount(minlength=classes).double()  # without pixels that are not annotated
