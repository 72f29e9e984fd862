"""The report's figures: inline SVG, identical bytes for identical numbers, readable in print and without color.

No information is encoded by color alone: baselines are hollow, external sites are diamonds, curves have markers and are
labeled at their ends. Text remains text, so that it can be searched, selected and read by a screen reader.
Figures that contain images or contours are drawn with matplotlib, by ``drawing``; the others are not.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from typing import Any

import numpy as np

from polyclinic.errors import ConfigError
from polyclinic.evaluation.calibration import Bin
from polyclinic.evaluation.net_benefit import NetBenefit
from polyclinic.report.svg_plot import INK as INK
from polyclinic.report.svg_plot import LEGEND_ROW, Key, Plot, Ticks, text_width
from polyclinic.statistics.intervals import Estimate
from polyclinic.statistics.paired_tests import Difference, Ranking
from polyclinic.statistics.undefined import Array

TEAL, ORANGE, GRAY, FAINT = "#0b6b6b", "#c1530a", "#6b7280", "#9aa4b0"
CURVES = (TEAL, ORANGE, "#3b5fa8", "#8a3f8f", "#7a6a00", "#a8324a", "#2f7d32", "#5b5b5b")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
MOST_NAMED = 60
"""Rows above which a figure of estimates does not name them: it would be longer than a page."""
WIDTH = 4.4  # inches; the page shows an inch as about 101 pixels, a phone as 82


@dataclass(frozen=True)
class Point:
    """Row of a figure of estimates: a name, a value with limits, and its style."""

    name: str
    value: float | None
    low: float | None
    high: float | None
    text: str
    kind: str = "plain"  # plain, baseline, external, bad

    @classmethod
    def of(cls, name: str, e: Estimate | Difference, text: str, kind: str = "plain") -> "Point":
        """Return the row for an estimate or a difference."""
        return cls(name, e.value, e.low, e.high, text, kind)


STYLE = {  # marker, color, filled
    "plain": ("s", TEAL, True),
    "baseline": ("o", GRAY, False),
    "external": ("D", ORANGE, True),
    "bad": ("v", ORANGE, True),
    "undecided": ("o", TEAL, False),
}


@contextmanager
def drawing(height: float, width: float = WIDTH) -> Iterator[tuple[Any, Any]]:
    """Create an empty figure of matplotlib and its axes, in the report's style, for images and contours.

    Raises:
        ConfigError: If matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "figures with images need matplotlib, which is not installed: pip install matplotlib"
        ) from None
    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": "polyclinic",
        "font.family": ["DejaVu Sans"],
        "font.size": 9,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.8,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height))
        yield figure, figure.add_axes((0.0, 0.0, 1.0, 1.0))


