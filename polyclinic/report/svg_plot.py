"""Plots as SVG text: one pair of axes with lines, markers, bands, labels and a legend.

The report needs few kinds of marks. Importing matplotlib and drawing ten figures with it took half of the time of the
report of 100 sites; only figures that contain images or contours still use it. Lengths are in points (1/72 inch) from
the top left of the figure.
"""

import math
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from itertools import groupby

import numpy as np

from polyclinic.statistics.undefined import Array

INK = "#1c2733"
FAMILY = "DejaVu Sans"
TICK = 3.5
DASHES = {"-": "", "--": "3.7 1.6", "-.": "6.4 1.6 1 1.6", ":": "1 1.65"}  # in widths of the line
Floats = Sequence[float] | Array
# Advance widths of DejaVu Sans for the characters from space to tilde, in 1/2048 of the size of the font.
_WIDTHS = [
    *(651, 821, 942, 1716, 1303, 1946, 1597, 563, 799, 799, 1024, 1716, 651, 739, 651, 690),
    *(1303, 1303, 1303, 1303, 1303, 1303, 1303, 1303, 1303, 1303, 690, 690, 1716, 1716, 1716, 1087),
    *(2048, 1401, 1405, 1430, 1577, 1294, 1178, 1587, 1540, 604, 604, 1343, 1141, 1767, 1532, 1612),
    *(1235, 1612, 1423, 1300, 1251, 1499, 1401, 2025, 1403, 1251, 1403, 799, 690, 799, 1716, 1024),
    *(1024, 1255, 1300, 1126, 1300, 1260, 721, 1300, 1298, 569, 569, 1186, 569, 1995, 1298, 1253),
    *(1300, 1300, 842, 1067, 803, 1298, 1212, 1675, 1212, 1212, 1075, 1303, 690, 1303, 1716),
]
_OTHERS = {"\u00a0": 651, "–": 1024, "—": 2048, "−": 1716, "’": 651, "·": 651, "±": 1716, "×": 1716, "ε": 1107}


@cache
def text_width(text: str, size: float) -> float:
    """Return the width of ``text`` in points. Letters with accents are as wide as without, wide characters 1 em."""
    return sum(map(_advance, text)) * size / 2048


def _advance(character: str) -> int:
    base = unicodedata.normalize("NFD", character)[0]
    if " " <= base <= "~":
        return _WIDTHS[ord(base) - 32]
    if unicodedata.combining(base):
        return 0
    return _OTHERS.get(base, 2048 if unicodedata.east_asian_width(base) in "WF" else 1303)


@dataclass(frozen=True)
class Ticks:
    """Positions of ticks in units of the data, and their labels."""

    at: Sequence[float]
    labels: Sequence[str]


def ticks(low: float, high: float, most: int, integer: bool = False) -> Ticks:
    """Return round ticks between ``low`` and ``high``, at most ``most`` + 1 of them.

    Args:
        low: Lower end of the axis.
        high: Upper end of the axis, above ``low``.
        most: Largest number of steps that the range may have.
        integer: Whether ticks are whole numbers.
    """
    wanted = (high - low) / most
    power = math.floor(math.log10(wanted))
    step, decimals = next(
        (m * 10.0**p, max(-p + (m == 2.5), 0))
        for p in (power, power + 1)
        for m in ((1, 2, 5) if integer else (1, 2, 2.5, 5))
        if m * 10.0**p >= wanted * (1 - 1e-9)
    )
    if integer and step < 1:
        step, decimals = 1.0, 0
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    at = [k * step for k in range(first, last + 1)]
    if max(abs(low), abs(high)) >= 1e7 or decimals > 5:
        significant = max(math.floor(math.log10(max(abs(low), abs(high)))) - math.floor(math.log10(step)) + 1, 1)
        return Ticks(at, [f"{v:.{significant}g}".replace("-", "−") if k else "0" for k, v in enumerate(at, first)])
    return Ticks(
        at, [(f"{v:.{decimals}f}" if k else f"{0:.{decimals}f}").replace("-", "−") for k, v in enumerate(at, first)]
    )


@dataclass(frozen=True)
class Key:
    """An entry of a legend: a line, a marker, or both."""

    title: str
    color: str
    style: str | None = None
    mark: str | None = None
    face: str | None = None
    width: float = 1.4


