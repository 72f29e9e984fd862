"""Momentum updates of one model by another, and weights that grow over rounds, for self-training methods."""

import math

import torch
from torch import nn

from polyclinic.learning.networks.model_tree import trainable


def follow_(follower: nn.Module, leader: nn.Module, keep: float) -> None:
    """Update ``θ' ← keep · θ' + (1 − keep) · θ`` for all trained parameters, in place, without running statistics.

    Tarvainen and Valpola, "Mean teachers are better role models", NeurIPS 2017, equation 5.
    https://arxiv.org/abs/1703.01780.
    """
    with torch.no_grad():
        for mine, theirs in zip(trainable(follower).values(), trainable(leader).values(), strict=True):
            mine.lerp_(theirs.detach(), 1 - keep)


def ramp(round: float, length: float) -> float:
    """Return ``exp(−5 (1 − t)²)`` with ``t = round / length``, at most 1: from nearly 0 to 1 over ``length`` rounds.

    Laine and Aila, "Temporal Ensembling for Semi-Supervised Learning", ICLR 2017. https://arxiv.org/abs/1610.02242.
    """
    t = min(max(round / length, 0.0), 1.0) if length else 1.0
    return math.exp(-5 * (1 - t) ** 2)
