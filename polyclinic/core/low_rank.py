"""Low-rank approximation of a tensor, read as a matrix of its first axis × all others."""

import torch
from torch import Tensor


def factors(leaf: Tensor, energy: float) -> tuple[Tensor, Tensor] | None:
    """Return U·s [rows, r] and V [r, columns] of the least rank with a share ``energy`` of the squared singular values.

    None if the leaf is a vector, or the factors have no fewer numbers than the leaf.
    """
    if leaf.ndim < 2:
        return None
    rows, columns = leaf.shape[0], leaf[0].numel()
    u, s, v = torch.linalg.svd(leaf.reshape(rows, columns).double(), full_matrices=False)
    cumulative = s.square().cumsum(0)
    # r = min k with Σ_{i ≤ k} s_i² ≥ T · Σ s_i²; never 0, and at most all if rounding hides the last
    rank = min(len(s), int(torch.searchsorted(cumulative, energy * cumulative[-1])) + 1)
    if rank * (rows + columns) >= rows * columns:
        return None
    return (u[:, :rank] * s[:rank]).to(leaf.dtype), v[:rank].to(leaf.dtype).contiguous()


def rising(start: float, end: float, rounds: int, round: int) -> float:
    """Return FedKD's ``T(t) = T_start + (t + 1) / R · (T_end − T_start)``, and T_end from round R on."""
    return start + min((round + 1) / rounds, 1.0) * (end - start)
