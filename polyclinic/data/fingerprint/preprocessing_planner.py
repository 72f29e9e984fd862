"""Derivation of a preprocessing plan from sums: summaries of columns, and steps with a reason for each.

Spacing, cropping and intensities are decided as in nnU-Net (Isensee et al., Nature Methods 18:203, 2021,
https://doi.org/10.1038/s41592-020-01008-z, online methods): the median spacing, and the 10 % quantile for a coarse
axis; CT is clipped to the range of 99 % of the foreground, other volumes are standardized individually. Three
departures: networks here see whole images, so the size is chosen such that 95 % of images fit; quantiles come from
histograms, so they are accurate to one bin; and for CT the median of each image's own quantiles is used.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

from polyclinic.data.fingerprint.dataset_fingerprint import AXES
from polyclinic.data.fingerprint.preprocessing_plan import SHARES, Column, Reference
from polyclinic.learning.tasks.data_sums import Summary

FEWEST = 10
"""Smallest number of patients of a site that is described individually, and of examples in a group."""
GROUPS = 10
COARSE = 3.0
LARGEST = {2: 256, 3: 128}


def reference(summary: Summary, names: tuple[str, ...], patients: int, classes: tuple[str, ...]) -> Reference:
    """Return the summary by column, computed from the sums over ``patients`` patients."""
    quantiles = torch.stack([summary.quantile(share) for share in SHARES], 1)
    columns = {}
    for i, name in enumerate(names):
        cuts, shares = _groups(summary, i, min(GROUPS, patients // FEWEST))
        varies = float(summary.std[i]) > 1e-9 * (1 + abs(float(summary.mean[i])))
        columns[name] = Column(
            _short(float(summary.mean[i])),
            _short(float(summary.std[i])),
            _short(float(summary.missing[i])),
            tuple(_short(float(q if varies else summary.mean[i])) for q in quantiles[i]),
            cuts,
            shares,
        )
    counts = {name: _short(float(count)) for name, count in zip(classes, summary.classes, strict=False)}
    return Reference(summary.examples, patients, counts, columns)


def _groups(summary: Summary, column: int, groups: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return histogram edges that divide a column into at most ``groups`` groups, none of them small, and their
    shares.
    """
    below = summary.sums["histogram"][column].cumsum(0)[:-1]  # up to each edge
    total, edges = float(summary.sums["count"][column]), summary.edges[column]
    least = max(FEWEST, 1.0)
    if groups < 2 or total < 2 * least:
        return (), ()
    cuts, shares, last = list[float](), list[float](), 0.0
    for k in range(1, groups):
        at = int(torch.searchsorted(below, torch.tensor(k / groups * total, dtype=below.dtype)))
        if at >= len(edges) or float(below[at]) - last < least or total - float(below[at]) < least:
            continue
        cuts.append(float(f"{float(edges[at]):.9g}"))
        shares.append((float(below[at]) - last) / total)
        last = float(below[at])
    return tuple(cuts), (*(round(s, 4) for s in shares), round((total - last) / total, 4)) if cuts else ()


def steps(found: Reference, modality: str) -> tuple[tuple[Mapping[str, Any], ...], tuple[str, ...]]:
    """Return the steps for images that ``found`` describes, and a reason for each."""
    columns = found.columns
    axes = [axis for axis in AXES if f"pixels along {axis}" in columns]
    chosen: list[Mapping[str, Any]] = []
    why: list[str] = []
    spaced = all(f"mm along {axis}" in columns and not columns[f"mm along {axis}"].missing for axis in axes)
    sizes = [columns[f"pixels along {axis}"] for axis in axes]
    if spaced:
        spacing = [columns[f"mm between pixels along {axis}"] for axis in axes]
        wanted = _spacing(spacing)
        if any(one.deviation > 0.01 * one.mean for one in spacing):
            chosen.append({"step": "resample", "mm": wanted})
            why.append(
                "resample: spacing differs; the median of all images along each axis (10 % quantile if it is coarse)"
            )
            extents = [columns[f"mm along {axis}"] for axis in axes]
            sizes = [
                Column(e.mean / mm, e.deviation / mm, 0.0, tuple(q / mm for q in e.quantiles))
                for e, mm in zip(extents, wanted, strict=True)
            ]
    step, reason = _intensity(columns, modality)
    chosen.append(step)
    why.append(reason)
    unit = 8 if len(axes) == 3 else 16
    fits = all(s.deviation < 1e-3 and round(s.mean) % unit == 0 and s.mean <= LARGEST[len(axes)] for s in sizes)
    if not fits and (spaced or len(axes) == 3):
        size = [_whole(s.quantiles[SHARES.index(0.95)], unit, LARGEST[len(axes)]) for s in sizes]
        chosen.append({"step": "crop_pad", "size": size})
        why.append(
            f"crop_pad: 95 % of images fit along each axis, in multiples of {unit} (at most {LARGEST[len(axes)]})"
        )
    elif not fits:
        size = [_whole(s.quantiles[SHARES.index(0.5)], unit, LARGEST[len(axes)]) for s in sizes]
        chosen.append({"step": "resize", "size": size})
        why.append(f"resize: the median size, in multiples of {unit} (at most {LARGEST[len(axes)]})")
    return tuple(chosen), tuple(why)


def _spacing(columns: list[Column]) -> list[float]:
    medians = [c.quantiles[SHARES.index(0.5)] for c in columns]
    return [
        _short(c.quantiles[SHARES.index(0.1)] if m > COARSE * min(medians) else m, 3)
        for c, m in zip(columns, medians, strict=True)
    ]


def _intensity(columns: Mapping[str, Column], modality: str) -> tuple[Mapping[str, Any], str]:
    means = [c for name, c in columns.items() if name == "mean" or name.startswith("mean of channel")]
    spreads = [c for name, c in columns.items() if name == "deviation" or name.startswith("deviation of channel")]
    if modality.upper() in ("CT", "LUNG CT") or modality.upper().startswith("CT"):
        inside = " of the foreground" if "0.5 % quantile of the foreground" in columns else ""
        low, high = (columns[f"{q} % quantile{inside}"].quantiles[SHARES.index(0.5)] for q in ("0.5", "99.5"))
        center, width = _short((low + high) / 2, 4), _short(max(high - low, 1.0), 4)
        return {"step": "window", "center": center, "width": width}, (
            f"window: the middle 99 %{inside}, as the median image has them, in Hounsfield units"
        )
    pictures = all(c.quantiles[0] >= 0 and c.quantiles[-1] <= 1 for c in means) and all(s.mean < 1 for s in spreads)
    if not pictures or "mm between pixels along y" in columns:
        return {"step": "zscore"}, "zscore: each image individually, because the values have no common unit"
    mean = sum(c.mean for c in means) / len(means)  # σ² = mean of the images' σ² + variance of their means
    square = sum(s.mean**2 + s.deviation**2 + c.deviation**2 for s, c in zip(spreads, means, strict=True)) / len(means)
    high = mean + max(math.sqrt(square), 1e-6)
    return {"step": "scale", "low": _short(mean, 6), "high": _short(high, 6)}, (
        "scale: all sites' pixels to mean 0 and deviation 1 (low is their mean, high one deviation more)"
    )


def _whole(pixels: float, unit: int, largest: int) -> int:
    return max(unit, min(largest, math.ceil(round(pixels) / unit) * unit))


def _short(value: float, digits: int = 7) -> float:
    return float(f"{value:.{digits}g}")
