"""The local intrinsic dimension of predictions, which grows while a model learns wrong labels.

Ma et al., "Dimensionality-Driven Learning with Noisy Labels", ICML 2018, equation 4, https://arxiv.org/abs/1806.02612,
as in the code of FedCorr.
"""

import torch
from torch import Tensor

NEIGHBORS, SMALL = 20, 1e-6


def intrinsic_dimension(points: Tensor, neighbors: int = NEIGHBORS) -> Tensor:
    """Return ``−k / Σ_i log(r_i / r_k)`` for the distances r of each of [n, C] to its k nearest others: float64 [n].

    Args:
        points: The points.
        neighbors: k, reduced to n − 1 if there are fewer points.
    """
    k = min(neighbors, len(points) - 1)
    if k < 1:
        return torch.zeros(len(points), dtype=torch.float64)
    near = torch.cdist(points.double(), points.double(), compute_mode="donot_use_mm_for_euclid_dist")
    radii = near.sort(1).values[:, 1 : k + 1]
    found: Tensor = -k / ((radii / (radii[:, -1:] + SMALL)).log().sum(1) + SMALL)
    return found
