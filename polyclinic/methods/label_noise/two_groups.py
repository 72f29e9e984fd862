"""Division of sites into two groups by a Gaussian mixture.

Expectation maximization with full covariance matrices, as in scikit-learn's ``GaussianMixture`` (``reg_covar`` 10⁻⁶,
``tol`` 10⁻³, 100 iterations), from a fixed start.
"""

import math

import torch
from torch import Tensor

FLOOR, TOLERANCE, ITERATIONS = 1e-6, 1e-3, 100


def higher_group(table: Tensor) -> Tensor:
    """Return which rows of ``table`` [K, C] belong to the component whose means have the larger sum: bool [K].

    The start is the division of the rows at the mean of their sums. Without two different rows, no row belongs to it.
    """
    x = table.double()
    sums = x.sum(1)
    high = sums > sums.mean()
    if len(x) < 2 or not bool(high.any()):
        return torch.zeros(len(x), dtype=torch.bool)
    shares = torch.stack([~high, high], 1).double()
    last, means = -math.inf, x[:2]
    for _ in range(ITERATIONS):
        count = shares.sum(0) + 10 * torch.finfo(torch.float64).eps
        means = shares.T @ x / count[:, None]
        density = torch.stack([_log_density(x, shares[:, k], means[k]) for k in range(2)], 1)
        density = density + (count / len(x)).log()
        total = density.logsumexp(1)
        shares = (density - total[:, None]).exp()
        if abs(float(total.mean()) - last) < TOLERANCE:
            break
        last = float(total.mean())
    chosen = int(means.sum(1).argmax())
    return shares.argmax(1) == chosen


def _log_density(x: Tensor, share: Tensor, mean: Tensor) -> Tensor:
    """Return the log density [K] of the Gaussian with the weighted covariance of the rows of ``x``."""
    gap = x - mean
    eps = 10 * torch.finfo(torch.float64).eps
    covariance = (share[:, None] * gap).T @ gap / (share.sum() + eps) + FLOOR * torch.eye(x.shape[1]).double()
    factor = torch.linalg.cholesky(covariance)
    distance = torch.linalg.solve_triangular(factor, gap.T, upper=False).square().sum(0)
    size = 2 * factor.diagonal().log().sum()
    density: Tensor = -(distance + size + x.shape[1] * math.log(2 * math.pi)) / 2
    return density
