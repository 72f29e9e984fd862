"""Empirical Bayes estimates of offsets and scales, shared across the features of one site.

Johnson, Li and Rabinovic, "Adjusting batch effects in microarray expression data using empirical Bayes methods",
Biostatistics 2007, section 3.2. https://doi.org/10.1093/biostatistics/kxj037.
"""

import torch
from torch import Tensor


def offsets(Z: Tensor, shrink: bool = True, tolerance: float = 1e-4) -> tuple[Tensor, Tensor]:
    """Return γ* and δ* of one site's standardized features Z [n, F]: means and variances, or the posterior modes.

    Priors: γ ~ N(γ̄, τ²), δ ~ inverse gamma(a, b), with parameters estimated from the site's own features.
    """
    n, F = Z.shape
    g, d = Z.mean(0), Z.var(0) if n > 1 else torch.ones_like(Z[0])
    if not shrink or F < 2 or n < 2:
        return g, d.clamp_min(1e-12)
    bar, tau2, m, s2 = g.mean(), g.var(), d.mean(), d.var()
    a, b = (2 * s2 + m**2) / s2, (m * s2 + m**3) / s2
    gamma, delta = g, d
    for _ in range(1000):
        new_gamma = (tau2 * n * g + delta * bar) / (tau2 * n + delta)
        new_delta = (0.5 * (Z - new_gamma).square().sum(0) + b) / (n / 2 + a - 1)
        moved = max(_change(gamma, new_gamma), _change(delta, new_delta))
        gamma, delta = new_gamma, new_delta
        if moved <= tolerance:
            break
    return gamma, delta


def _change(old: Tensor, new: Tensor) -> float:
    return float(((new - old).abs() / old.abs().clamp_min(1e-12)).max())
