"""FedMix's adaptive weights: a site's weight depends on its number of examples and on its loss.

Jeffry Wicaksana, Zengqiang Yan, Dong Zhang, Xijie Huang, Huimin Wu, Xin Yang and Kwang-Ting Cheng, "FedMix: Mixed
Supervised Federated Learning for Medical Image Segmentation", IEEE Transactions on Medical Imaging 42 (2023), 1955,
https://arxiv.org/abs/2205.01840. This is the weighting alone, for any task; ``fedmix`` trains with mixed labels and
uses the same weights.

Both terms are divided by a sum over sites, so that the numbers of a single site remain hidden under secure summation
(``base.relative_weights``).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from polyclinic.core.tree import Tree
from polyclinic.methods.base.relative_weights import RelativeWeights, numbers


@dataclass(frozen=True)
class AdaptiveWeights(RelativeWeights):
    """FedAvg in which a site's weight is its share of the examples plus λ times its share of the loss.

    Attributes:
        lam: λ, the weight of the share of the loss.
        beta: β, the exponent of the loss; larger values favor sites with a high loss.
    """

    lam: float = 10.0
    beta: float = 1.5

    def amounts(self, examples: int, losses: Sequence[float]) -> Tree:
        """Return ``n`` and ``L^β`` of a site."""
        return numbers(size=float(examples), loss=max(losses[-1], 0.0) ** self.beta)

    def weight(self, own: Tree, sums: Tree) -> float:
        """Return ``n_i / Σ n + λ L_i^β / Σ L^β``. The mean supplies the paper's division by 1 + λ."""
        return float(own["size"] / sums["size"] + self.lam * own["loss"] / sums["loss"].clamp_min(1e-12))
