"""Statistics of cases for planning: what is measured of one image, and sums of it over a site's images.

One row of numbers per image: its spacing, its size after cropping to nonzero voxels, the part that is left, and for
each channel the distribution of the foreground's values, in Hounsfield units, with the same weight for each image. The
sums over rows are histograms with bins that are public and fixed, so that medians and quantiles of a federation follow
from sums, without minima, maxima, or any row.

The statistics are those of nnU-Net's fingerprint: Isensee et al., Nature Methods 18:203, 2021, online methods.
https://doi.org/10.1038/s41592-020-01008-z.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from polyclinic.core.tree import Tree

LOWEST, HIGHEST = -1024, 3071
"""Range of the bins of foreground values, each 1 wide; two more bins hold what is beyond."""
VALUES = HIGHEST - LOWEST + 3
LARGEST = 4096
"""Largest size along an axis that has a bin of its own; larger ones are counted in the last bin."""
RATIO = 1.01
FINEST, COARSEST = -463, 463
"""Bins of spacing: around ``RATIO ** k`` mm, from 0.01 to 100 mm."""
SPACINGS = COARSEST - FINEST + 1
LABELS = 64
"""Labels of which a row says whether the mask contains them; larger ones count as the last."""
HEAD = 9 + LABELS
"""Numbers of a row before the channels: axes, spacing (z, y, x), size (z, y, x), part that is left, whether the spacing
is known, and for each label whether the mask contains it."""
CHANNEL = 3 + VALUES
"""Numbers of a channel: whether there is a foreground, mean, mean of squares, shares of the bins."""


def row_of(pixels: Tensor, mask: Tensor | None, spacing_mm: Sequence[float] | None) -> Tensor:
    """Return the row of one image.

    Args:
        pixels: Values as stored. Shape [C, *spatial].
        mask: Labels, of which those above 0 are the foreground, or None. Shape [*spatial].
        spacing_mm: Millimeters between neighbors along each axis; 1 if they are not known.

    Returns:
        Shape [HEAD + C · CHANNEL], float32.
    """
    axes = pixels.ndim - 1
    inside = (pixels != 0).any(0)
    size = [_extent(inside, axis) for axis in range(axes)]
    left = math.prod(size) / inside.numel()
    flat = [0.0] * (3 - axes)
    spacing = list(spacing_mm) if spacing_mm is not None else [1.0] * axes
    numbers = [axes, *flat, *spacing, *(1.0 for _ in flat), *size, left, float(spacing_mm is not None)]
    present = torch.zeros(LABELS, dtype=torch.float64)
    if mask is not None:
        present[mask.unique().clamp(0, LABELS - 1).long()] = 1.0
    parts = [torch.tensor(numbers, dtype=torch.float64), present]
    for channel in pixels:
        values = channel[mask > 0].double() if mask is not None and bool((mask > 0).any()) else torch.empty(0)
        parts.append(_channel(values))
    return torch.cat(parts).float()


def _extent(inside: Tensor, axis: int) -> int:
    """Return the size along ``axis`` of the box around what is inside; the whole size if nothing is."""
    line = inside.movedim(axis, 0).flatten(1).any(1).nonzero().flatten()
    return int(line[-1] - line[0]) + 1 if len(line) else inside.shape[axis]


def _channel(values: Tensor) -> Tensor:
    if not len(values):
        return torch.zeros(CHANNEL, dtype=torch.float64)
    bins = ((values + 0.5).floor() - LOWEST + 1).clamp(0, VALUES - 1).long()
    shares = bins.bincount(minlength=VALUES).double() / len(values)
    first = torch.tensor([1.0, float(values.mean()), float(values.square().mean())], dtype=torch.float64)
    return torch.cat([first, shares])


def rows_in(data: Any) -> Iterator[Tensor]:
    """Yield the rows of ``data`` in groups: what ``case_rows`` of the data returns, else of its examples.

    Data whose examples are views of larger images provide ``case_rows``, an iterable of rows [n, F].
    """
    if hasattr(data, "case_rows"):
        yield from data.case_rows()
        return
    for chunk in torch.arange(len(data)).split(16):
        x, y = data[chunk]
        masks = y if not y.is_floating_point() and y.ndim == x.ndim - 1 and y.ndim > 1 else [None] * len(x)
        yield torch.stack([row_of(one, mask, None) for one, mask in zip(x, masks, strict=True)])


def sums_of(data: Any) -> Tree:
    """Return the sums over the cases of ``data``: counts of spacings, sizes and parts, and of foreground values.

    Returns:
        ``cases`` and ``measured`` [1]: all cases, and those that state their spacing; ``axes`` [2]: those with two and
        with three axes; ``labels`` [LABELS]: those that contain a label; ``spacing`` [3, SPACINGS], ``size``
        [3, LARGEST + 1], ``left`` [101]; and for C channels ``known``, ``mean``, ``square`` [C] and ``values``
        [C, VALUES].
    """
    total: Tree = {}
    for rows in rows_in(data):
        found = _sums(rows.double())
        total = {name: leaf + total[name] if total else leaf for name, leaf in found.items()}
    return total or _sums(torch.zeros(0, HEAD, dtype=torch.float64))


def _sums(rows: Tensor) -> Tree:
    channels = (rows.shape[1] - HEAD) // CHANNEL
    parts = rows[:, HEAD:].view(len(rows), channels, CHANNEL).sum(0)
    return {
        "cases": torch.tensor([len(rows)], dtype=torch.float64),
        "axes": torch.stack([(rows[:, 0] == axes).double().sum() for axes in (2, 3)]),
        "spacing": torch.stack([_counted(spacing_bin(rows[:, 1 + axis]), SPACINGS) for axis in range(3)]),
        "size": torch.stack([_counted(rows[:, 4 + axis].round().clamp(0, LARGEST), LARGEST + 1) for axis in range(3)]),
        "measured": rows[:, 8].sum()[None],
        "labels": rows[:, 9:HEAD].sum(0),
        "left": _counted((rows[:, 7] * 100).floor().clamp(0, 100), 101),
        "known": parts[:, 0].clone(),
        "mean": parts[:, 1].clone(),
        "square": parts[:, 2].clone(),
        "values": parts[:, 3:].contiguous(),
    }


def sizes_of(data: Any, spacing_mm: Tensor) -> Tree:
    """Return the counts of sizes after resampling the cases of ``data`` to ``spacing_mm`` [3]: ``resampled``
    [3, LARGEST + 1].
    """
    total = torch.zeros(3, LARGEST + 1, dtype=torch.float64)
    for rows in rows_in(data):
        values = rows.double()
        for axis in range(3):
            known = values[:, 1 + axis] > 0
            ratio = torch.where(known, values[:, 1 + axis] / spacing_mm[axis].double(), 1.0)
            new = (ratio * values[:, 4 + axis]).round()
            total[axis] += _counted(new.clamp(0, LARGEST), LARGEST + 1)
    return {"resampled": total}


def _counted(bins: Tensor, count: int) -> Tensor:
    return bins.long().bincount(minlength=count).double()


def spacing_bin(spacing_mm: Tensor) -> Tensor:
    """Return the number of the bin of each spacing; the first for 0, the spacing of an axis that does not exist."""
    exponent = (spacing_mm.clamp_min(1e-6).log() / math.log(RATIO)).round()
    return exponent.clamp(FINEST, COARSEST) - FINEST


def spacing_of(bin: int) -> float:
    """Return the spacing of a bin: the number with the fewest digits in it, such as 0.7, 1.25 or 3 mm."""
    middle = RATIO ** (bin + FINEST)
    low, high = middle / math.sqrt(RATIO), middle * math.sqrt(RATIO)
    for digits in range(-2, 6):
        step = 10.0**-digits
        inside = [n for n in range(math.ceil(low / step), math.floor(high / step) + 1) if n > 0]
        if inside:
            chosen = min(inside, key=lambda n: (n % 5 != 0, abs(n * step - middle)))
            return round(chosen * step, max(digits, 0))
    return middle


def quantile(counts: Tensor, share: float) -> tuple[int, int, float]:
    """Return the two bins between which a quantile of counted values lies, and the weight of the second.

    The quantile interpolates linearly between neighbors in the sorted list of values, as NumPy's does.
    """
    total = int(counts.sum().round())
    position = share * (total - 1)
    below = math.floor(position)
    cumulated = counts.cumsum(0).round()
    first, second = (int(torch.searchsorted(cumulated, float(min(n, total - 1)) + 0.5)) for n in (below, below + 1))
    return first, second, position - below


def value_quantile(shares: Tensor, share: float) -> float:
    """Return the quantile of foreground values from the shares of their bins: the middle of the bin that holds it."""
    cumulated = shares.cumsum(0)
    at = int(torch.searchsorted(cumulated, share * float(cumulated[-1])))
    return float(min(max(at - 1, 0), VALUES - 3) + LOWEST)
