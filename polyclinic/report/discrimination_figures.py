"""Figures of discrimination: ROC and precision-recall curves, and confusion matrices."""

from collections.abc import Mapping, Sequence

import numpy as np

from polyclinic.report.figures import CURVES, FAINT, WIDTH, inches
from polyclinic.report.svg_plot import INK, LEGEND_ROW, Key, Plot, text_width
from polyclinic.statistics.undefined import Array

STYLES = ("-", "--", "-.", ":")


def unit_curves(
    name: str, alt: str, x: Array, lines: Mapping[str, Array], labels: tuple[str, str], diagonal: bool = False
) -> str:
    """Draw curves in the unit square; lines differ in color and dashes.

    Args:
        name: Name of the figure, unique on the page.
        alt: Alternative text.
        x: Positions of all curves.
        lines: Values by title.
        labels: Labels of the axes.
        diagonal: Whether to draw the line of chance.
    """
    legend = 0.19 * len(lines)
    height = 3.4 + legend
    place = (0.16, 0.5 / height, 0.8, 2.78 / height)
    plot, keys = Plot(name, alt, (3.9, height), place, (-0.02, 1.02), (-0.02, 1.04)), list[Key]()
    if diagonal:
        plot.line([0, 1], [0, 1], FAINT, 1, ":")
    for i, (title, y) in enumerate(lines.items()):
        color, style = CURVES[i % len(CURVES)], STYLES[i % len(STYLES)]
        plot.line(x, y, color, 1.6, style)
        keys.append(Key(title, color, style, width=1.6))
    plot.x_axis(labels[0], most=6)
    plot.y_axis(labels[1], most=6)
    plot.legend(keys, plot.left, plot.top - 6 - LEGEND_ROW * (len(keys) - 1))
    return plot.svg()


def confusion_plot(name: str, alt: str, classes: Sequence[str], shares: Array) -> str:
    """Draw a confusion matrix: for each true class (row) the share predicted as each class (column).

    Args:
        name: Name of the figure, unique on the page.
        alt: Alternative text.
        classes: Names of the classes.
        shares: [K, K]; NaN where a class has no case.
    """
    widest, turned = min(max(inches(name, 8.5) for name in classes), 1.3), len(classes) > 2
    longest = min(max(inches(name, 8.5) for name in classes), 2.0)
    left, below = 0.5 + widest, 0.5 + (0.75 * longest if turned else 0.1)
    side = WIDTH - left - 0.1
    height = side + below + 0.1
    place = (left / WIDTH, below / height, side / WIDTH, side / height)
    plot = Plot(name, alt, (WIDTH, height), place, (-0.5, len(classes) - 0.5), (len(classes) - 0.5, -0.5))
    for (i, k), share in np.ndenumerate(shares):
        if np.isfinite(share):
            gray = f"{round(255 - 225 * float(share)):02x}"
            plot.rectangle((k - 0.5, k + 0.5), (i - 0.5, i + 0.5), f"#{3 * gray}")
            if len(classes) <= 10:
                color = "white" if share > 0.55 else INK
                plot.centered(plot.px(k), plot.py(i), f"{100 * share:.0f}", 8.5, "middle", color)
    plot.named_rows(classes, 8.5)
    for k, title in enumerate(classes):
        if turned:
            plot.text(plot.px(k) + 3, plot.bottom + 9, title, 8.5, "end", turn=-45)
        else:
            plot.text(plot.px(k), plot.bottom + 12, title, 8.5, "middle")
    plot.frame()
    plot.text((plot.left + plot.right) / 2, plot.height - 8, "Predicted class", anchor="middle")
    plot.y_label("True class", max(text_width(title, 8.5) for title in classes))
    return plot.svg()
