"""How close a reconstructed image is to the true one: PSNR, SSIM and NMSE, for each case.

SSIM: Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment: from error visibility to structural similarity", IEEE
Transactions on Image Processing 2004, https://doi.org/10.1109/TIP.2003.819861, equation 13, with the paper's Gaussian
window (σ = 1.5, 11 pixels wide) and constants, averaged where the window lies within the image. NMSE is as in fastMRI:
the squared error over the squared norm of the truth (Zbontar et al. 2018, https://arxiv.org/abs/1811.08839).
"""

import numpy as np

from polyclinic.errors import ConfigError
from polyclinic.evaluation.metric import Array


def psnr(image: Array, truth: Array, span: float | None = None) -> Array:
    """10 log₁₀(span² / mean squared error), in dB, for each case. Shapes [n, *spatial] -> [n].

    Args:
        image: Reconstructed.
        truth: What it should be.
        span: The range of values; by default each true image's own. Equal images give infinity.
    """
    image, truth, spans = _checked(image, truth, span)
    error = ((image - truth) ** 2).reshape(len(truth), -1).mean(1)
    with np.errstate(divide="ignore"):
        return np.asarray(10 * np.log10(spans**2 / error))


def nmse(image: Array, truth: Array) -> Array:
    """‖image − truth‖² / ‖truth‖² for each case. Shapes [n, *spatial] -> [n]; NaN where the truth is 0."""
    image, truth, _ = _checked(image, truth, 1.0)
    n = len(truth)
    norm = (truth**2).reshape(n, -1).sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(norm > 0, ((image - truth) ** 2).reshape(n, -1).sum(1) / norm, np.nan))


def ssim(image: Array, truth: Array, span: float | None = None) -> Array:
    """Mean structural similarity for each case, −1 to 1. Shapes [n, *spatial] -> [n]. ``span`` is as for ``psnr``.

    Raises:
        ValueError: If an image is smaller than the window, or shapes differ.
    """
    from scipy.ndimage import gaussian_filter

    image, truth, spans = _checked(image, truth, span)
    if min(truth.shape[1:]) < 11:
        raise ConfigError(f"SSIM needs at least 11 pixels along each axis; these images are {list(truth.shape[1:])}")
    inner = (slice(5, -5),) * (truth.ndim - 1)

    def blur(x: Array) -> Array:
        return np.asarray(gaussian_filter(x, sigma=1.5, truncate=3.5))

    found = []
    for x, y, wide in zip(image, truth, spans, strict=True):
        c1, c2 = (0.01 * wide) ** 2, (0.03 * wide) ** 2
        mx, my = blur(x), blur(y)
        vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
        # SSIM = (2 μ_x μ_y + C₁)(2 σ_xy + C₂) / ((μ_x² + μ_y² + C₁)(σ_x² + σ_y² + C₂))
        index = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
        found.append(float(index[inner].mean()))
    return np.array(found)


def _checked(image: Array, truth: Array, span: float | None) -> tuple[Array, Array, Array]:
    image, truth = np.asarray(image, np.float64), np.asarray(truth, np.float64)
    if image.shape != truth.shape or truth.ndim < 2:
        raise ConfigError(
            f"images of shape {list(image.shape)} against {list(truth.shape)}; both must be [n, *spatial]"
        )
    flat = truth.reshape(len(truth), -1)
    return image, truth, np.full(len(truth), span) if span is not None else np.ptp(flat, axis=1)
