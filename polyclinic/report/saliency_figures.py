"""Figures of attributions: a small map for each site, or the features of a table."""

from collections.abc import Mapping, Sequence

import numpy as np

from polyclinic.report.figures import CURVES, MARKS, WIDTH, drawing, inches, svg
from polyclinic.report.svg_plot import INK, LEGEND_ROW, Key, Plot
from polyclinic.statistics.undefined import Array

ACROSS = 3
FINEST = 64  # points along a side; a finer map is averaged down


def maps(name: str, alt: str, found: Mapping[str, Array]) -> str:
    """Draw one map [height, width] per site on a common scale; darker means a larger share."""
    coarse = {site: _coarse(m) for site, m in found.items()}
    top = max(float(m.max()) for m in coarse.values())
    rows = -(-len(coarse) // ACROSS)
    wide = WIDTH / ACROSS
    height = rows * (wide + 0.12)
    with drawing(height) as (figure, axes):
        axes.set_axis_off()
        for k, (site, values) in enumerate(coarse.items()):
            left, low = (k % ACROSS) / ACROSS, 1 - (k // ACROSS + 1) / rows
            one = figure.add_axes((left + 0.01, low + 0.02 / rows, 0.98 / ACROSS - 0.02, 0.82 / rows))
            one.imshow(values, cmap="Grays", vmin=0, vmax=top, interpolation="nearest", aspect="equal")
            one.set_xticks([])
            one.set_yticks([])
            for spine in one.spines.values():
                spine.set(visible=True, color=INK, linewidth=0.6)
            one.set_title(site, fontsize=8.5, color=INK, pad=3)
        return svg(figure, name, alt)


def features(name: str, alt: str, names: Sequence[str], shares: Mapping[str, Sequence[float]]) -> str:
    """Draw the features with the largest attribution, one per row, with a marker for each site."""
    legend = 0.2 * -(-len(shares) // 3) if len(shares) <= 8 else 0.0
    height = 0.6 + legend + 0.26 * len(names)
    left = 0.03 + min(max(inches(n, 9) for n in names) / WIDTH, 0.45)
    place = (left, 0.5 / height, 0.97 - left, 1 - (0.58 + legend) / height)
    most, keys = 1.05 * max((v for values in shares.values() for v in values), default=1.0), list[Key]()
    plot = Plot(name, alt, (WIDTH, height), place, (0.0, most or 1.0), (len(names) - 0.5, -0.5))
    for y in range(len(names)):
        plot.reference("#dfe5ea", 0.6, "-", y=y)
    for k, (site, values) in enumerate(shares.items()):
        color, mark = CURVES[k % len(CURVES)], MARKS[k % len(MARKS)]
        plot.markers(values, range(len(names)), mark, 5.5, color, "none", 1.3)
        keys.append(Key(site, color, None, mark, "none"))
    plot.named_rows(names)
    plot.x_axis("Mean share of the attribution", most=5)
    if legend:
        plot.legend(keys, plot.left, plot.top - 6 - LEGEND_ROW * (-(-len(keys) // 3) - 1), columns=3)
    return plot.svg()


def _coarse(values: Array) -> Array:
    """Average over blocks so that no side has more than ``FINEST`` points."""
    step = [-(-n // FINEST) for n in values.shape]
    h, w = (n // s * s for n, s in zip(values.shape, step, strict=True))
    blocks = values[:h, :w].reshape(h // step[0], step[0], w // step[1], step[1])
    return np.asarray(blocks.mean((1, 3)))