def svg(figure: Any, name: str, alt: str) -> str:
    """Return the figure as an ``<svg>`` element with alternative text, scaling to its container, without a date."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None}, transparent=True, bbox_inches=None)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.S)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{name}-\1"', text)
    text = text.replace('xlink:href="data:', 'href="data:')
    box = re.search(r'viewBox="([^"]+)"', text)
    assert box is not None
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box[1]}" role="img" aria-label="{escape(alt)}">'
    return head + text[text.index(">") + 1 :].strip()


def _span(values: Sequence[float | None], pad: float = 0.06) -> tuple[float, float]:
    known = [v for v in values if v is not None and np.isfinite(v)]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    wide = (high - low) or max(abs(high), 1.0) * 0.1
    return low - pad * wide, high + pad * wide


def inches(text: str, points: float) -> float:
    """Return the width of ``text`` in inches."""
    return text_width(text, points) / 72


def points(
    name: str, alt: str, rows: Sequence[Point], label: str, line: float | None = None, zero: bool = False
) -> str:
    """Draw estimates with their intervals, one per row: a forest plot of sites, methods or differences.

    More than ``MOST_NAMED`` rows are drawn in the order of their values and without names, which the table has.

    Args:
        name: Name of the figure, unique on the page.
        alt: Alternative text.
        rows: Rows from top to bottom.
        label: Label of the axis.
        line: Position of a dotted reference line.
        zero: Whether that line means "no difference" and must be visible.
    """
    if len(rows) > MOST_NAMED:
        return _many_points(name, alt, tuple(rows), label, line, zero)
    return _named_points(name, alt, tuple(rows), label, line, zero)


@lru_cache(maxsize=32)  # the page and its summary have figures in common
def _named_points(name: str, alt: str, rows: tuple[Point, ...], label: str, line: float | None, zero: bool) -> str:
    height = 0.62 + 0.29 * len(rows)
    left = 0.03 + min(max((inches(r.name, 9) for r in rows), default=0.0) / WIDTH, 0.4)
    right = 1 - max((inches(r.text, 8.5) for r in rows), default=0.0) / WIDTH
    wide = max((right - left) / 1.03, 0.2)
    place = (left, 0.5 / height, wide, 1 - 0.56 / height)
    plot = Plot(name, alt, (WIDTH, height), place, _limits(rows, line, zero), (len(rows) - 0.4, -0.6))
    _reference(plot, line, zero)
    for y, row in enumerate(rows):
        mark, color, filled = STYLE[row.kind]
        if row.value is not None:
            if row.low is not None and row.high is not None:
                plot.segments([(y, row.low, row.high)], color, 1.6)
            plot.markers([row.value], [y], mark, 6.5, color, color if filled else "white", 1.4)
        plot.centered(plot.share(1.03), plot.py(y), row.text, 8.5)
    plot.named_rows([r.name for r in rows])
    plot.x_axis(label, most=5)
    return plot.svg()


@lru_cache(maxsize=32)
def _many_points(name: str, alt: str, rows: tuple[Point, ...], label: str, line: float | None, zero: bool) -> str:
    known = sorted((r for r in rows if r.value is not None), key=lambda r: r.value or 0.0)
    limits = (-0.03 * len(known) - 0.5, 1.03 * len(known) - 0.5)
    plot = Plot(name, alt, (WIDTH, 4.6), (0.06, 0.11, 0.91, 0.87), _limits(rows, line, zero), limits)
    _reference(plot, line, zero)
    for kind, (mark, color, filled) in STYLE.items():
        own = [(i, r) for i, r in enumerate(known) if r.kind == kind]
        ranges = [(i, r.low, r.high) for i, r in own if r.low is not None and r.high is not None]
        plot.segments(ranges, color, 0.7, 0.6)
        values = [r.value for _, r in own if r.value is not None]
        plot.markers(values, [i for i, _ in own], mark, 2.6, color, color if filled else "white", 0.6)
    plot.y_axis(f"{len(known)} rows of the table, in order of their values", Ticks((), ()))
    plot.x_axis(label, most=5)
    return plot.svg()


def _limits(rows: Sequence[Point], line: float | None, zero: bool) -> tuple[float, float]:
    """Return limits of the horizontal axis so that it shows all intervals and the reference line."""
    ends = [v for r in rows for v in (r.value, r.low, r.high)]
    return _span([*ends, line, 0.0 if zero else None])


def _reference(plot: Plot, line: float | None, zero: bool) -> None:
    if line is not None:
        plot.reference(INK if zero else FAINT, 1.0, "-" if zero else ":", x=line, behind=True)


def curves(
    name: str,
    alt: str,
    lines: Mapping[str, tuple[Sequence[int], Sequence[float]]],
    label: str,
    first: str = "",
    behind: Sequence[str] = (),
) -> str:
    """Draw one line per method over rounds, labeled at its right end.

    Args:
        name: Name of the figure, unique on the page.
        alt: Alternative text.
        lines: Rounds and values by title.
        label: Label of the vertical axis.
        first: The title to draw in the first color and with a thick line.
        behind: Titles to draw in gray, with dashed lines.
    """
    widest = max((inches(title, 8) for title in lines), default=0.0) / WIDTH
    place = (0.165, 0.16, max((0.815 - widest) / 1.07, 0.2), 0.8)
    low, high = _span([v for _, y in lines.values() for v in y], 0.05)
    limits = _span([float(v) for x, _ in lines.values() for v in x], 0.05)
    plot = Plot(name, alt, (WIDTH, 2.9), place, limits, (low, high))
    ends = []
    order = sorted((t for t in lines if t not in behind), key=lambda t: t != first)
    for i, title in enumerate([*behind, *order]):
        if title not in lines:
            continue
        (x, y), gray, turn = lines[title], title in behind, max(i - len(behind), 0)
        color = GRAY if gray else CURVES[turn % len(CURVES)]
        mark, wide = MARKS[-1 - i % 4] if gray else MARKS[turn % 4], 2.2 if title == first else 1.4
        plot.line(x, y, color, wide, "--" if gray else "-")
        every = max(len(x) // 6, 1)
        plot.markers(x[::every], y[::every], mark, 3.6, color)
        if len(x):
            ends.append((y[-1], title, color, mark))
    gap, at = 0.062 * (high - low), -np.inf
    for value, title, color, mark in sorted(ends):
        at = max(value, at + gap)
        plot.marker_at(plot.share(1.035), plot.py(at), mark, 3.6, color)
        plot.centered(plot.share(1.06), plot.py(at), title, 8, color=color)
    plot.x_axis("Round", integer=True)
    plot.y_axis(label)
    return plot.svg()


def reliability_plot(name: str, alt: str, groups: Mapping[str, Sequence[Bin]]) -> str:
    """Draw observed against predicted frequencies, with the diagonal. Markers grow with the number of cases."""
    plot = Plot(name, alt, (3.9, 3.3), (0.16, 0.15, 0.8, 0.81), (-0.03, 1.03), (-0.03, 1.03))
    plot.line([0, 1], [0, 1], FAINT, 1, ":")
    most, keys = max((b.n for bins in groups.values() for b in bins), default=1), list[Key]()
    for (title, bins), color, mark in zip(groups.items(), (TEAL, ORANGE), ("o", "D"), strict=False):
        plot.line([b.predicted for b in bins], [b.observed for b in bins], color, 1.2)
        for b in bins:
            area = 12 + 60 * b.n / most
            plot.markers([b.predicted], [b.observed], mark, round(area**0.5, 2), color)
        keys.append(Key(title, color, "-", mark, width=1.2))
    plot.x_axis("Predicted probability", most=6)
    plot.y_axis("Observed frequency", most=6)
    plot.legend(keys, plot.left + 8, plot.top + 11)
    return plot.svg()


def decision_plot(name: str, alt: str, curve: Sequence[NetBenefit]) -> str:
    """Draw net benefit over thresholds, against the strategies to treat all patients and none (decision curve)."""
    known = [(p.threshold, p.model.value, p.model.low, p.model.high) for p in curve if p.model.value is not None]
    bands = [(t, low, high) for t, _, low, high in known if low is not None and high is not None]
    top = max([high for *_, high in bands] + [v for _, v, *_ in known if v is not None] + [0.05])
    plot = Plot(name, alt, (3.9, 3.3), (0.18, 0.15, 0.78, 0.81), (0, 1), (-0.35 * top, 1.1 * top))
    plot.band([t for t, *_ in bands], [a for _, a, _ in bands], [b for *_, b in bands], TEAL, 0.15)
    at, values = [t for t, *_ in known], [v for _, v, *_ in known if v is not None]
    plot.line(at, values, TEAL, 1.7)
    low, high = -0.35 * top, 1.1 * top
    inside = [(t, v) for t, v in zip(at, values, strict=True) if low <= v <= high]
    plot.markers([t for t, _ in inside], [v for _, v in inside], "o", 3.2, TEAL)
    every = [(p.threshold, p.treat_all.value) for p in curve if p.treat_all.value is not None]
    plot.line([t for t, _ in every], [v for _, v in every], ORANGE, 1.2, "--")
    plot.reference(INK, 0.9, ":", y=0.0)
    plot.x_axis("Threshold probability", most=6)
    plot.y_axis("Net benefit")
    keys = [
        Key("Model", TEAL, "-", "o", width=1.7),
        Key("Treat all", ORANGE, "--", width=1.2),
        Key("Treat none", INK, ":", width=0.9),
    ]
    plot.legend(keys, plot.right - 29 - text_width("Treat none", 8), plot.top + 11)
    return plot.svg()


def scatter(name: str, alt: str, rows: Sequence[tuple[str, float, float, str]], xlabel: str, ylabel: str) -> str:
    """Draw two quantities against each other, one labeled point per method: (name, x, y, kind)."""
    low, high = _span([r[2] for r in rows], 0.14)
    limits = _span([r[1] for r in rows], 0.22)
    plot = Plot(name, alt, (WIDTH, 2.9), (0.19, 0.16, 0.76, 0.8), limits, (low, high))
    at: list[tuple[float, float]] = []
    for title, x, y, kind in sorted(rows, key=lambda r: r[2]):
        mark, color, filled = STYLE[kind]
        plot.markers([x], [y], mark, 6.5, color, color if filled else "white", 1.4)
        height = max([y, *(b + 0.065 * (high - low) for a, b in at if a == x)])
        at.append((x, height))
        plot.centered(plot.px(x) + 7, plot.py(height), title, 8)
    plot.x_axis(xlabel)
    plot.y_axis(ylabel)
    return plot.svg()


def agreement_plot(
    name: str, alt: str, mean: Array, error: Array, limits: tuple[float, float, float], unit: str
) -> str:
    """Draw a Bland-Altman plot: error against the mean of prediction and truth, with bias and limits of agreement."""
    across, down = _span(mean.tolist(), 0.05), _span([*error.tolist(), *limits], 0.05)
    plot = Plot(name, alt, (WIDTH, 3.0), (0.165, 0.16, 0.665, 0.8), across, down)
    plot.markers(mean, error, "o", 2.6, TEAL, edge=0, opacity=0.55)
    for value, text in zip(limits, ("lower limit", "bias", "upper limit"), strict=True):
        plot.reference(INK, 0.9, "-" if text == "bias" else "--", y=value)
        plot.centered(plot.share(1.01), plot.py(value), text, 8)
    plot.x_axis(f"Mean of prediction and truth{unit}")
    plot.y_axis(f"Prediction − truth{unit}")
    return plot.svg()


@dataclass(frozen=True)
class Curve:
    """A survival curve: probabilities at the figure's times, NaN if not shown, with limits or without."""

    values: Array
    low: Array | None = None
    high: Array | None = None
    dashed: bool = False


