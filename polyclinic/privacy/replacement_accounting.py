"""Privacy loss of a unit that is replaced inside a Poisson-sampled one.

``privacy_units`` bounds one step: for ε >= 0 the hockey-stick divergence, in both directions, is at most

    f(ε) = q · δ(log(1 + (exp(ε) - 1) / q)),    δ(ε) = Φ(μ/2 - ε/μ) - exp(ε) Φ(-μ/2 - ε/μ),    μ = 2C / deviation.

A bound for ε >= 0 alone cannot be composed. But a divergence at ε < 0 equals one at -ε with the two outputs exchanged,
``H_ε(P, P') = 1 - exp(ε) + exp(ε) H_-ε(P', P)``, so that f bounds it as well, and the two halves together are the
privacy profile of a pair of distributions that dominates every step in both directions (Yuqing Zhu, Jinshuo Dong and
Yu-Xiang Wang, "Optimal Accounting of Differential Privacy via Characteristic Function", AISTATS 2022,
https://arxiv.org/abs/2106.08567, propositions 8 and 10, theorem 11). Composing the *remove* pair at distance 2C would
not be enough: its loss is bounded below by log(1 - q), and that of a replaced unit is not. See also Christian Lebeda,
Matthew Regehr, Gautam Kamath and Thomas Steinke, "Avoiding Pitfalls for Privacy Accounting of Subsampled Mechanisms
under Composition", 2024, https://arxiv.org/abs/2405.20769.

The profile is discretized from above with straight lines in exp(ε) between the points of a grid ("Connect the Dots",
Vadym Doroshenko, Badih Ghazi, Pritish Kamath, Ravi Kumar and Pasin Manurangsi, PoPETs 2022, algorithm 1,
https://arxiv.org/abs/2207.04380).
"""

import math
from typing import Any

import numpy as np

LARGEST = 200.0  # above this loss per step there is no protection, and the grid would not fit into memory


def profile(epsilons: "np.ndarray[Any, Any]", multiplier: float, rate: float) -> "np.ndarray[Any, Any]":
    """Compute f(ε) for each ε >= 0 of ``epsilons``. Shape [n].

    Args:
        epsilons: ε, from 0 upward.
        multiplier: Standard deviation divided by the distance 2C: 1 / μ.
        rate: q.
    """
    from scipy.special import log_ndtr, ndtr

    inner = epsilons - math.log(rate) + np.log1p(-(1 - rate) * np.exp(-epsilons))  # log(1 + (exp(ε) - 1) / q)
    mu = 1 / multiplier
    values = ndtr(mu / 2 - inner / mu) - np.exp(inner + log_ndtr(-mu / 2 - inner / mu))
    clipped: np.ndarray[Any, Any] = np.clip(rate * values, 0.0, 1.0)
    return clipped


def loss_distribution(multiplier: float, rate: float, steps: int, interval: float) -> Any | None:
    """Return dp-accounting's privacy loss distribution of ``steps`` steps; None if the loss of one is too large.

    Args:
        multiplier: Standard deviation divided by 2C.
        rate: q, below 1.
        steps: Number of steps.
        interval: Spacing of the grid of losses.
    """
    from dp_accounting.pld import pld_pmf, privacy_loss_distribution

    mu = 1 / multiplier
    inner = mu * mu / 2 + 9 * mu  # δ there is below 1e-18
    largest = inner + math.log(rate + (1 - rate) * math.exp(-inner))
    if largest > LARGEST:
        return None
    count = max(2, math.ceil(largest / interval))
    losses = np.arange(count + 1) * interval
    deltas = np.minimum.accumulate(profile(losses, multiplier, rate))
    steps_down = np.diff(deltas)
    grown = math.expm1(interval)
    above = np.empty(count)  # the probabilities of the losses on the grid that are above 0
    above[:-1] = (steps_down[1:] - steps_down[:-1] * math.exp(interval)) / grown
    above[-1] = steps_down[-1] / math.expm1(-interval)
    above = np.maximum(above, 0.0)
    below = (above * np.exp(-losses[1:]))[::-1]  # the same pair, exchanged
    zero = max(0.0, 1 - float(above.sum() + below.sum() + deltas[-1]))
    loss = pld_pmf.DensePLDPmf(interval, -count, np.concatenate([below, [zero], above]), float(deltas[-1]), True)
    return privacy_loss_distribution.PrivacyLossDistribution(loss).self_compose(steps)
