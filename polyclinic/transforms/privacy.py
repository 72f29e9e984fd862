"""Differential privacy of whole sites, as transforms: clip what a site sends, then hide it in noise.

Brendan McMahan, Daniel Ramage, Kunal Talwar and Li Zhang, "Learning Differentially Private Recurrent Language
Models", ICLR 2018, Algorithm 1 with a flat bound and equal weights, https://arxiv.org/abs/1710.06963; and Galen
Andrew, Om Thakkar, Brendan McMahan and Swaroop Ramaswamy, "Differentially Private Learning with Adaptive
Clipping", NeurIPS 2021, Algorithm 1, https://arxiv.org/abs/1905.03871.

We depart from both in who adds the noise: the sites do, never the server, so that the server need not be trusted
with a clear sum. What is protected is a whole hospital. For patients, train with ``DPSGD``, which protects each of
them from everyone outside the hospital; for three to thirty hospitals that is nearly always what is wanted.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from polyclinic.core import tree
from polyclinic.core.metering import Spend, Use, hidden, meter
from polyclinic.core.pipeline import Transform
from polyclinic.core.site import Site
from polyclinic.core.stats import Mean
from polyclinic.core.tree import Tree, Trees
from polyclinic.tasks.dpsgd import add_noise

BELOW = "m/~clip/below"  # whether a site's reply was below the bound, less one half


@dataclass(frozen=True)
class Clip(Transform):
    """Scales a reply, all its parts together, down to Euclidean norm ``bound``."""

    bound: float

    uniform: ClassVar[bool] = True
    private: ClassVar[bool] = True

    def problems(self, before: tuple[Transform, ...], after: tuple[Transform, ...]) -> list[str]:
        """A bound must be a number above 0."""
        return [] if 0 < self.bound < math.inf else [f"Clip: bound must be a number above 0, not {self.bound}"]

    def notes(self, state: Trees) -> Trees:
        """The bound, which ``Gaussian`` needs to know."""
        return {"clip": {"bound": torch.tensor(self.bound, dtype=torch.float64)}}

    def encode(self, sent: Mean, notes: Trees, memory: Trees, site: Site, round: int) -> tuple[Mean, Trees]:
        """min(1, bound / ‖x‖) · x"""
        return Mean(_clipped(sent.total, self.bound)[0], sent.weight), memory


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

    def settle(self, after: tuple[Transform, ...]) -> Transform:
        """With ``count_noise`` chosen."""
        if self.count_noise is not None:
            return self
        multiplier = after[0].multiplier if after and isinstance(after[0], Gaussian) else 0.0
        return replace(self, count_noise=multiplier / (2 * (1 - 1.05**-2) ** 0.5))

    def problems(self, before: tuple[Transform, ...], after: tuple[Transform, ...]) -> list[str]:
        """A bound above 0, a quantile in between, and noise on the count that leaves some for the rest."""
        found = []
        if not 0 < self.start < math.inf:
            found.append(f"AdaptiveClip: start must be a number above 0, not {self.start}")
        if not 0 < self.quantile < 1:
            found.append(f"AdaptiveClip: quantile must be between 0 and 1, not {self.quantile}")
        follows = after[0] if after and isinstance(after[0], Gaussian) else None
        if follows and not 2 * (self.count_noise or 0.0) > follows.multiplier:
            found.append(f"AdaptiveClip: count_noise must be above {follows.multiplier / 2:g}, half the multiplier of "
                         "Gaussian, or the count alone spends the budget")  # fmt: skip
        return found

    def init(self, params: Tree) -> Trees:
        """The first bound."""
        return {"clip": {"bound": torch.tensor(self.start, dtype=torch.float64)}}

    def notes(self, state: Trees) -> Trees:
        """The bound, and the noise on the count."""
        count_noise = torch.tensor(self.count_noise or 0.0, dtype=torch.float64)
        return {"clip": {"bound": state["clip"]["bound"], "count_noise": count_noise}}

    def encode(self, sent: Mean, notes: Trees, memory: Trees, site: Site, round: int) -> tuple[Mean, Trees]:
        """The clipped reply, and whether it was below the bound, less one half (section 2.2's b − ½)."""
        clipped, size = _clipped(sent.total, bound := float(notes["clip"]["bound"]))
        below = torch.tensor([0.5 if size <= bound else -0.5])
        return Mean({**clipped, BELOW: below}, sent.weight), memory

    def decode(self, received: Mean, state: Trees) -> tuple[Mean, Trees]:
        """C ← C · exp(−η (b̃ − γ))"""
        share = float(received.total[BELOW]) / received.weight + 0.5
        bound = state["clip"]["bound"] * math.exp(-self.rate * (min(max(share, 0.0), 1.0) - self.quantile))
        rest = {name: leaf for name, leaf in received.total.items() if name != BELOW}
        return Mean(rest, received.weight), {"clip": {"bound": bound}}


@dataclass(frozen=True)
class Gaussian(Transform):
    """Adds normal noise from the operating system, of deviation ``multiplier`` times the clipping bound.

    Alone, each site adds all of it, and is protected from the server too. Under ``SecureSum`` nobody sees less
    than a sum, so ``share`` sites may add one part each.

    Attributes:
        multiplier: z, the deviation of the noise over the bound. ``polyclinic privacy plan`` finds it.
        share: How many sites' noise is in every sum at the least: the threshold of secure summation, less the
            sites that might work together against another. Each adds noise of variance (z · bound)² / share.
    """

    multiplier: float
    share: int = 1

    uniform: ClassVar[bool] = True
    private: ClassVar[bool] = True

    def problems(self, before: tuple[Transform, ...], after: tuple[Transform, ...]) -> list[str]:
        """Noise hides what is bounded, and a part of the noise hides nothing until it is summed."""
        found = []
        if not 0 < self.multiplier < math.inf:
            found.append(f"Gaussian: multiplier must be a number above 0, not {self.multiplier}; without noise, leave "
                         "Gaussian out and claim no privacy")  # fmt: skip
        if not before or not isinstance(before[-1], Clip | AdaptiveClip):
            found.append("Gaussian must come directly after Clip or AdaptiveClip: noise hides only what is bounded")
        if self.share < 1:
            found.append(f"Gaussian: share counts sites, so it is at least 1, not {self.share}")
        if self.share > 1 and not any(t.secure for t in after):
            found.append("Gaussian(share=...) must be followed by SecureSum: without it the server sees replies that "
                         "hold only a part of the noise")  # fmt: skip
        return found

    def encode(self, sent: Mean, notes: Trees, memory: Trees, site: Site, round: int) -> tuple[Mean, Trees]:
        """Adds N(0, (z · bound)² / share), and rounds to a grid of 2⁻²⁰ deviations."""
        clip, dice, z = notes["clip"], site.secret_rng(), self.multiplier
        if count_noise := float(clip.get("count_noise", 0.0)):
            # Andrew et al., section 2.2: z_Δ = (z⁻² − (2 σ_b)⁻²)^(−1/2)
            z = (self.multiplier**-2 - (2 * count_noise) ** -2) ** -0.5
        deviation = z * float(clip["bound"])  # of the whole noise, of which this site adds a share
        refuse_variances(sent.total)
        for name, leaf in sent.total.items():
            if leaf.numel() and not leaf.is_floating_point():
                raise ValueError(f"Gaussian cannot hide integers, and {name} holds {leaf.dtype}")
        deviations = {name: count_noise if name == BELOW else deviation for name in sent.total}

        def noise(value: Tree) -> Tree:
            return {name: add_noise(leaf, deviations[name] / self.share**0.5, dice) for name, leaf in value.items()}

        noisy = hidden(Use(sent.total, spend := Spend(self.multiplier), deviations), noise)
        meter(spend)
        return Mean(noisy, sent.weight), memory

    def decode(self, received: Mean, state: Trees) -> tuple[Mean, Trees]:
        """The sum as it is, if it holds the noise that was counted on."""
        if self.share > 1 and received.weight < self.share - 0.5:
            raise ValueError(f"this sum holds the noise of {received.weight:g} sites, and {self.share} were counted "
                             "on: it protects less than it says. Raise SecureSum's threshold")  # fmt: skip
        return received, state


def refuse_variances(sent: Tree) -> None:
    """Raises where noise would make a running variance negative, and the model useless without a word.

    Raises:
        ValueError: Naming the tensor and what to do.
    """
    if found := next((name for name in sent if "running_var" in name), None):
        raise ValueError(f"{found} is a variance of batch normalisation, which noise would make negative: build the "
                         'network with the option norm = "group", or keep the statistics at the sites '
                         "(silobn, fedbn)")  # fmt: skip


def _clipped(a: Tree, bound: float) -> tuple[Tree, float]:
    """``a`` scaled down to norm ``bound``, and the norm that it had."""
    size = tree.norm(a)
    if not math.isfinite(size):
        raise ValueError("what this site would send holds NaN or an infinity, which no bound can clip: "
                         "lower the learning rate")  # fmt: skip
    # A little below the bound, so that rounding to single precision cannot carry it above.
    return (tree.scale(a, bound / size * (1 - 2.0**-20)) if size > bound else a), size
