"""Figures of discrimination: ROC and precision-recall curves, and confusion matrices."""

from collections.abc import Mapping, Sequence

import numpy as np

from polyclinic.report.figures import CURVES, FAINT, INK, WIDTH, drawing, inches, svg
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
    with drawing(height, 3.9) as (figure, axes):
        axes.set_position((0.16, 0.5 / height, 0.8, 2.78 / height))
        if diagonal:
            axes.plot([0, 1], [0, 1], ":", color=FAINT, lw=1)
        for i, (title, y) in enumerate(lines.items()):
            axes.plot(x, y, STYLES[i % len(STYLES)], color=CURVES[i % len(CURVES)], lw=1.6, label=title)
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.04), xlabel=labels[0], ylabel=labels[1])
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(-0.02, 1.0), fontsize=8, borderpad=0)
        return svg(figure, name, alt)


def confusion_plot(name: str, alt: str, classes: Sequence[str], shares: Array) -> str:
    """Draw a confusion matrix: for each true class (row) the share predicted as each class (column).

    Args:
        name: Name of the figure, unique on the page.
        alt: Alternative text.
        classes: Names of the classes.
        shares: [K, K]; NaN where a class has no case.
    """
    widest, turned = min(max(inches(name, 8.5) for name in classes), 1.3), len(classes) > 2
    left, below = 0.5 + widest, 0.5 + (0.8 * widest if turned else 0.1)
    side = WIDTH - left - 0.1
    height = side + below + 0.1
    with drawing(height) as (figure, axes):
        axes.set_position((left / WIDTH, below / height, side / WIDTH, side / height))
        edges = np.arange(len(classes) + 1) - 0.5
        axes.pcolormesh(edges, edges, shares, cmap="Grays", vmin=0, vmax=1)
        axes.invert_yaxis()
        if len(classes) <= 10:
            for (i, k), share in np.ndenumerate(shares):
                if np.isfinite(share):
                    color = "white" if share > 0.55 else INK
                    axes.text(k, i, f"{100 * share:.0f}", ha="center", va="center", fontsize=8.5, color=color)
        slanted = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if turned else {}
        axes.set_xticks(range(len(classes)), classes, **slanted)
        axes.set_yticks(range(len(classes)), classes)
        axes.tick_params(length=0, labelsize=8.5)
        axes.set(xlabel="Predicted class", ylabel="True class")
        for spine in axes.spines.values():
            spine.set(visible=True, color=INK, linewidth=0.6)
        return svg(figure, name, alt)