class Plot:
    """One pair of axes.

    Args:
        name: Name of the figure, unique on the page; ids begin with it.
        alt: Alternative text.
        size: Width and height in inches.
        place: Left, bottom, width and height of the axes, as shares of the figure.
        x: Limits of the horizontal axis: at its left and its right end.
        y: Limits of the vertical axis: at its lower and its upper end.
    """

    def __init__(
        self,
        name: str,
        alt: str,
        size: tuple[float, float],
        place: tuple[float, float, float, float],
        x: tuple[float, float],
        y: tuple[float, float],
    ) -> None:
        self.name, self.alt = name, alt
        self.width, self.height = size[0] * 72, size[1] * 72
        self.left, self.right = place[0] * self.width, (place[0] + place[2]) * self.width
        self.bottom, self.top = (1 - place[1]) * self.height, (1 - place[1] - place[3]) * self.height
        self._x, self._y = x, y
        self._below, self._parts, self._marks = list[str](), list[str](), dict[tuple[str, float], str]()

    # Positions

    def px(self, x: float) -> float:
        """Return the horizontal position of a value."""
        return self.left + (x - self._x[0]) / (self._x[1] - self._x[0]) * (self.right - self.left)

    def py(self, y: float) -> float:
        """Return the vertical position of a value."""
        return self.bottom + (y - self._y[0]) / (self._y[1] - self._y[0]) * (self.top - self.bottom)

    def share(self, x: float) -> float:
        """Return the horizontal position at a share of the width of the axes."""
        return self.left + x * (self.right - self.left)

    # Marks

    def line(
        self, x: Floats, y: Floats, color: str, width: float, style: str = "-", cap: str = "butt", clip: bool = True
    ) -> None:
        """Draw a line through points; it is interrupted where a value is not finite."""
        points = [(self.px(a), self.py(b)) if math.isfinite(a) and math.isfinite(b) else None for a, b in _pairs(x, y)]
        runs = (list(run) for finite, run in groupby(points, key=lambda p: p is not None) if finite)
        self._path("".join("M" + "L".join(_at(*p) for p in run if p) for run in runs), color, width, style, cap, clip)

    def segments(
        self, rows: Iterable[tuple[float, float, float]], color: str, width: float, opacity: float = 1
    ) -> None:
        """Draw horizontal segments from (y, left end, right end); an infinite end is that of the axis."""
        low, high = sorted(self._x)
        path = ""
        for y, *ends in rows:
            if not any(map(math.isnan, ends)):
                begin, end = (self.px(min(max(v, low), high)) for v in ends)
                path += f"M{_at(begin, self.py(y))}H{_n(end)}"
        self._path(path, color, width, opacity=opacity)

    def reference(
        self, color: str, width: float, style: str, x: float | None = None, y: float | None = None, behind: bool = False
    ) -> None:
        """Draw a line across the axes at ``x`` or at ``y``."""
        if x is not None:
            path = f"M{_at(self.px(x), self.bottom)}V{_n(self.top)}"
        else:
            path = f"M{_at(self.left, self.py(y or 0.0))}H{_n(self.right)}"
        self._path(path, color, width, style, behind=behind)

    def _path(
        self,
        path: str,
        color: str,
        width: float,
        style: str = "-",
        cap: str = "butt",
        clip: bool = True,
        opacity: float = 1,
        behind: bool = False,
    ) -> None:
        if not path:
            return
        dashes = " ".join(_n(float(d) * width) for d in DASHES[style].split())
        more = f' stroke-dasharray="{dashes}"' if dashes else ""
        more += f' stroke-linecap="{cap}"' if cap != "butt" else ""
        more += f' stroke-opacity="{opacity}"' if opacity < 1 else ""
        more += self._clip() if clip else ""
        part = f'<path d="{path}" fill="none" stroke="{color}" stroke-width="{_n(width)}"{more}/>'
        (self._below if behind else self._parts).append(part)

    def band(self, x: Floats, low: Floats, high: Floats, color: str, opacity: float) -> None:
        """Fill the area between two lines where both are finite."""
        rows = [(self.px(a), self.py(b), self.py(c)) for a, b, c in _triples(x, low, high)]
        path = ""
        for finite, group in groupby(rows, key=lambda r: all(map(math.isfinite, r))):
            run = list(group)
            if finite and len(run) > 1:
                path += "M" + "L".join([_at(a, b) for a, b, _ in run] + [_at(a, c) for a, _, c in run[::-1]]) + "z"
        if path:
            self._parts.append(f'<path d="{path}" fill="{color}" fill-opacity="{opacity}"{self._clip()}/>')

    def rectangle(self, x: tuple[float, float], y: tuple[float, float], color: str) -> None:
        """Fill a rectangle of data."""
        (a, b), (c, d) = sorted(map(self.px, x)), sorted(map(self.py, y))
        self._parts.append(f'<path d="M{_at(a, c)}H{_n(b)}V{_n(d)}H{_n(a)}z" fill="{color}"/>')

    def markers(
        self,
        x: Floats,
        y: Floats,
        mark: str,
        size: float,
        color: str,
        face: str | None = None,
        edge: float = 1.0,
        opacity: float = 1,
    ) -> None:
        """Draw a marker of ``size`` points at each finite point: hollow if ``face`` is not ``color``."""
        at = [(self.px(a), self.py(b)) for a, b in _pairs(x, y) if math.isfinite(a) and math.isfinite(b)]
        self._draw_markers(at, mark, size, color, face, edge, opacity)

    def marker_at(
        self, x: float, y: float, mark: str, size: float, color: str, face: str | None = None, edge: float = 1.0
    ) -> None:
        """Draw a marker at a position in points."""
        self._draw_markers([(x, y)], mark, size, color, face, edge)

    def _draw_markers(
        self,
        at: Sequence[tuple[float, float]],
        mark: str,
        size: float,
        color: str,
        face: str | None,
        edge: float,
        opacity: float = 1,
    ) -> None:
        if not at:
            return
        ref = self._marks.setdefault((mark, size), f"{self.name}-m{len(self._marks)}")
        paint = f'fill="{face or color}"' + (f' fill-opacity="{opacity}"' if opacity < 1 else "")
        paint += f' stroke="{color}" stroke-width="{_n(edge)}"' if edge else ""
        uses = "".join(f'<use href="#{ref}" x="{_n(a)}" y="{_n(b)}"/>' for a, b in at)
        self._parts.append(f"<g {paint}>{uses}</g>")

    # Text

    def text(
        self, x: float, y: float, text: str, size: float = 9, anchor: str = "start", color: str = INK, turn: float = 0
    ) -> None:
        """Write text whose baseline begins, is centered or ends at a position in points; none if it is not finite."""
        if not (math.isfinite(x) and math.isfinite(y)):
            return
        more = f' text-anchor="{anchor}"' if anchor != "start" else ""
        more += f' transform="rotate({_n(turn)} {_n(x)} {_n(y)})"' if turn else ""
        font = f'font-family="\'{FAMILY}\'" font-size="{_n(size)}px"'
        self._parts.append(
            f'<text x="{_n(x)}" y="{_n(y)}" {font} fill="{color}"{more}>{escape(text, quote=False)}</text>'
        )

    def centered(self, x: float, y: float, text: str, size: float, anchor: str = "start", color: str = INK) -> None:
        """Write text that is vertically centered at the position ``y`` in points."""
        self.text(x, y + 0.36 * size, text, size, anchor, color)

    # Axes

    def x_axis(
        self, label: str = "", marks: Ticks | None = None, most: int = 6, integer: bool = False, top: bool = False
    ) -> None:
        """Draw the horizontal axis with ticks, their labels and its own label, below the axes or above."""
        marks = marks if marks is not None else ticks(min(self._x), max(self._x), most, integer)
        at, tick, own, name = (self.top, -TICK, -7.0, -20.0) if top else (self.bottom, TICK, 13.8, 26.8)
        path = f"M{_at(self.left, at)}H{_n(self.right)}"
        for v, text in zip(marks.at, marks.labels, strict=True):
            path += f"M{_at(self.px(v), at)}v{tick}"
            self.text(self.px(v), at + own, text, anchor="middle")
        self._path(path, INK, 0.8, clip=False, cap="square")
        if label:
            self.text((self.left + self.right) / 2, at + name, label, anchor="middle")

    def y_axis(self, label: str = "", marks: Ticks | None = None, most: int | None = None) -> None:
        """Draw the vertical axis. Its label stays within the figure, however wide the labels of ticks are."""
        most = most or max(2, min(8, int((self.bottom - self.top) / 20)))
        marks = marks if marks is not None else ticks(min(self._y), max(self._y), most)
        path = f"M{_at(self.left, self.bottom)}V{_n(self.top)}"
        for v, text in zip(marks.at, marks.labels, strict=True):
            path += f"M{_at(self.left, self.py(v))}h-{TICK}"
            self.centered(self.left - 2 * TICK, self.py(v), text, 9, "end")
        self._path(path, INK, 0.8, clip=False, cap="square")
        self.y_label(label, max((text_width(text, 9) for text in marks.labels), default=0.0))

    def y_label(self, label: str, wide: float = 0.0) -> None:
        """Write the label of the vertical axis left of tick labels of the given width."""
        if label:
            x = max(self.left - 2 * TICK - wide - 5, 10.0) if wide else max(self.left - 6, 10.0)
            self.text(x, (self.top + self.bottom) / 2, label, anchor="middle", turn=-90)

    def named_rows(self, names: Sequence[str], size: float = 9) -> None:
        """Write names at the whole numbers of the vertical axis, and draw the axis without ticks."""
        for y, name in enumerate(names):
            self.centered(self.left - TICK, self.py(y), name, size, "end")
        self._path(f"M{_at(self.left, self.bottom)}V{_n(self.top)}", INK, 0.8, clip=False, cap="square")

    def frame(self) -> None:
        """Draw a thin frame around the axes."""
        path = f"M{_at(self.left, self.top)}H{_n(self.right)}V{_n(self.bottom)}H{_n(self.left)}z"
        self._path(path, INK, 0.6, clip=False)

    def legend(self, keys: Sequence[Key], x: float, y: float, columns: int = 1) -> None:
        """Draw a legend whose first row is centered at ``y``; ``x`` is its left end, in points."""
        rows = -(-len(keys) // columns)
        for column in range(columns):
            own = keys[column * rows : (column + 1) * rows]
            for row, key in enumerate(own):
                at = y + row * LEGEND_ROW
                if key.style is not None:
                    self._path(f"M{_at(x, at)}h16", key.color, key.width, key.style, clip=False)
                if key.mark:
                    self.marker_at(x + 8, at, key.mark, 4.5, key.color, key.face)
                self.centered(x + 21, at, key.title, 8)
            x += 21 + max((text_width(key.title, 8) for key in own), default=0.0) + 12

    def _clip(self) -> str:
        return f' clip-path="url(#{self.name}-clip)"'

    def svg(self) -> str:
        """Return the figure as an ``<svg>`` element that scales to its container."""
        box = (self.left, self.top, self.right - self.left, self.bottom - self.top)
        x, y, wide, high = map(_n, box)
        defs = f'<clipPath id="{self.name}-clip"><rect x="{x}" y="{y}" width="{wide}" height="{high}"/></clipPath>'
        defs += "".join(f'<path id="{ref}" d="{_shape(*key)}"/>' for key, ref in self._marks.items())
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_n(self.width)} {_n(self.height)}" role="img"'
        head += f' aria-label="{escape(self.alt)}">'
        return "\n".join([head, f"<defs>{defs}</defs>", *self._below, *self._parts, "</svg>"])


