"""The report's figures: inline SVG, identical bytes for identical numbers, readable in print and without color.

No information is encoded by color alone: baselines are hollow, external sites are diamonds, curves have markers and are
labeled at their ends. Text remains text, so that it can be searched, selected and read by a screen reader.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from html import escape
from typing import Any

import numpy as np

from polyclinic.errors import ConfigError
from polyclinic.evaluation.calibration import Bin
from polyclinic.evaluation.net_benefit import NetBenefit
from polyclinic.statistics.intervals import Estimate
from polyclinic.statistics.paired_tests import Difference, Ranking
from polyclinic.statistics.undefined import Array

TEAL, ORANGE, GRAY, INK, FAINT = "#0b6b6b", "#c1530a", "#6b7280", "#1c2733", "#9aa4b0"
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
    """Create an empty figure and its axes, in the report's style.

    Raises:
        ConfigError: If matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("the report needs matplotlib, which is not installed: pip install matplotlib") from None
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


@cache
def inches(text: str, points: float) -> float:
    """Return the width of ``text`` in inches."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(family="DejaVu Sans", size=points)
    return float(text_to_path.get_text_width_height_descent(text, font, ismath=False)[0]) / 72


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
    with drawing(height) as (figure, axes):
        left = 0.03 + min(max((inches(r.name, 9) for r in rows), default=0.0) / WIDTH, 0.4)
        right = 1 - max((inches(r.text, 8.5) for r in rows), default=0.0) / WIDTH
        wide = max((right - left) / 1.03, 0.2)
        axes.set_position((left, 0.5 / height, wide, 1 - 0.56 / height))
        for y, row in enumerate(rows):
            mark, color, filled = STYLE[row.kind]
            if row.value is not None:
                if row.low is not None and row.high is not None:
                    axes.plot([row.low, row.high], [y, y], color=color, lw=1.6, solid_capstyle="butt")
                face = color if filled else "white"
                axes.plot([row.value], [y], mark, color=color, mfc=face, ms=6.5, mew=1.4)
            axes.text(1.03, y, row.text, transform=axes.get_yaxis_transform(), va="center", fontsize=8.5)
        _limits(axes, rows, line, zero)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_yticks(range(len(rows)), [r.name for r in rows])
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(label)
        return svg(figure, name, alt)


@lru_cache(maxsize=32)
def _many_points(name: str, alt: str, rows: tuple[Point, ...], label: str, line: float | None, zero: bool) -> str:
    known = sorted((r for r in rows if r.value is not None), key=lambda r: r.value or 0.0)
    with drawing(4.6) as (figure, axes):
        axes.set_position((0.06, 0.11, 0.91, 0.87))
        for kind, (mark, color, filled) in STYLE.items():
            own = [(i, r) for i, r in enumerate(known) if r.kind == kind]
            ranges = [(i, r.low, r.high) for i, r in own if r.low is not None and r.high is not None]
            if ranges:
                axes.hlines(*zip(*ranges, strict=True), color=color, lw=0.7, alpha=0.6)
            face = color if filled else "white"
            axes.plot([r.value for _, r in own], [i for i, _ in own], mark, color=color, mfc=face, ms=2.6, mew=0.6)
        _limits(axes, rows, line, zero)
        axes.set_yticks([])
        axes.set_ylabel(f"{len(known)} rows of the table, in order of their values")
        axes.set_xlabel(label)
        return svg(figure, name, alt)


def _limits(axes: Any, rows: Sequence[Point], line: float | None, zero: bool) -> None:
    """Set the limits and ticks of the horizontal axis so that it shows all intervals, and draw the reference line."""
    ends = [v for r in rows for v in (r.value, r.low, r.high)]
    axes.set_xlim(*_span([*ends, line, 0.0 if zero else None]))
    if line is not None:
        axes.axvline(line, color=FAINT if not zero else INK, lw=1.0, ls=":" if not zero else "-", zorder=0)
    axes.locator_params(axis="x", nbins=5)


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
    with drawing(2.9) as (figure, axes):
        widest = max((inches(title, 8) for title in lines), default=0.0) / WIDTH
        axes.set_position((0.165, 0.16, (0.815 - widest) / 1.07, 0.8))
        ends = []
        order = sorted((t for t in lines if t not in behind), key=lambda t: t != first)
        for i, title in enumerate([*behind, *order]):
            if title not in lines:
                continue
            (x, y), gray, turn = lines[title], title in behind, max(i - len(behind), 0)
            color = GRAY if gray else CURVES[turn % len(CURVES)]
            mark, wide = MARKS[-1 - i % 4] if gray else MARKS[turn % 4], 2.2 if title == first else 1.4
            style = "--" if gray else "-"
            axes.plot(x, y, style, color=color, lw=wide, marker=mark, ms=3.6, markevery=max(len(x) // 6, 1))
            if len(x):
                ends.append((y[-1], title, color, mark))
        low, high = axes.get_ylim()
        gap, at = 0.062 * (high - low), -np.inf
        for value, title, color, mark in sorted(ends):
            at = max(value, at + gap)
            axes.plot([1.035], [at], mark, color=color, ms=3.6, transform=axes.get_yaxis_transform(), clip_on=False)
            axes.text(1.06, at, title, color=color, transform=axes.get_yaxis_transform(), va="center", fontsize=8)
        axes.set_ylim(low, high)
        axes.locator_params(axis="x", integer=True)
        axes.set_xlabel("Round")
        axes.set_ylabel(label)
        return svg(figure, name, alt)


def reliability_plot(name: str, alt: str, groups: Mapping[str, Sequence[Bin]]) -> str:
    """Draw observed against predicted frequencies, with the diagonal. Markers grow with the number of cases."""
    with drawing(3.3, 3.9) as (figure, axes):
        axes.set_position((0.16, 0.15, 0.8, 0.81))
        axes.plot([0, 1], [0, 1], ":", color=FAINT, lw=1)
        most = max((b.n for bins in groups.values() for b in bins), default=1)
        for (title, bins), color, mark in zip(groups.items(), (TEAL, ORANGE), ("o", "D"), strict=False):
            axes.plot([b.predicted for b in bins], [b.observed for b in bins], color=color, lw=1.2, label=title)
            sizes = [12 + 60 * b.n / most for b in bins]
            axes.scatter([b.predicted for b in bins], [b.observed for b in bins], s=sizes, color=color, marker=mark)
        axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xlabel="Predicted probability", ylabel="Observed frequency")
        axes.legend(frameon=False, loc="upper left", fontsize=8)
        return svg(figure, name, alt)


def decision_plot(name: str, alt: str, curve: Sequence[NetBenefit]) -> str:
    """Draw net benefit over thresholds, against the strategies to treat all patients and none (decision curve)."""
    with drawing(3.3, 3.9) as (figure, axes):
        axes.set_position((0.18, 0.15, 0.78, 0.81))
        known = [(p.threshold, p.model.value, p.model.low, p.model.high) for p in curve if p.model.value is not None]
        bands = [(t, low, high) for t, _, low, high in known if low is not None and high is not None]
        axes.fill_between(*zip(*bands, strict=True), color=TEAL, alpha=0.15, lw=0) if bands else None
        axes.plot(
            [t for t, *_ in known], [v for _, v, *_ in known], color=TEAL, lw=1.7, marker="o", ms=3.2, label="Model"
        )
        every = [(p.threshold, p.treat_all.value) for p in curve if p.treat_all.value is not None]
        axes.plot([t for t, _ in every], [v for _, v in every], color=ORANGE, lw=1.2, ls="--", label="Treat all")
        axes.axhline(0, color=INK, lw=0.9, ls=":", label="Treat none")
        top = max([high for *_, high in bands] + [v for _, v, *_ in known if v is not None] + [0.05])
        axes.set(xlim=(0, 1), ylim=(-0.35 * top, 1.1 * top), xlabel="Threshold probability", ylabel="Net benefit")
        axes.legend(frameon=False, loc="upper right", fontsize=8)
        return svg(figure, name, alt)


def scatter(name: str, alt: str, rows: Sequence[tuple[str, float, float, str]], xlabel: str, ylabel: str) -> str:
    """Draw two quantities against each other, one labeled point per method: (name, x, y, kind)."""
    with drawing(2.9) as (figure, axes):
        axes.set_position((0.19, 0.16, 0.76, 0.8))
        axes.set(xlim=_span([r[1] for r in rows], 0.22), ylim=_span([r[2] for r in rows], 0.14))
        low, high = axes.get_ylim()
        at: list[tuple[float, float]] = []
        for title, x, y, kind in sorted(rows, key=lambda r: r[2]):
            mark, color, filled = STYLE[kind]
            axes.plot([x], [y], mark, color=color, mfc=color if filled else "white", ms=6.5, mew=1.4)
            height = max([y, *(b + 0.065 * (high - low) for a, b in at if a == x)])
            at.append((x, height))
            axes.annotate(title, (x, height), xytext=(7, 0), textcoords="offset points", va="center", fontsize=8)
        axes.locator_params(axis="x", nbins=6)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        return svg(figure, name, alt)


def agreement_plot(
    name: str, alt: str, mean: Array, error: Array, limits: tuple[float, float, float], unit: str
) -> str:
    """Draw a Bland-Altman plot: error against the mean of prediction and truth, with bias and limits of agreement."""
    with drawing(3.0) as (figure, axes):
        axes.set_position((0.165, 0.16, 0.665, 0.8))
        axes.plot(mean, error, "o", color=TEAL, ms=2.6, alpha=0.55, mew=0)
        for value, text in zip(limits, ("lower limit", "bias", "upper limit"), strict=True):
            axes.axhline(value, color=INK, lw=0.9, ls="-" if text == "bias" else "--")
            axes.text(1.01, value, text, transform=axes.get_yaxis_transform(), va="center", fontsize=8)
        axes.set(xlabel=f"Mean of prediction and truth{unit}", ylabel=f"Prediction − truth{unit}")
        return svg(figure, name, alt)


@dataclass(frozen=True)
class Curve:
    """A survival curve: probabilities at the figure's times, NaN if not shown, with limits or without."""

    values: Array
    low: Array | None = None
    high: Array | None = None
    dashed: bool = False


