"""A lower bound on ε from a single run with canaries, to test whether a private release has the claimed privacy.

Steinke, Nasr and Jagielski, "Privacy Auditing with One (1) Training Run", NeurIPS 2023, Theorem 5.2 and Algorithm 1,
https://arxiv.org/abs/2305.08846. A coin decides for each canary whether it is included. The auditor then guesses the
coins of the canaries about which it is most certain, from the release alone. (ε, δ)-privacy limits how often guesses
are right, so a higher success rate shows a larger ε. The bound is loose, often a third of the true ε.

The number of guesses must not be chosen by their success. ``lower_bound`` tries the fixed fractions ``SHARES`` and
divides the error probability among them, so that the largest result is a valid bound.

Canaries here are random unit vectors added to the sum, as in Andrew, Kairouz, Oh, Oprea, McMahan and Suriyakumar,
"One-shot Empirical Privacy Estimation for Federated Learning", ICLR 2024, https://arxiv.org/abs/2302.03098, whose
estimate is not a bound and is omitted. ``private_training_canaries`` includes canaries in DP-SGD.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import expit
from torch import Tensor

SHARES = (0.1, 0.3, 0.9)
"""Fractions of canaries about which ``lower_bound`` guesses: few with much noise, most without noise.

Not all, because equally many are guessed in and out, while coins are not exactly balanced."""


@dataclass(frozen=True)
class Guesses:
    """The success of an auditor's guesses.

    Attributes:
        canaries: m, the number of canaries, each with a coin.
        guessed: r, the number of guesses.
        right: v, the number of right guesses.
    """

    canaries: int
    guessed: int
    right: int

    def __post_init__(self) -> None:
        if not 0 <= self.right <= self.guessed <= self.canaries:
            raise ValueError(f"invalid counts: {self.right} right of {self.guessed} guesses, {self.canaries} canaries")

    def p_value(self, epsilon: float, delta: float) -> float:
        """Return the largest probability of at least v right guesses under (ε, δ)-privacy.

        ``p ≤ β + 2 m δ α``, ``β = P[B ≥ v]``, ``α = max_i P[v > B ≥ v − i] / i``, ``B ~ Binomial(r, e^ε / (e^ε + 1))``.
        """
        from scipy.stats import binom  # slow to import, and not needed to show results

        m, r, v = self.canaries, self.guessed, self.right
        q = float(expit(epsilon))
        beta = float(binom.sf(v - 1, r, q))
        within = np.cumsum(binom.pmf(np.arange(v - 1, -1, -1), r, q))  # P[v > B ≥ v − i] for i = 1 … v
        alpha = float(np.max(within / np.arange(1, v + 1), initial=0.0))
        return min(1.0, beta + 2 * m * delta * alpha)

    def at_least(self, delta: float, confidence: float = 0.95) -> float:
        """Return a lower bound on ε that holds with ``confidence``; 0 if nothing is shown."""
        if not 0 <= delta < 1 or not 0 < confidence < 1:
            raise ValueError(f"delta = {delta} and confidence = {confidence} must be probabilities")
        low, high = 0.0, 1.0
        while high < 64 and self.p_value(high, delta) < 1 - confidence:
            low, high = high, 2 * high
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if self.p_value(middle, delta) < 1 - confidence else (low, middle)
        return low


def lower_bound(scores: Tensor, inside: Tensor, delta: float, confidence: float = 0.95) -> float:
    """Return the largest of the lower bounds on ε over ``SHARES``, which holds with ``confidence``.

    Args:
        scores: [m], larger if the auditor is more certain that a canary is included.
        inside: The coins, bool [m].
        delta: δ of the claim.
        confidence: Confidence level of the bound.
    """
    each = 1 - (1 - confidence) / len(SHARES)
    return max(guess(scores, inside, share).at_least(delta, each) for share in SHARES)


def needed(epsilon: float, delta: float, confidence: float = 0.95) -> int | None:
    """Return the number of canaries with which ``lower_bound`` exceeds ``epsilon`` by a tenth without noise.

    Returns:
        50, 100, 200, ..., 12,800; None if none of these suffices, since ``delta`` counts once for each canary.
    """
    each = 1 - (1 - confidence) / len(SHARES)
    for count in (50, 100, 200, 400, 800, 1600, 3200, 6400, 12800):
        right = 2 * int(count * max(SHARES) / 2)
        if Guesses(count, right, right).at_least(delta, each) > 1.1 * epsilon:
            return count
    return None


def guess(scores: Tensor, inside: Tensor, share: float = 0.2) -> Guesses:
    """Guess "in" for the highest ``share`` / 2 of ``scores`` [m], "out" for the lowest, and make no other guesses.

    Args:
        inside: The coins, bool [m].
        share: Fraction of canaries to guess. Choose it in advance: the best of several would not be a bound.
    """
    half = int(len(scores) * share / 2)
    order = scores.argsort()
    right = int(inside[order[len(order) - half :]].sum()) + int((~inside[order[:half]]).sum())
    return Guesses(len(scores), 2 * half, right)


def one_run(
    release: Callable[[Tensor], Tensor],
    size: int,
    canaries: int,
    rng: torch.Generator,
    *,
    bound: float = 1.0,
    others: Tensor | None = None,
    share: float = 0.2,
) -> Guesses:
    """Add about half of ``canaries`` random vectors of length ``bound`` to a sum; guess which from its release.

    Args:
        release: The audited function from a sum [size] to its release, including any noise.
        size: Dimension of the sum. Must be much larger than ``canaries``, so that canaries are nearly orthogonal.
        others: The sum of honest contributions [size], if any.
    """
    vectors = torch.nn.functional.normalize(torch.randn(canaries, size, generator=rng)) * bound
    inside = torch.rand(canaries, generator=rng) < 0.5
    total = vectors[inside].sum(0) + (0 if others is None else others)
    return guess(vectors @ release(total), inside, share)


@dataclass(frozen=True)
class Verdict:
    """The result of one audit, and that of the same release without noise.

    Attributes:
        at_least: The lower bound on ε, with 95 % confidence.
        control: The bound for a release without noise.
        claimed: The accountant's ε, at the same ``delta``.
        delta: δ of both.
        canaries: Number of canaries.
        unit: The unit of protection of the claim.
        rounds: Number of training rounds that the claim and the bound cover; 0 for a single release.
    """

    at_least: float
    control: float
    claimed: float
    delta: float
    canaries: int
    unit: str = "unit"
    rounds: int = 0

    @property
    def holds(self) -> bool | None:
        """Whether the claim holds: False if the bound exceeds it, None if the audit has too little power."""
        if self.control <= 0:
            return None
        if self.at_least > self.claimed:
            return False
        return True if self.control > self.claimed else None

    @property
    def says(self) -> str:
        """The result in sentences."""
        if self.control <= 0:
            return "The audit found nothing even without noise, so it shows nothing: use more canaries."
        after = f", after {self.rounds} round{'' if self.rounds == 1 else 's'}" if self.rounds else ""
        result = (
            f"ε for every {self.unit} is at least {self.at_least:.2f} (95 % confidence, {self.canaries} canaries, "
            f"δ = {self.delta:g}{after}; at least {self.control:.2f} without noise)"
        )
        if self.holds is False:
            return f"{result}: training is less private than the claimed ε = {self.claimed:.2f}."
        if self.holds:
            return f"{result}. This does not contradict the claimed ε = {self.claimed:.2f}, and proves no privacy."
        return (
            f"{result}. The claimed ε = {self.claimed:.2f} is more than this audit shows even without noise, so it "
            f"says nothing about the claim{self._remedy}."
        )

    @property
    def _remedy(self) -> str:
        """The changes that would make the audit strong enough."""
        enough = needed(self.claimed, self.delta)
        if enough is None:
            return f"; at δ = {self.delta:g} no number of canaries would be enough"
        return f"; about {enough:,} canaries would be enough" if enough > self.canaries else ""


def audit(
    release: Callable[[Tensor], Tensor],
    claimed: float,
    delta: float,
    size: int,
    canaries: int,
    rng: torch.Generator,
    *,
    bound: float = 1.0,
) -> Verdict:
    """Audit ``release``, after a control that releases the sum without noise."""
    control = one_run(lambda total: total, size, canaries, rng, bound=bound).at_least(delta)
    bound_on_release = one_run(release, size, canaries, rng, bound=bound).at_least(delta)
    return Verdict(bound_on_release, control, claimed, delta, canaries)