LEGEND_ROW = 12.5
TURNS = ((1, 0), (0, 1), (-1, 0), (0, -1))


def _shape(mark: str, size: float) -> str:
    """Return the outline of a marker around the origin."""
    r = size / 2
    if mark == "o":
        return f"M{_at(-r, 0)}a{_n(r)} {_n(r)} 0 1 0 {_n(2 * r)} 0a{_n(r)} {_n(r)} 0 1 0 {_n(-2 * r)} 0z"
    t, d = r / 3, r / math.sqrt(2)
    plus = [p for x, y in TURNS for a, b in ((r, -t), (r, t), (t, t)) for p in [(a * x - b * y, a * y + b * x)]]
    shapes: dict[str, list[tuple[float, float]]] = {
        "s": [(-r, -r), (r, -r), (r, r), (-r, r)],
        "D": [(0, -2 * d), (2 * d, 0), (0, 2 * d), (-2 * d, 0)],
        "^": [(0, -r), (r, r), (-r, r)],
        "v": [(0, r), (r, -r), (-r, -r)],
        "P": plus,
        "X": [((a - b) * d / r, (a + b) * d / r) for a, b in plus],
        "*": [
            (length * math.sin(math.pi * k / 5), -length * math.cos(math.pi * k / 5))
            for k in range(10)
            for length in [r if k % 2 == 0 else 0.382 * r]
        ],
    }
    return "M" + "L".join(_at(*p) for p in shapes[mark]) + "z"


def _pairs(x: Floats, y: Floats) -> Iterable[tuple[float, float]]:
    return zip(_floats(x), _floats(y), strict=True)


def _triples(x: Floats, low: Floats, high: Floats) -> Iterable[tuple[float, float, float]]:
    return zip(_floats(x), _floats(low), _floats(high), strict=True)


def _floats(values: Floats) -> list[float]:
    found: list[float] = np.asarray(values, float).tolist()
    return found


def _n(value: float) -> str:
    """Return a length with at most two decimals."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def _at(x: float, y: float) -> str:
    return f"{_n(x)} {_n(y)}"
