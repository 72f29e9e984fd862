"""A lower bound on ε from one run, by canaries: is a private release as private as it says?

Steinke, Nasr and Jagielski, "Privacy Auditing with One (1) Training Run", NeurIPS 2023, Theorem 5.2 and Algorithm 1,
https://arxiv.org/abs/2305.08846. A coin decides for each canary whether it goes in; then the auditor guesses, from
what was released alone, of those it is surest about. (ε, δ)-privacy limits how often guesses are right, so a record
better than that shows a larger ε. The bound is loose, often a third of the truth: read it as "at least".

How many guesses to make must not be chosen by their success. ``lower_bound`` tries the few shares of ``SHARES``, fixed
here, and divides the error among them, so that it is a bound whichever is best.

Canaries here are random unit vectors among what is summed, as in Andrew, Kairouz, Oh, Oprea, McMahan and Suriyakumar,
"One-shot Empirical Privacy Estimation for Federated Learning", ICLR 2024, https://arxiv.org/abs/2302.03098, whose
estimate, which is no bound, we leave out. ``private_training`` puts them into DP-SGD.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import expit
from scipy.stats import binom
from torch import Tensor

SHARES = (0.1, 0.3, 0.9)
"""The shares of canaries about which ``lower_bound`` guesses: few where noise hides most, most where it hides none.

Not all, since as many are guessed to be in as out, and coins are not so even."""


@dataclass(frozen=True)
class Guesses:
    """How an auditor did.

    Attributes:
        canaries: m, for each of which a coin was thrown. ``guessed``: r of them. ``right``: v of these.
    """

    canaries: int
    guessed: int
    right: int

    def __post_init__(self) -> None:
        if not 0 <= self.right <= self.guessed <= self.canaries:
            raise ValueError(f"{self.right} right of {self.guessed} guesses about {self.canaries} canaries cannot be")

    def p_value(self, epsilon: float, delta: float) -> float:
        """The largest probability of so many right guesses under (ε, δ)-privacy.

        p ≤ β + 2 m δ α, with β = P[B ≥ v], α = max_i P[v > B ≥ v − i] / i and B ~ Binomial(r, e^ε / (e^ε + 1)).
        """
        m, r, v = self.canaries, self.guessed, self.right
        q = float(expit(epsilon))
        beta = float(binom.sf(v - 1, r, q))
        within = np.cumsum(binom.pmf(np.arange(v - 1, -1, -1), r, q))  # P[v > B ≥ v − i] for i = 1 … v
        alpha = float(np.max(within / np.arange(1, v + 1), initial=0.0))
        return min(1.0, beta + 2 * m * delta * alpha)

    def at_least(self, delta: float, confidence: float = 0.95) -> float:
        """A lower bound on ε that holds with ``confidence``; 0 where nothing was shown."""
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
    """The largest of the lower bounds on ε by ``SHARES``, which holds with ``confidence``.

    Args:
        scores: [m], larger where the auditor is surer that a canary is in.
        inside: The coins, bool [m].
        delta: δ of the claim.
        confidence: Of the bound.
    """
    each = 1 - (1 - confidence) / len(SHARES)
    return max(guess(scores, inside, share).at_least(delta, each) for share in SHARES)


def needed(epsilon: float, delta: float, confidence: float = 0.95) -> int | None:
    """How many canaries ``lower_bound`` needs to exceed ``epsilon`` by a tenth where nothing is hidden.

    Returns:
        50, 100, 200, ..., 12,800; None where no such number is enough, since ``delta`` counts once for each canary.
    """
    each = 1 - (1 - confidence) / len(SHARES)
    for count in (50, 100, 200, 400, 800, 1600, 3200, 6400, 12800):
        right = 2 * int(count * max(SHARES) / 2)
        if Guesses(count, right, right).at_least(delta, each) > 1.1 * epsilon:
            return count
    return None


def guess(scores: Tensor, inside: Tensor, share: float = 0.2) -> Guesses:
    """Guesses "in" of the highest ``share`` / 2 of ``scores`` [m], "out" of the lowest, and nothing of the rest.

    Args:
        inside: The coins, bool [m].
        share: Of canaries to guess about. Choose it before looking: the best of several would not be a bound.
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
    """Puts about half of ``canaries`` random vectors of length ``bound`` into a sum; guesses which from its release.

    Args:
        release: What is audited: from a sum [size] to what leaves, with whatever noise it adds.
        size: How many numbers. Many more than ``canaries``, or they hide one another.
        others: The sum of honest contributions [size], if any.
    """
    vectors = torch.nn.functional.normalize(torch.randn(canaries, size, generator=rng)) * bound
    inside = torch.rand(canaries, generator=rng) < 0.5
    total = vectors[inside].sum(0) + (0 if others is None else others)
    return guess(vectors @ release(total), inside, share)


@dataclass(frozen=True)
class Verdict:
    """What one run shows, beside what it shows of the same release without noise.

    Attributes:
        at_least: The lower bound on ε, with 95 % confidence.
        control: That of a release without noise.
        claimed: ε as the accountant has it, at the same ``delta``.
        delta: δ of both.
        canaries: How many there were.
        unit: Who the claim protects.
        rounds: How many rounds of training the claim and the bound are about; 0 for a single release.
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
        """Whether the claim withstood: False where the bound exceeds it, None where the audit could not have told."""
        if self.control <= 0:
            return None
        if self.at_least > self.claimed:
            return False
        return True if self.control > self.claimed else None

    @property
    def says(self) -> str:
        """The verdict in sentences."""
        if self.control <= 0:
            return "The audit found nothing even where nothing is hidden, so it shows nothing: use more canaries."
        after = f", after {self.rounds} round{'' if self.rounds == 1 else 's'}" if self.rounds else ""
        told = (
            f"ε for every {self.unit} is at least {self.at_least:.2f} (95 % confidence, {self.canaries} canaries, "
            f"δ = {self.delta:g}{after}; at least {self.control:.2f} without noise)"
        )
        if self.holds is False:
            return f"{told}: training is less private than the claimed ε = {self.claimed:.2f}."
        if self.holds:
            return f"{told}. This does not contradict the claimed ε = {self.claimed:.2f}, and proves no privacy."
        return (
            f"{told}. The claimed ε = {self.claimed:.2f} is more than this audit shows even without noise, so it "
            f"says nothing about the claim{self._remedy}."
        )

    @property
    def _remedy(self) -> str:
        """What would make the audit strong enough."""
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
    """Audits ``release``, and first a control that releases the sum as it is."""
    control = one_run(lambda total: total, size, canaries, rng, bound=bound).at_least(delta)
    found = one_run(release, size, canaries, rng, bound=bound).at_least(delta)
    return Verdict(found, control, claimed, delta, canaries)