def survival_plot(name: str, alt: str, times: Array, groups: Mapping[str, Sequence[Curve]], label: str) -> str:
    """Draw survival probabilities over time, the curves of one group in one color with one marker."""
    x = np.concatenate([[0.0], times])
    plot = Plot(name, alt, (3.9, 3.3), (0.16, 0.15, 0.8, 0.81), (0, 1.03 * float(x[-1])), (0, 1.03))
    keys = []
    for i, (title, curves_) in enumerate(groups.items()):
        color, mark = CURVES[i % len(CURVES)], MARKS[i % len(MARKS)]
        for k, curve in enumerate(curves_):
            y, style = np.concatenate([[1.0], curve.values]), "--" if curve.dashed else "-"
            face = "white" if curve.dashed else color
            if curve.low is not None and curve.high is not None:
                low, high = (np.concatenate([[1.0], v]) for v in (curve.low, curve.high))
                plot.band(x, low, high, color, 0.12)
            plot.line(x, y, color, 1.4, style)
            plot.markers(x, y, mark, 3.6, color, face)
            if not k:
                keys.append(Key(title, color, style, mark, face))
    plot.x_axis(label)
    plot.y_axis("Survival probability", most=6)
    plot.legend(keys, plot.left + 8, plot.bottom - 9 - LEGEND_ROW * (len(keys) - 1))
    return plot.svg()


