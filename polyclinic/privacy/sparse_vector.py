"""Selective sharing with the sparse vector technique; and noise that only looks like privacy, under its own name.

Wenqi Li, Fausto Milletarì, Daguang Xu, et al., "Privacy-preserving Federated Brain Tumor Segmentation", MLMI at
MICCAI 2019, https://arxiv.org/abs/1910.00962: a site shares those changes that are larger than a noisy threshold, each
with noise, and no others. The scales of the noise are those for which the technique is proven: Min Lyu, Dong Su and
Ninghui Li, "Understanding the Sparse Vector Technique for Differential Privacy", VLDB 2017, Algorithm 7,
https://arxiv.org/abs/1603.01699. They grow with the number of shared values, so an honest ε is large, or few are
shared. Where a published result used less noise, it did not have the ε that it states.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from polyclinic.core import tree
from polyclinic.core.aggregates import WeightedMean
from polyclinic.core.metering import Spend, Use, hidden, meter
from polyclinic.core.pipeline import Transform
from polyclinic.core.site import SecretRng, Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError
from polyclinic.privacy.gaussian import refuse_variances


@dataclass(frozen=True)
class SparseVector(Transform):
    """Shares at most a fraction of the coordinates, the large ones, each with noise; the others are sent as 0.

    ε in all is the sum of the three; it protects the whole site: a site that is not there is one that sends zeros, so a
    coordinate moves by at most Δ = γ, and so does its size. A patient of a site moves a coordinate by 2 γ, from one end
    to the other, and counts twice (``units``). The scales are those for queries that need not move in the same
    direction, which sizes of a patient's changes do not. Answers have fresh noise for at most c coordinates, and what
    was clamped, or set to 0 because it was not chosen, is post-processing.

    Attributes:
        fraction: q, the largest share of coordinates that is sent. The paper tries 0.1 to 0.4.
        bound: γ, to which each coordinate is clipped, up and down.
        threshold: τ, above which a change counts as large.
        epsilon_threshold: ε₁, for the threshold.
        epsilon_queries: ε₂, for which coordinates are above it.
        epsilon_answers: ε₃, for their values.
    """

    fraction: float = 0.1
    bound: float = 1e-3
    threshold: float = 1e-4
    epsilon_threshold: float = 1.0
    epsilon_queries: float = 1.0
    epsilon_answers: float = 1.0

    uniform: ClassVar[bool] = True
    private: ClassVar[bool] = True

    @property
    def epsilon(self) -> float:
        """ε₁ + ε₂ + ε₃"""
        return self.epsilon_threshold + self.epsilon_queries + self.epsilon_answers

    def validate(self, before: tuple[Transform, ...], after: tuple[Transform, ...]) -> list[str]:
        """All fields are above 0."""
        found = []
        if not 0 < self.fraction <= 1:
            found.append(f"SparseVector: fraction must be above 0 and at most 1, not {self.fraction}")
        if not (0 < self.bound < math.inf and 0 <= self.threshold < math.inf):
            found.append("SparseVector: bound must be above 0, and threshold not below")
        if not all(0 < e < math.inf for e in (self.epsilon_threshold, self.epsilon_queries, self.epsilon_answers)):
            found.append("SparseVector: each epsilon must be above 0")
        return found

    def encode(
        self, sent: WeightedMean, notes: Trees, memory: Trees, site: Site, round: int
    ) -> tuple[WeightedMean, Trees]:
        """The chosen coordinates with noise, and zeros."""
        rng, like = site.secret_rng(), sent.total
        refuse_variances(like)
        if whole := sorted(name for name, leaf in like.items() if leaf.numel() and not leaf.is_floating_point()):
            raise ConfigError(f"SparseVector cannot hide integers, and {whole[0]} holds {like[whole[0]].dtype}")
        x = tree.flatten(like).double()
        if not bool(x.isfinite().all()):
            raise ConfigError("what this site would send holds NaN or an infinity: lower the learning rate")
        use = Use({"": x.clamp(-self.bound, self.bound)}, Spend(0.0, pure=self.epsilon), {}, self.bound)
        released = hidden(use, lambda value: {"": self._chosen(value[""], rng)})[""]
        meter(use.spend)
        found = tree.unflatten(released, like)
        return WeightedMean({k: found[k].to(v.dtype) for k, v in sent.total.items()}, sent.weight), memory

    def _chosen(self, x: Tensor, rng: SecretRng) -> Tensor:
        """The large coordinates of ``x`` [n], each with noise, and zeros. No coordinate is larger than the bound."""
        most = max(1, int(self.fraction * len(x)))
        # One site more or less moves a coordinate by Δ = γ (add or remove) and its size by as much.
        # ρ = Lap(Δ/ε₁); above, where |x_i| + Lap(2cΔ/ε₂) ≥ τ + ρ, in random order, until c are found
        threshold = self.threshold + float(laplace(1, self.bound / self.epsilon_threshold, rng))
        above = x.abs() + laplace(len(x), 2 * most * self.bound / self.epsilon_queries, rng) >= threshold
        order = rng.uniform(len(x)).argsort()
        chosen = order[above[order]][:most]
        # x_i + Lap(cΔ/ε₃), clipped again as in the paper
        scale = most * self.bound / self.epsilon_answers
        answers = x[chosen] + laplace(len(chosen), scale, rng)
        grid = 2.0 ** (math.floor(math.log2(scale)) - 20)  # as in ``add_noise``
        answers = (answers / grid).round() * grid
        return torch.zeros_like(x).index_put_((chosen,), answers.clamp(-self.bound, self.bound))


@dataclass(frozen=True)
class UncalibratedNoise(Transform):
    """Noise in proportion to what it covers. NOT differential privacy: nothing is bounded and no ε follows.

    Several papers call this privacy (Li et al., "Multi-site fMRI analysis using privacy-preserving federated learning
    and domain adaptation", Medical Image Analysis 65, 2020; HistoFL, 2022). It is here to repeat and to attack them.

    Attributes:
        scale: The deviation of the noise, in deviations of each tensor.
    """

    scale: float = 0.01

    def validate(self, before: tuple[Transform, ...], after: tuple[Transform, ...]) -> list[str]:
        """A scale is not below 0."""
        return [] if 0 <= self.scale < math.inf else [f"UncalibratedNoise: scale must not be below 0: {self.scale}"]

    def encode(
        self, sent: WeightedMean, notes: Trees, memory: Trees, site: Site, round: int
    ) -> tuple[WeightedMean, Trees]:
        """Adds N(0, (scale · deviation of the tensor)²)."""
        rng = site.secret_rng()

        def noisy(leaf: Tensor) -> Tensor:
            if leaf.numel() < 2 or not leaf.is_floating_point():
                return leaf
            deviation = float(leaf.double().std(correction=0))
            return (leaf.double() + self.scale * deviation * rng.normal(*leaf.shape)).to(leaf.dtype)

        total: Tree = {name: noisy(leaf) for name, leaf in sent.total.items()}
        return WeightedMean(total, sent.weight), memory


def laplace(size: int, scale: float, rng: SecretRng) -> Tensor:
    """Noise with density exp(-|x| / scale) / (2 · scale). Shape [size], float64."""
    u = rng.uniform(size) - 0.5
    return -scale * u.sign() * (-2 * u.abs()).log1p()
