"""Differential privacy of whole sites, as transforms: clip a site's reply, then add noise.

Brendan McMahan, Daniel Ramage, Kunal Talwar and Li Zhang, "Learning Differentially Private Recurrent Language
Models", ICLR 2018, Algorithm 1 with a flat bound and equal weights, https://arxiv.org/abs/1710.06963; and Galen
Andrew, Om Thakkar, Brendan McMahan and Swaroop Ramaswamy, "Differentially Private Learning with Adaptive
Clipping", NeurIPS 2021, Algorithm 1, https://arxiv.org/abs/1905.03871.

Departure from both: the sites add the noise, never the server, so that the server need not be trusted with a sum
without noise. The unit of protection is a whole site, and each patient in it at half the multiplier
(``privacy_units``). To protect patients, train with ``DPSGD``, which protects each of them from everyone outside the
site; with three to thirty sites this is nearly always appropriate.

A bound in the server's message is checked at the site, because noise calibrated to another bound than that of the
clipping gives no protection.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from polyclinic.core import tree
from polyclinic.core.aggregates import WeightedMean
from polyclinic.core.metering import Spend, Use, hidden, meter
from polyclinic.core.pipeline import Transform
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError
from polyclinic.learning.training.dp_sgd import add_noise

SMALLEST, LARGEST = 2.0**-60, 2.0**60  # bounds outside this range lose accuracy in single precision
STEPS = 4  # steps of a secure sum's grid that the standard deviation of each site's part of the noise must span
BELOW = "m/~clip/below"  # 1/2 if the norm of a site's reply was at most the bound, else -1/2


@dataclass(frozen=True)
class Clip(Transform):
    """Scales all parts of a reply together to at most Euclidean norm ``bound``."""

    bound: float

    uniform: ClassVar[bool] = True
    private: ClassVar[bool] = True

    def validate(self, before: tuple[Transform, ...], after: tuple[Transform, ...]) -> list[str]:
        """Check that the bound is in range."""
        if SMALLEST <= self.bound <= LARGEST:
            return []
        return [f"Clip: bound must be a number above 0, from {SMALLEST:.0e} to {LARGEST:.0e}, not {self.bound}"]

    def describe(self, state: Trees) -> Trees:
        """Return the bound, which ``Gaussian`` needs."""
        return {"clip": {"bound": torch.tensor(self.bound, dtype=torch.float64)}}

    def encode(
        self, sent: WeightedMean, notes: Trees, memory: Trees, site: Site, round: int
    ) -> tuple[WeightedMean, Trees]:
        """Clip: ``min(1, bound / ‖x‖) · x``.

        Raises:
            ValueError: If the server's message has another bound, to which ``Gaussian`` would calibrate its noise.
        """
        if (given := float(notes["clip"]["bound"])) != self.bound or len(notes["clip"]) != 1:
            raise ConfigError(f"Clip: the server's message has the bound {given:g}, but {self.bound:g} was approved")
        return WeightedMean(_clipped(sent.total, self.bound)[0], sent.weight), memory


@dataclass(frozen=True)
class AdaptiveClip(Transform):
    """Clips at a bound that tracks a quantile of the sites' norms.

    Attributes:
        start: The initial bound.
        quantile: γ, the fraction of sites whose replies should be below the bound.
        rate: η, the learning rate of the bound.
        count_noise: σ_b, the standard deviation of the noise on the number of sites below the bound. By default such
            that all other noise is 5 % larger, and 0 if no ``Gaussian`` follows.
    """

    start: float
    quantile: float = 0.5
    rate: float = 0.2
    count_noise: float | None = None

    uniform: ClassVar[bool] = True
    private: ClassVar[bool] = True

    def resolve(self, after: tuple[Transform, ...]) -> Transform:
        """Return the transform with ``count_noise`` chosen."""
        if self.count_noise is not None:
            return self
        multiplier = after[0].multiplier if after and isinstance(after[0], Gaussian) else 0.0
        return replace(self, count_noise=multiplier / (2 * (1 - 1.05**-2) ** 0.5))

    def validate(self, before: tuple[Transform, ...], after: tuple[Transform, ...]) -> list[str]:
        """Check the bound, the quantile, and that the noise on the count leaves budget for the rest."""
        problems = []
        if not SMALLEST <= self.start <= LARGEST:
            problems.append(
                f"AdaptiveClip: start must be a number above 0, from {SMALLEST:.0e} to {LARGEST:.0e}, not {self.start}"
            )
        if not 0 < self.quantile < 1:
            problems.append(f"AdaptiveClip: quantile must be between 0 and 1, not {self.quantile}")
        if any(isinstance(t, AdaptiveClip) for t in before):
            problems.append("AdaptiveClip is listed twice: remove one of them")
        follows = after[0] if after and isinstance(after[0], Gaussian) else None
        if follows and not 2 * (self.count_noise or 0.0) > follows.multiplier:
            problems.append(
                f"AdaptiveClip: count_noise must be above {follows.multiplier / 2:g}, half the multiplier of "
                "Gaussian, or the count alone spends the budget"
            )
        return problems

    def init(self, params: Tree) -> Trees:
        """Return the initial bound."""
        return {"clip": {"bound": torch.tensor(self.start, dtype=torch.float64)}}

    def describe(self, state: Trees) -> Trees:
        """Return the bound, and the noise on the count."""
        count_noise = torch.tensor(self.count_noise or 0.0, dtype=torch.float64)
        return {"clip": {"bound": state["clip"]["bound"], "count_noise": count_noise}}

    def encode(
        self, sent: WeightedMean, notes: Trees, memory: Trees, site: Site, round: int
    ) -> tuple[WeightedMean, Trees]:
        """Return the clipped reply with 1/2 if it was below the bound, else -1/2 (section 2.2's b − ½).

        Raises:
            ValueError: If the bound in the server's message is out of range, or the noise on the count differs.
        """
        bound, count_noise = (float(notes["clip"][name]) for name in ("bound", "count_noise"))
        if not SMALLEST <= bound <= LARGEST or count_noise != (self.count_noise or 0.0):
            allowed = f"bounds from {SMALLEST:.0e} to {LARGEST:.0e} and {self.count_noise or 0:g}"
            raise ConfigError(
                f"AdaptiveClip: the server's message has the bound {bound:g} and count noise {count_noise:g}, but "
                f"{allowed} were approved"
            )
        clipped, size = _clipped(sent.total, bound)
        below = torch.tensor([0.5 if size <= bound else -0.5])
        return WeightedMean({**clipped, BELOW: below}, sent.weight), memory

    def decode(self, received: WeightedMean, state: Trees) -> tuple[WeightedMean, Trees]:
        """Update the bound: ``C ← C · exp(−η (b̃ − γ))``."""
        share = float(received.total[BELOW]) / received.weight + 0.5
        bound = state["clip"]["bound"] * math.exp(-self.rate * (min(max(share, 0.0), 1.0) - self.quantile))
        rest = {name: leaf for name, leaf in received.total.items() if name != BELOW}
        return WeightedMean(rest, received.weight), {"clip": {"bound": bound}}


@dataclass(frozen=True)
class Gaussian(Transform):
    """Adds normal noise from the operating system, with standard deviation ``multiplier`` times the clipping bound.

    Without ``SecureSum``, each site adds the full noise and is protected from the server, too. With ``SecureSum`` only
    sums are revealed, so ``share`` sites may add one part each.

    Attributes:
        multiplier: z, the standard deviation of the noise divided by the bound; see ``polyclinic privacy plan``.
        share: The minimum number of sites whose noise is in every sum: the threshold of secure summation minus the
            number of sites that may collude. Each site adds noise of variance ``(z · bound)² / share``.
        step: The resolution of ``SecureSum``; determined when a pipeline is built.

    With ``share`` above 1, ``SecureSum`` rounds numbers that contain only a part of the noise. By Poisson's summation
    formula a sum of rounded normal parts is distributed as the sum of all noise, rounded at random to the grid, which
    is post-processing, up to a fraction of ``2 exp(-π² s² / 2)`` per number, with s the part's standard deviation in
    steps of the grid (compare Clément Canonne, Gautam Kamath and Thomas Steinke, "The Discrete Gaussian for
    Differential Privacy", NeurIPS 2020, https://arxiv.org/abs/2004.00010). For s = 4 that is below 1e-33; for s = 1/4
    there is no protection, because most parts round to the same number. Therefore s >= 4 is required. If a site adds
    all noise itself, rounding is post-processing.
    """

    multiplier: float
    share: int = 1
    step: float | None = None

    uniform: ClassVar[bool] = True
    private: ClassVar[bool] = True

    def resolve(self, after: tuple[Transform, ...]) -> Transform:
        """Return the transform with the resolution of the secure sum that follows; 0 if none does."""
        return self if self.step is not None else replace(self, step=_step(after))

    def validate(self, before: tuple[Transform, ...], after: tuple[Transform, ...]) -> list[str]:
        """Check that the input is clipped, and that a part of the noise is only revealed in a sum."""
        problems = []
        if not 0 < self.multiplier < math.inf:
            problems.append(
                f"Gaussian: multiplier must be a number above 0, not {self.multiplier}; without noise, remove "
                "Gaussian and claim no privacy"
            )
        if not before or not isinstance(before[-1], Clip | AdaptiveClip):
            problems.append("Gaussian must come directly after Clip or AdaptiveClip: noise requires a bound")
        if self.share < 1:
            problems.append(f"Gaussian: share is a number of sites of at least 1, not {self.share}")
        if self.share > 1 and not any(t.secure for t in after):
            problems.append(
                "Gaussian(share=...) must be followed by SecureSum: without it the server sees replies with only a "
                "part of the noise"
            )
        if self.step != _step(after):
            step = f"{_step(after):g}, not {self.step}"
            problems.append(f"Gaussian: step follows from SecureSum, so omit it: it is {step}")
        if not problems and isinstance(before[-1], Clip):
            problems += self._too_coarse(before[-1].describe({})["clip"])
        return problems

    def deviations(self, clip: Mapping[str, Tensor]) -> tuple[float, float]:
        """Return the standard deviations of this site's noise on each number and on ``AdaptiveClip``'s count.

        Args:
            clip: The note of the preceding clipping: ``bound``, and ``count_noise`` if adaptive.
        """
        z, count_noise = self.multiplier, float(clip.get("count_noise", 0.0))
        if count_noise:
            # Andrew et al., section 2.2: z_Δ = (z⁻² − (2 σ_b)⁻²)^(−1/2)
            z = (self.multiplier**-2 - (2 * count_noise) ** -2) ** -0.5
        return z * float(clip["bound"]) / self.share**0.5, count_noise / self.share**0.5

    def _too_coarse(self, clip: Mapping[str, Tensor]) -> list[str]:
        """Return why the secure sum's grid is too coarse for a part of the noise; empty if it is not."""
        if self.share == 1 or not self.step:
            return []
        least = min(deviation for deviation in self.deviations(clip) if deviation)
        if least >= STEPS * self.step:
            return []
        return [
            f"Gaussian(share={self.share}): each site's part of the noise has standard deviation {least:.3g}, and "
            f"SecureSum rounds to steps of {self.step:.3g}, so the sum would not have the stated protection. At least "
            f"{STEPS} steps are needed: raise SecureSum's bits (and lower its limit), or the bound or the multiplier"
        ]

    def encode(
        self, sent: WeightedMean, notes: Trees, memory: Trees, site: Site, round: int
    ) -> tuple[WeightedMean, Trees]:
        """Add ``N(0, (z · bound)² / share)``, and round to a grid of 2⁻²⁰ standard deviations.

        Raises:
            ValueError: If a tensor cannot be protected, or the secure sum's grid is too coarse for the bound. Nothing
                is sent.
        """
        clip, rng = notes["clip"], site.secret_rng()
        deviation, count_deviation = self.deviations(clip)
        if problems := self._too_coarse(clip):
            raise ConfigError(problems[0])
        refuse_variances(sent.total)
        for name, leaf in sent.total.items():
            if leaf.numel() and not leaf.is_floating_point():
                raise ConfigError(f"Gaussian cannot protect integers, and {name} contains {leaf.dtype}")
        part = {name: count_deviation if name == BELOW else deviation for name in sent.total}

        def noise(value: Tree) -> Tree:
            return {name: add_noise(leaf, part[name], rng) for name, leaf in value.items()}

        spend = Spend(self.multiplier, share=self.share)
        total = {name: own * self.share**0.5 for name, own in part.items()}
        noisy = hidden(Use(sent.total, spend, total), noise)
        meter(spend)
        return WeightedMean(noisy, sent.weight), memory

    def decode(self, received: WeightedMean, state: Trees) -> tuple[WeightedMean, Trees]:
        """Return the sum unchanged if it contains the required noise."""
        if self.share > 1 and received.weight < self.share - 0.5:
            raise ConfigError(
                f"this sum contains the noise of {received.weight:g} sites, but {self.share} are required, so it "
                "does not have the stated protection. Raise SecureSum's threshold"
            )
        return received, state


def _step(after: tuple[Transform, ...]) -> float:
    """Return the resolution of the secure sum among the transforms ``after``; 0 without one."""
    return next((float(getattr(t, "step", 0.0)) for t in after if t.secure), 0.0)


def refuse_variances(sent: Tree) -> None:
    """Refuse running variances, which noise could make negative, so that the model would be useless.

    Raises:
        ValueError: If there is one. The message names the tensor and a remedy.
    """
    if variance := next((name for name in sent if "running_var" in name), None):
        raise ConfigError(
            f"{variance} is a variance of batch normalization, which noise would make negative: build the "
            'network with the option norm = "group", or keep the statistics at the sites '
            "(silobn, fedbn)"
        )


def _clipped(a: Tree, bound: float) -> tuple[Tree, float]:
    """Scale ``a`` to at most norm ``bound``; return it with its original norm."""
    size = tree.norm(a)
    if not math.isfinite(size):
        raise ConfigError(
            "this site's reply contains NaN or infinity, which cannot be clipped: lower the learning rate"
        )
    # Slightly below the bound, so that rounding cannot exceed it, whatever the precision of the numbers.
    margin = max([2.0**-20, *(torch.finfo(leaf.dtype).eps for leaf in a.values() if leaf.is_floating_point())])
    clipped, length = a, size
    if size > bound:
        clipped = tree.scale(a, bound / size * (1 - margin))
        length = tree.norm(clipped)
    while length > bound:  # numbers below the normal range are rounded coarsely, and up if they are many
        clipped = tree.scale(clipped, 0.5)
        length = tree.norm(clipped)
    return clipped, size
