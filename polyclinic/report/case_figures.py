"""Figures of single cases: slices with the outlines of the true and the predicted mask."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyclinic.report.figures import CURVES, WIDTH, drawing, svg
from polyclinic.report.svg_plot import INK
from polyclinic.studies.records.pictured_cases import PicturedCase, Plane


def case_picture(name: str, alt: str, case: PicturedCase) -> str:
    """Draw the planes of a case side by side. Truth is a solid outline, the prediction a dashed one, by class a color.

    Args:
        name: Name of the figure, unique on the page.
        alt: Alternative text.
        case: The case.
    """
    shapes = [(plane.image.shape[0] * plane.aspect, plane.image.shape[1]) for plane in case.planes]
    gap, widths = 0.06, [w / h for h, w in shapes]  # at equal heights
    height = min((WIDTH - gap * (len(widths) - 1)) / sum(widths), 3.2)
    with drawing(height) as (figure, axes):
        axes.set_axis_off()
        left = (WIDTH - height * sum(widths) - gap * (len(widths) - 1)) / 2
        for plane, wide in zip(case.planes, widths, strict=True):
            one = figure.add_axes((left / WIDTH, 0, wide * height / WIDTH, 1))
            _draw(one, plane)
            left += wide * height + gap
        return svg(figure, name, alt)


def _draw(axes: Any, plane: Plane) -> None:
    image = plane.image[..., 0] if plane.image.shape[-1] == 1 else plane.image
    axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest", aspect="auto")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(visible=True, color=INK, linewidth=0.6)
    for labels, style in ((plane.truth, "solid"), (plane.predicted, "dashed")):
        for label in np.unique(labels[labels > 0]):
            _outline(axes, labels == label, color_of(int(label)), style)
    axes.set_xlim(-0.5, image.shape[1] - 0.5)
    axes.set_ylim(image.shape[0] - 0.5, -0.5)


def _outline(axes: Any, mask: NDArray[np.bool_], color: str, style: str) -> None:
    padded = np.pad(mask.astype(float), 1)  # so that outlines close at the border
    y, x = (np.arange(n) - 1.0 for n in padded.shape)
    axes.contour(x, y, padded, levels=[0.5], colors=[color], linewidths=1.3, linestyles=style)


def color_of(label: int) -> str:
    """Return the color of a class."""
    return BRIGHT[(label - 1) % len(BRIGHT)]


BRIGHT = ("#ffd23f", "#3fd0ff", "#ff6b6b", "#7dff7a", "#ff9df2", "#ffa94d", *CURVES)
"""Colors that are visible on gray images."""