def survival_plot(name: str, alt: str, times: Array, groups: Mapping[str, Sequence[Curve]], label: str) -> str:
    """Draw survival probabilities over time, the curves of one group in one color with one marker."""
    with drawing(3.3, 3.9) as (figure, axes):
        axes.set_position((0.16, 0.15, 0.8, 0.81))
        x = np.concatenate([[0.0], times])
        for i, (title, curves_) in enumerate(groups.items()):
            color, mark = CURVES[i % len(CURVES)], MARKS[i % len(MARKS)]
            for k, curve in enumerate(curves_):
                y, style = np.concatenate([[1.0], curve.values]), "--" if curve.dashed else "-"
                face = "white" if curve.dashed else color
                axes.plot(
                    x, y, style, color=color, lw=1.4, marker=mark, ms=3.6, mfc=face, label=title if not k else None
                )
                if curve.low is not None and curve.high is not None:
                    low, high = (np.concatenate([[1.0], v]) for v in (curve.low, curve.high))
                    axes.fill_between(x, low, high, color=color, alpha=0.12, lw=0)
        axes.set(xlim=(0, 1.03 * float(x[-1])), ylim=(0, 1.03), xlabel=label, ylabel="Survival probability")
        axes.legend(frameon=False, loc="lower left", fontsize=8)
        return svg(figure, name, alt)


