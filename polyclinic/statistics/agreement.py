"""Agreement of ordered grades: Cohen's kappa with quadratic weights, and the mean distance of grades.

Cohen, "Weighted kappa: nominal scale agreement with provision for scaled disagreement or partial credit", Psychological
Bulletin 1968, https://doi.org/10.1037/h0026256.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyclinic.statistics.undefined import Array


def quadratic_kappa(predicted: NDArray[Any], target: NDArray[Any], weight: Array) -> Array:
    """Return ``1 − Σ w (p − y)² / E``, where E is the expectation for independent p and y of the same frequencies.

    Args:
        predicted: Grades p. Shape [n].
        target: Grades y. Shape [n].
        weight: Weights of cases. Shape [b, n].

    Returns:
        Shape [b]; NaN if all grades, predicted and true, are the same.
    """
    p, y = predicted.astype(np.float64), target.astype(np.float64)
    total, apart = weight.sum(1), weight @ (p - y) ** 2
    # E = Σᵢⱼ wᵢ wⱼ (pᵢ − yⱼ)² / Σ w
    expected = total * (weight @ p**2 + weight @ y**2) - 2 * (weight @ p) * (weight @ y)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(expected > 1e-9 * total**2, 1 - apart * total / expected, np.nan)


def grade_error(predicted: NDArray[Any], target: NDArray[Any], weight: Array) -> Array:
    """Return ``Σ w |p − y| / Σ w``. Shapes [n], [n], [b, n] -> [b]."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(weight @ np.abs(predicted.astype(np.float64) - target) / weight.sum(1))