def ranks_plot(name: str, alt: str, ranking: Ranking, titles: Mapping[str, str], over: str = "sites") -> str:
    """Draw mean ranks (Demšar): a bar joins methods whose ranks do not differ significantly.

    Args:
        name: Name of the figure, unique on the page.
        alt: Alternative text.
        ranking: The ranks.
        titles: Names of methods as the reader knows them.
        over: What the methods are ranked over, in the plural.
    """
    k, bars = len(ranking.methods), len(ranking.cliques)
    height = 0.75 + 0.24 * k + 0.14 * bars
    place = (0.04, 0.02, 0.56, 1 - 0.42 / height)
    plot = Plot(name, alt, (WIDTH, height), place, (0.8, k + 0.2), (k + 0.6 + 0.5 * bars, 0))
    ranks = dict(zip(ranking.methods, ranking.ranks, strict=True))
    for i, (method, rank) in enumerate(ranks.items()):
        y = 0.6 + 0.5 * bars + i
        plot.line([rank, rank, k + 0.3], [0, y, y], FAINT, 0.8, clip=False)
        text = f"{titles.get(method, method)}  {rank:.2f}"
        plot.centered(plot.px(k + 0.4), plot.py(y), text, 8.5)
    plot.x_axis(
        f"Mean rank over {over} (1 is best)", Ticks(range(1, k + 1), [str(r) for r in range(1, k + 1)]), top=True
    )
    plot.markers(list(ranks.values()), [0.0] * k, "o", 5, TEAL)
    for j, clique in enumerate(ranking.cliques):
        y, ends = 0.45 + 0.5 * j, [ranks[m] for m in clique]
        plot.segments([(y, min(ends) - 0.05, max(ends) + 0.05)], ORANGE, 3)
    return plot.svg()
