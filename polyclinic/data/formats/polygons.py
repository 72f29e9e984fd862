"""Rasterization of polygons."""

from typing import Any, TypeAlias

import numpy as np

Points: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"
Mask: TypeAlias = "np.ndarray[Any, np.dtype[np.bool_]]"


def inside(points: Points, x: Points, y: Points) -> Mask:
    """Return which points of a grid are inside a closed polygon, by the even-odd rule.

    A line of constant y meets the polygon's edges at some x; a point of that line is inside if an odd number of
    intersections is to its left. An edge includes its lower end and excludes its upper, so that a corner counts once.

    Args:
        points: The polygon's corners (x, y); the last is joined to the first. Shape [n, 2].
        x: The grid's columns, equally spaced and ascending. Shape [w].
        y: The grid's rows. Shape [h].

    Returns:
        Shape [h, w].
    """
    (x1, y1), (x2, y2) = points.T, np.roll(points, -1, axis=0).T
    edge, row = np.nonzero((y1[:, None] <= y) != (y2[:, None] <= y))
    slope = (x2[edge] - x1[edge]) / (y2[edge] - y1[edge])
    meets = x1[edge] + slope * (y[row] - y1[edge])
    first = np.ceil((meets - x[0]) / (x[1] - x[0])).clip(0, len(x)).astype(np.int64)  # the first column to its right
    flips = np.zeros((len(y), len(x) + 1), dtype=np.int64)
    np.add.at(flips, (row, first), 1)
    odd: Mask = flips[:, :-1].cumsum(axis=1) % 2 == 1
    return odd


def area_and_center(points: Points) -> tuple[float, Points]:
    """Return the area of a simple polygon and its center of mass (x, y), by the shoelace formula.

    A polygon without area (a dot or a line) has its corners' mean as center.
    """
    middle = points.mean(axis=0)
    a = points - middle
    b = np.roll(a, -1, axis=0)
    cross = a[:, 0] * b[:, 1] - b[:, 0] * a[:, 1]
    twice = float(cross.sum())  # 2 A
    if abs(twice) < 1e-9:
        return 0.0, middle
    return abs(twice) / 2, middle + ((a + b) * cross[:, None]).sum(axis=0) / (3 * twice)  # ∫x dA / A
