"""Differential privacy of whole sites, as transforms: clip what a site sends, then hide it in noise.

Brendan McMahan, Daniel Ramage, Kunal Talwar and Li Zhang, "Learning Differentially Private Recurrent Language
Models", ICLR 2018, Algorithm 1 with a flat bound and equal weights, https://arxiv.org/abs/1710.06963; and Galen
Andrew, Om Thakkar, Brendan McMahan and Swaroop Ramaswamy, "Differentially Private Learning with Adaptive
Clipping", NeurIPS 2021, Algorithm 1, https://arxiv.org/abs/1905.03871.

We depart from both in who adds the noise: the sites do, never the server, so that the server need not be trusted
with a clear sum. What is protected is a whole hospital, and each patient in it at half the multiplier (``units``). For
patients, train with ``DPSGD``, which protects each of them from everyone outside the hospital; for three to thirty
hospitals that is nearly always what is wanted.

A bound that the server names is checked at the site, for noise that is calibrated to another bound than the one that
was clipped to hides nothing.
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

SMALLEST, LARGEST = 2.0**-60, 2.0**60  # bounds beyond these lose their digits in single precision
STEPS = 4  # of a secure sum's grid that each site's part of shared noise must span
BELOW = "m/~clip/below"  # whether a site's reply was below the bound, less one half


@dataclass(frozen=True)
class Clip(Transform):
    """Scales a reply, all its parts together, down to Euclidean norm ``bound``."""

    bound: float

    uniform: ClassVar[bool] = True
    private: ClassVar[bool] = True

    def validate(self, before: tuple[Transform, ...], after: tuple[Transform, ...]) -> list[str]:
        """A bound must be a number above 0."""
        if SMALLEST <= self.bound <= LARGEST:
            return []
        return [f"Clip: bound must be a number above 0, from {SMALLEST:.0e} to {LARGEST:.0e}, not {self.bound}"]

    def describe(self, state: Trees) -> Trees:
        """The bound, which ``Gaussian`` needs to know."""
        return {"clip": {"bound": torch.tensor(self.bound, dtype=torch.float64)}}

    def encode(
        self, sent: WeightedMean, notes: Trees, memory: Trees, site: Site, round: int
    ) -> tuple[WeightedMean, Trees]:
        """min(1, bound / ‖x‖) · x

        Raises:
            ValueError: If the server's message names another bound, to which ``Gaussian`` would calibrate its noise.
        """
        if (told := float(notes["clip"]["bound"])) != self.bound or len(notes["clip"]) != 1:
            raise ConfigError(f"Clip: the server's message names the bound {told:g}, and {self.bound:g} was approved")
        return WeightedMean(_clipped(sent.total, self.bound)[0], sent.weight), memory


@dataclass(frozen=True)
class AdaptiveClip(Transform):
    """Clips at a bound that follows a quantile of the sites' norms.

    Attributes:
        start: The first bound.
        quantile: γ, the share of sites whose replies should be below the bound.
        rate: η, by how much the bound moves.
        count_noise: σ_b, the deviation of the noise on the number of sites below the bound. Left out, it is what
            makes the noise on everything else 5 % larger, and 0 where no ``Gaussian`` follows.
    """

    start: float
    quantile: float = 0.5
    rate: float = 0.2
    count_noise: float | None = None

    uniform: ClassVar[bool] = True
    private: ClassVar[bool] = True

    def resolve(self, after: tuple[Transform, ...]) -> Transform:
        """With ``count_noise`` chosen."""
        if self.count_noise is not None:
            return self
        multiplier = after[0].multiplier if after and isinstance(after[0], Gaussian) else 0.0
        return replace(self, count_noise=multiplier / (2 * (1 - 1.05**-2) ** 0.5))

    def validate(self, before: tuple[Transform, ...], after: tuple[Transform, ...]) -> list[str]:
        """A bound above 0, a quantile in between, and noise on the count that leaves some for the rest."""
        found = []
        if not SMALLEST <= self.start <= LARGEST:
            found.append(
                f"AdaptiveClip: start must be a number above 0, from {SMALLEST:.0e} to {LARGEST:.0e}, not {self.start}"
            )
        if not 0 < self.quantile < 1:
            found.append(f"AdaptiveClip: quantile must be between 0 and 1, not {self.quantile}")
        follows = after[0] if after and isinstance(after[0], Gaussian) else None
        if follows and not 2 * (self.count_noise or 0.0) > follows.multiplier:
            found.append(
                f"AdaptiveClip: count_noise must be above {follows.multiplier / 2:g}, half the multiplier of "
                "Gaussian, or the count alone spends the budget"
            )
        return found

    def init(self, params: Tree) -> Trees:
        """The first bound."""
        return {"clip": {"bound": torch.tensor(self.start, dtype=torch.float64)}}

    def describe(self, state: Trees) -> Trees:
        """The bound, and the noise on the count."""
        count_noise = torch.tensor(self.count_noise or 0.0, dtype=torch.float64)
        return {"clip": {"bound": state["clip"]["bound"], "count_noise": count_noise}}

    def encode(
        self, sent: WeightedMean, notes: Trees, memory: Trees, site: Site, round: int
    ) -> tuple[WeightedMean, Trees]:
        """The clipped reply, and whether it was below the bound, less one half (section 2.2's b − ½).

        Raises:
            ValueError: If the server's message names a bound that cannot be one, or other noise on the count.
        """
        bound, count_noise = (float(notes["clip"][name]) for name in ("bound", "count_noise"))
        if not SMALLEST <= bound <= LARGEST or count_noise != (self.count_noise or 0.0):
            allowed = f"bounds from {SMALLEST:.0e} to {LARGEST:.0e} and {self.count_noise or 0:g}"
            raise ConfigError(
                f"AdaptiveClip: the server's message names the bound {bound:g} and the count's noise "
                f"{count_noise:g}, and {allowed} were approved"
            )
        clipped, size = _clipped(sent.total, bound)
        below = torch.tensor([0.5 if size <= bound else -0.5])
        return WeightedMean({**clipped, BELOW: below}, sent.weight), memory

    def decode(self, received: WeightedMean, state: Trees) -> tuple[WeightedMean, Trees]:
        """C ← C · exp(−η (b̃ − γ))"""
        share = float(received.total[BELOW]) / received.weight + 0.5
        bound = state["clip"]["bound"] * math.exp(-self.rate * (min(max(share, 0.0), 1.0) - self.quantile))
        rest = {name: leaf for name, leaf in received.total.items() if name != BELOW}
        return WeightedMean(rest, received.weight), {"clip": {"bound": bound}}


@dataclass(frozen=True)
class Gaussian(Transform):
    """Adds normal noise from the operating system, of deviation ``multiplier`` times the clipping bound.

    Alone, each site adds all of it, and is protected from the server too. Under ``SecureSum`` nobody sees less
    than a sum, so ``share`` sites may add one part each.

    Attributes:
        multiplier: z, the deviation of the noise over the bound. ``polyclinic privacy plan`` finds it.
        share: How many sites' noise is in every sum at the least: the threshold of secure summation, less the
            sites that might work together against another. Each adds noise of variance (z · bound)² / share.
        step: The distance of two numbers that ``SecureSum`` can tell apart; it is found when a pipeline is built.

    With ``share`` above 1, ``SecureSum`` rounds numbers that hold only a part of the noise. By Poisson's summation
    formula a sum of rounded normal parts is distributed as the sum of all noise, rounded at random to the grid, which
    is post-processing, up to a share of 2 exp(-π² s² / 2) per number, with s the part's deviation in steps of the
    grid (compare Clément Canonne, Gautam Kamath and Thomas Steinke, "The Discrete Gaussian for Differential Privacy",
    NeurIPS 2020, https://arxiv.org/abs/2004.00010). For s = 4 that is below 1e-33; for s = 1/4 it hides nothing, for
    most parts round to the same number. So s >= 4 is demanded. A site that adds all noise itself rounds what is
    hidden already.
    """

    multiplier: float
    share: int = 1
    step: float | None = None

    uniform: ClassVar[bool] = True
    private: ClassVar[bool] = True

    def resolve(self, after: tuple[Transform, ...]) -> Transform:
        """With the grid of the secure sum that follows; 0 if none does."""
        return self if self.step is not None else replace(self, step=_step(after))

    def validate(self, before: tuple[Transform, ...], after: tuple[Transform, ...]) -> list[str]:
        """Noise hides what is bounded, and a part of the noise hides nothing until it is summed."""
        found = []
        if not 0 < self.multiplier < math.inf:
            found.append(
                f"Gaussian: multiplier must be a number above 0, not {self.multiplier}; without noise, leave "
                "Gaussian out and claim no privacy"
            )
        if not before or not isinstance(before[-1], Clip | AdaptiveClip):
            found.append("Gaussian must come directly after Clip or AdaptiveClip: noise hides only what is bounded")
        if self.share < 1:
            found.append(f"Gaussian: share counts sites, so it is at least 1, not {self.share}")
        if self.share > 1 and not any(t.secure for t in after):
            found.append(
                "Gaussian(share=...) must be followed by SecureSum: without it the server sees replies that "
                "hold only a part of the noise"
            )
        if self.step != _step(after):
            step = f"{_step(after):g}, not {self.step}"
            found.append(f"Gaussian: step follows from SecureSum, so leave it out: it is {step}")
        if not found and isinstance(before[-1], Clip):
            found += self._too_coarse(before[-1].describe({})["clip"])
        return found

    def deviations(self, clip: Mapping[str, Tensor]) -> tuple[float, float]:
        """Of this site's part of the noise, on each number and on the count of ``AdaptiveClip``.

        Args:
            clip: The note of the clipping that went before: ``bound``, and ``count_noise`` where it counts.
        """
        z, count_noise = self.multiplier, float(clip.get("count_noise", 0.0))
        if count_noise:
            # Andrew et al., section 2.2: z_Δ = (z⁻² − (2 σ_b)⁻²)^(−1/2)
            z = (self.multiplier**-2 - (2 * count_noise) ** -2) ** -0.5
        return z * float(clip["bound"]) / self.share**0.5, count_noise / self.share**0.5

    def _too_coarse(self, clip: Mapping[str, Tensor]) -> list[str]:
        """Why the secure sum's grid is too coarse for a part of the noise, if it is."""
        if self.share == 1 or not self.step:
            return []
        least = min(deviation for deviation in self.deviations(clip) if deviation)
        if least >= STEPS * self.step:
            return []
        return [
            f"Gaussian(share={self.share}): each site's part of the noise has the deviation {least:.3g}, and SecureSum "
            f"rounds to steps of {self.step:.3g}, so the sum would not hide what the multiplier says. At least {STEPS} "
            "steps are needed: raise SecureSum's bits (and lower its limit), or the bound or the multiplier"
        ]

    def encode(
        self, sent: WeightedMean, notes: Trees, memory: Trees, site: Site, round: int
    ) -> tuple[WeightedMean, Trees]:
        """Adds N(0, (z · bound)² / share), and rounds to a grid of 2⁻²⁰ deviations.

        Raises:
            ValueError: If a tensor cannot be hidden, or the secure sum's grid is too coarse for the bound. Nothing was
                sent.
        """
        clip, rng = notes["clip"], site.secret_rng()
        deviation, count_deviation = self.deviations(clip)
        if found := self._too_coarse(clip):
            raise ConfigError(found[0])
        refuse_variances(sent.total)
        for name, leaf in sent.total.items():
            if leaf.numel() and not leaf.is_floating_point():
                raise ConfigError(f"Gaussian cannot hide integers, and {name} holds {leaf.dtype}")
        part = {name: count_deviation if name == BELOW else deviation for name in sent.total}

        def noise(value: Tree) -> Tree:
            return {name: add_noise(leaf, part[name], rng) for name, leaf in value.items()}

        spend = Spend(self.multiplier, share=self.share)
        whole = {name: own * self.share**0.5 for name, own in part.items()}
        noisy = hidden(Use(sent.total, spend, whole), noise)
        meter(spend)
        return WeightedMean(noisy, sent.weight), memory

    def decode(self, received: WeightedMean, state: Trees) -> tuple[WeightedMean, Trees]:
        """The sum as it is, if it holds the noise that was counted on."""
        if self.share > 1 and received.weight < self.share - 0.5:
            raise ConfigError(
                f"this sum holds the noise of {received.weight:g} sites, and {self.share} were counted "
                "on: it protects less than it says. Raise SecureSum's threshold"
            )
        return received, state


def _step(after: tuple[Transform, ...]) -> float:
    """The distance between two numbers that the secure sum among the transforms ``after`` can tell apart; 0 without."""
    return next((float(getattr(t, "step", 0.0)) for t in after if t.secure), 0.0)


def refuse_variances(sent: Tree) -> None:
    """Raises where noise would make a running variance negative, and the model useless without a word.

    Raises:
        ValueError: Naming the tensor and what to do.
    """
    if found := next((name for name in sent if "running_var" in name), None):
        raise ConfigError(
            f"{found} is a variance of batch normalization, which noise would make negative: build the "
            'network with the option norm = "group", or keep the statistics at the sites '
            "(silobn, fedbn)"
        )


def _clipped(a: Tree, bound: float) -> tuple[Tree, float]:
    """``a`` scaled down to norm ``bound``, and the norm that it had."""
    size = tree.norm(a)
    if not math.isfinite(size):
        raise ConfigError(
            "what this site would send holds NaN or an infinity, which no bound can clip: lower the learning rate"
        )
    # A little below the bound, so that rounding cannot carry it above, whatever the precision of the numbers.
    margin = max([2.0**-20, *(torch.finfo(leaf.dtype).eps for leaf in a.values() if leaf.is_floating_point())])
    return (tree.scale(a, bound / size * (1 - margin)) if size > bound else a), size
