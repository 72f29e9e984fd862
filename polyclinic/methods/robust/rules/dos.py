"""Distance-based outlier suppression (DOS), and its outlier score (COPOD).

Naif Alkhunaizi, Dmitry Kamzolov, Martin Takáč and Karthik Nandakumar, "Suppressing Poisoning Attacks on Federated
Learning for Medical Imaging", MICCAI 2022, Algorithm 1, https://arxiv.org/abs/2207.10804. Zheng Li, Yue Zhao, Nicola
Botta, Cezar Ionescu and Xiyang Hu, "COPOD: Copula-Based Outlier Detection", ICDM 2020,
https://arxiv.org/abs/2009.09463, in the form of the PyOD library, which the authors of DOS use.

The two scores are averaged, as in the paper; its code adds them. Departure: updates are compared instead of models.
Measured limits: softmax never gives a weight of 0, so that one update of length 10⁶ still moves the mean (use a bound
on lengths: ``Robust(..., bound=1)``); three identical updates appear the most usual and often get most of the weight;
and of ten honest hospitals one may get a third of it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from polyclinic.core.tree import Tree
from polyclinic.methods.robust.rules.aggregation_rule import Rule, Updates, Verdict, blended


@dataclass(frozen=True)
class DOS(Rule):
    """Updates weighted by outlier scores of their distances to the others, without hyperparameters."""

    def aggregate(self, updates: Updates, last: Tree) -> Verdict:
        """Aggregate with weights ``softmax(−(COPOD(D_cos) + COPOD(D_euc)) / 2)``."""
        norms = updates.norms.clamp_min(1e-300)
        cosine = (1 - updates.gram / (norms * norms[:, None])).fill_diagonal_(0.0)
        scores = (copod(cosine) + copod(updates.distances)) / 2
        return blended(updates, (-scores).softmax(0))


def copod(x: Tensor) -> Tensor:
    """Return the outlier score of each row of x [n, d]. Shape [n].

    It uses the empirical probabilities of both tails of each column, and of the tail on its skewed side.
    """
    x = x.double()
    left = -((x[None] <= x[:, None]).double().mean(1)).log()
    right = -((x[None] >= x[:, None]).double().mean(1)).log()
    centered = x - x.mean(0)
    third, second = centered.pow(3).mean(0), centered.pow(2).mean(0)
    flat = second <= (torch.finfo(x.dtype).resolution * x.mean(0)) ** 2  # a constant column has no side
    side = torch.where(flat, 0.0, third.sign())
    skewed = left * -(side - 1).sign() + right * (side + 1).sign()
    return torch.maximum(skewed, (left + right) / 2).sum(1)
