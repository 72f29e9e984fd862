"""Quality of reconstructed images: PSNR, SSIM and NMSE of each image.

SSIM: Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment: from error visibility to structural similarity",
IEEE Transactions on Image Processing 2004, https://doi.org/10.1109/TIP.2003.819861, equation 13, with sample variances
in a uniform window of 7, averaged over the windows within the image. These are scikit-image's defaults, which fastMRI
uses (Zbontar et al., 2018, https://arxiv.org/abs/1811.08839). NMSE as in fastMRI.

All functions take images [b, C, *spatial] or table rows [b, F], and return one value per image, [b].
"""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

BEST_DB = 100.0
"""The largest PSNR, given to images that are almost equal."""


def psnr(image: Tensor, truth: Tensor, span: Tensor | None = None) -> Tensor:
    """Compute ``10 log₁₀(span² / mean squared error)`` in dB, at most 100.

    Args:
        image: The reconstruction.
        truth: The true image.
        span: Range of the values, [b]; by default each true image's largest minus smallest value.
    """
    span = _span(truth) if span is None else span.double()
    error = (image.double() - truth.double()).square().flatten(1).mean(1)
    return (10 * (span.square() / error).log10()).clamp_max(BEST_DB).float()


def ssim(image: Tensor, truth: Tensor, span: Tensor | None = None, width: int = 7) -> Tensor:
    """Compute the mean structural similarity, −1 to 1. Arguments as for ``psnr``.

    Args:
        image: The reconstruction.
        truth: The true image.
        span: Range of the values, [b].
        width: Side of the window; the image's side if that is smaller. All features of a table row are one window.
    """
    span = _span(truth) if span is None else span.double()
    x, y = (values.double()[:, None] if values.ndim == 2 else values.double() for values in (image, truth))
    dims = y.ndim - 2
    side = y.shape[2] if truth.ndim == 2 else min(width, *y.shape[2:])
    pool: Any = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[dims]
    n = side**dims
    fix = n / max(n - 1, 1)  # sample variances
    c1, c2 = ((k * span.view(-1, *[1] * (y.ndim - 1))).square() for k in (0.01, 0.03))

    def mean(values: Tensor) -> Tensor:
        averages: Tensor = pool(values, side, 1)
        return averages

    mx, my = mean(x), mean(y)
    vx, vy, cov = (fix * (mean(a * b) - mean(a) * mean(b)) for a, b in ((x, x), (y, y), (x, y)))
    index = (2 * mx * my + c1) * (2 * cov + c2) / ((mx.square() + my.square() + c1) * (vx + vy + c2))
    scores: Tensor = index.flatten(1).mean(1).float()
    return scores


def nmse(image: Tensor, truth: Tensor) -> Tensor:
    """Compute ``‖image − truth‖² / ‖truth‖²``; the norm of the truth is at least 10⁻⁶."""
    error = (image - truth).square().flatten(1).sum(1)
    return error / truth.square().flatten(1).sum(1).clamp_min(1e-12)


def _span(truth: Tensor) -> Tensor:
    """Return the range of each image's values, [b]; 1 for a constant image."""
    flat = truth.double().flatten(1)
    span = flat.amax(1) - flat.amin(1)
    return span.where(span > 0, 1.0)