def ranks_plot(name: str, alt: str, ranking: Ranking, titles: Mapping[str, str], over: str = "sites") -> str:
    """Draw mean ranks (Demšar): a bar joins methods whose ranks do not differ significantly.

    Args:
        name: Name of the figure, unique on the page.
        alt: Alternative text.
        ranking: The ranks.
        titles: Names of methods as the reader knows them.
        over: What the methods are ranked over, in the plural.
    """
    k = len(ranking.methods)
    height = 0.75 + 0.24 * k + 0.14 * len(ranking.cliques)
    with drawing(height) as (figure, axes):
        axes.set_position((0.04, 0.02, 0.56, 1 - 0.42 / height))
        axes.set(xlim=(0.8, k + 0.2), ylim=(k + 0.6 + 0.5 * len(ranking.cliques), 0))
        axes.xaxis.tick_top()
        axes.xaxis.set_label_position("top")
        axes.set_xticks(range(1, k + 1))
        axes.set_xlabel(f"Mean rank over {over} (1 is best)")
        axes.spines["bottom"].set_visible(False)
        axes.spines["left"].set_visible(False)
        axes.spines["top"].set_visible(True)
        axes.set_yticks([])
        place = dict(zip(ranking.methods, ranking.ranks, strict=True))
        for i, (method, rank) in enumerate(place.items()):
            y = 0.6 + 0.5 * len(ranking.cliques) + i
            axes.plot([rank, rank, k + 0.3], [0, y, y], color=FAINT, lw=0.8, clip_on=False, zorder=0)
            axes.plot([rank], [0], "o", color=TEAL, ms=5, clip_on=False)
            axes.text(k + 0.4, y, f"{titles.get(method, method)}  {rank:.2f}", va="center", fontsize=8.5)
        for j, clique in enumerate(ranking.cliques):
            y, ends = 0.45 + 0.5 * j, [place[m] for m in clique]
            axes.plot([min(ends) - 0.05, max(ends) + 0.05], [y, y], color=ORANGE, lw=3, solid_capstyle="butt")
        return svg(figure, name, alt)
