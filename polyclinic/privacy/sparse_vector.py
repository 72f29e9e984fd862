"""Selective sharing with the sparse vector technique, and uncalibrated noise, which is not differentially private.

Wenqi Li, Fausto Milletarì, Daguang Xu, et al., "Privacy-preserving Federated Brain Tumor Segmentation", MLMI at
MICCAI 2019, https://arxiv.org/abs/1910.00962: a site shares only the changes that exceed a noisy threshold, each with
noise. The noise scales are those for which the technique is proven: Min Lyu, Dong Su and Ninghui Li, "Understanding the
Sparse Vector Technique for Differential Privacy", VLDB 2017, Algorithm 7, https://arxiv.org/abs/1603.01699. They grow
with the number of shared values, so either ε is large or few values are shared. Published results with less noise do
not have the stated ε.
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
    """Shares at most a fraction of the coordinates, the large ones, each with noise; all others are sent as 0.

    The total ε is the sum of the three. It protects the whole site: an absent site is one that sends zeros, so a
    coordinate changes by at most Δ = γ, and so does its magnitude. A patient of a site changes a coordinate by up to
    2 γ, and counts twice (``privacy_units``). The scales are those for non-monotonic queries, because the magnitudes of
    a patient's changes are not monotonic. At most c coordinates receive fresh noise; clamping, and setting all others
    to 0, is post-processing.

    Attributes:
        fraction: q, the largest fraction of coordinates that is sent. The paper tries 0.1 to 0.4.
        bound: γ, to which the magnitude of each coordinate is clipped.
        threshold: τ, above which a change is selected.
        epsilon_threshold: ε₁, for the threshold.
        epsilon_queries: ε₂, for the comparison of coordinates with the threshold.
        epsilon_answers: ε₃, for the shared values.
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
        """``ε₁ + ε₂ + ε₃``."""
        return self.epsilon_threshold + self.epsilon_queries + self.epsilon_answers

    def validate(self, before: tuple[Transform, ...], after: tuple[Transform, ...]) -> list[str]:
        """Check the ranges of all fields."""
        problems = []
        if not 0 < self.fraction <= 1:
            problems.append(f"SparseVector: fraction must be above 0 and at most 1, not {self.fraction}")
        if not (0 < self.bound < math.inf and 0 <= self.threshold < math.inf):
            problems.append("SparseVector: bound must be above 0, and threshold at least 0")
        if not all(0 < e < math.inf for e in (self.epsilon_threshold, self.epsilon_queries, self.epsilon_answers)):
            problems.append("SparseVector: each epsilon must be above 0")
        return problems

    def encode(
        self, sent: WeightedMean, notes: Trees, memory: Trees, site: Site, round: int
    ) -> tuple[WeightedMean, Trees]:
        """Return the selected coordinates with noise, and zeros."""
        rng, like = site.secret_rng(), sent.total
        refuse_variances(like)
        if integers := sorted(name for name, leaf in like.items() if leaf.numel() and not leaf.is_floating_point()):
            first = integers[0]
            raise ConfigError(f"SparseVector cannot protect integers, and {first} contains {like[first].dtype}")
        x = tree.flatten(like).double()
        if not bool(x.isfinite().all()):
            raise ConfigError("this site's reply contains NaN or infinity: lower the learning rate")
        use = Use({"": x.clamp(-self.bound, self.bound)}, Spend(0.0, pure=self.epsilon), {}, self.bound)
        released = hidden(use, lambda value: {"": self._chosen(value[""], rng)})[""]
        meter(use.spend)
        leaves = tree.unflatten(released, like)
        return WeightedMean({k: leaves[k].to(v.dtype) for k, v in sent.total.items()}, sent.weight), memory

    def _chosen(self, x: Tensor, rng: SecretRng) -> Tensor:
        """Return the large coordinates of ``x`` [n], each with noise, and zeros. No coordinate exceeds the bound."""
        most = max(1, int(self.fraction * len(x)))
        # Adding or removing a site changes a coordinate by Δ = γ, and its magnitude by as much.
        # ρ = Lap(Δ/ε₁); above if |x_i| + Lap(2cΔ/ε₂) ≥ τ + ρ, in random order, up to c coordinates
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
    """Noise in proportion to the spread of each tensor. NOT differential privacy: no bound, and therefore no ε.

    Several papers call this privacy (Li et al., "Multi-site fMRI analysis using privacy-preserving federated learning
    and domain adaptation", Medical Image Analysis 65, 2020; HistoFL, 2022). It serves to reproduce and attack them.

    Attributes:
        scale: Standard deviation of the noise divided by that of each tensor.
    """

    scale: float = 0.01

    def validate(self, before: tuple[Transform, ...], after: tuple[Transform, ...]) -> list[str]:
        """Check that the scale is at least 0."""
        return [] if 0 <= self.scale < math.inf else [f"UncalibratedNoise: scale must not be below 0: {self.scale}"]

    def encode(
        self, sent: WeightedMean, notes: Trees, memory: Trees, site: Site, round: int
    ) -> tuple[WeightedMean, Trees]:
        """Add ``N(0, (scale · standard deviation of the tensor)²)``."""
        rng = site.secret_rng()

        def noisy(leaf: Tensor) -> Tensor:
            if leaf.numel() < 2 or not leaf.is_floating_point():
                return leaf
            deviation = float(leaf.double().std(correction=0))
            return (leaf.double() + self.scale * deviation * rng.normal(*leaf.shape)).to(leaf.dtype)

        total: Tree = {name: noisy(leaf) for name, leaf in sent.total.items()}
        return WeightedMean(total, sent.weight), memory


def laplace(size: int, scale: float, rng: SecretRng) -> Tensor:
    """Draw noise with density ``exp(-|x| / scale) / (2 · scale)``. Shape [size], float64."""
    u = rng.uniform(size) - 0.5
    return -scale * u.sign() * (-2 * u.abs()).log1p()
