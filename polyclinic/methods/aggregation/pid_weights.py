"""FedCostWAvg, FedPIDAvg and FedPID: a site's weight grows with the decrease of its loss; entries of FeTS 2021 to 2024.

Mächler, Ezhov, Kofler, Shit, Paetzold, Loehr, Zimmer, Wiestler and Menze, "FedCostWAvg: A new averaging for better
Federated Learning", 2021, equations 1 and 2, https://arxiv.org/abs/2111.08649; Mächler, Ezhov, Shit and Paetzold,
"FedPIDAvg: A PID controller inspired aggregation method for Federated Learning", 2023, equations 2 to 5,
https://arxiv.org/abs/2304.12117; Mächler, Grimberg, Ezhov, Nickel, Shit, Naccache and Paetzold, "FedPID: An Aggregation
Method for Federated Learning", 2024, https://arxiv.org/abs/2411.02152, of which the abstract was available: in place of
a sum of losses, the decrease since the first round. The loss is that of the site's trained model on its examples.

Each term is divided by a sum over sites, so that the numbers of a single site remain hidden under secure summation
(``base.relative_weights``). Departures: an increase of the loss counts as no decrease, since a weight cannot be
negative; a term whose sum is 0 is omitted, as in the first round; FedPIDAvg's choice of sites by a Poisson distribution
is left to the sampling of sites.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from polyclinic.core.tree import Tree
from polyclinic.errors import ConfigError
from polyclinic.methods.base.relative_weights import RelativeWeights, numbers

WINDOW = 6


@dataclass(frozen=True)
class PIDWeights(RelativeWeights):
    """FedAvg with weights ``α s_i / Σ s + β k_i / Σ k + γ m_i / Σ m``.

    s is the number of examples, k the decrease of the loss since the last round (a ratio in FedCostWAvg, a difference
    in the others), and m the sum of the last six losses (FedPID: the decrease since the first round).

    Attributes:
        alpha: α, the weight of the share of examples.
        beta: β, the weight of the share of the decrease.
        gamma: γ, the weight of the share of the sum of losses.
        ratio: Whether the decrease is the ratio of two losses instead of their difference.
        since_first: Whether m is the decrease since the first round.
    """

    alpha: float = 0.45
    beta: float = 0.45
    gamma: float = 0.1
    ratio: bool = False
    since_first: bool = False

    def __post_init__(self) -> None:
        if min(self.alpha, self.beta, self.gamma) < 0 or not self.alpha:
            raise ConfigError("alpha must be above 0, and beta and gamma at least 0")

    def amounts(self, examples: int, losses: Sequence[float]) -> Tree:
        """Return s, k and m of a site with these losses, the newest at the end."""
        now, before = losses[-1], losses[-2] if len(losses) > 1 else None
        drop = 0.0 if before is None else before / max(now, 1e-12) if self.ratio else max(before - now, 0.0)
        total = max(losses[0] - now, 0.0) if self.since_first else sum(losses[-WINDOW:])
        return numbers(size=float(examples), drop=drop, sum=total)

    def kept(self, losses: Sequence[float]) -> Sequence[float]:
        """Return the last six losses, or the first and the last."""
        return [*losses[:1], *losses[1:][-1:]] if self.since_first else losses[-WINDOW:]

    def weight(self, own: Tree, sums: Tree) -> float:
        """Return a site's weight. The mean divides by the sum of all weights."""
        terms = {"size": self.alpha, "drop": self.beta, "sum": self.gamma}
        return sum(by * float(own[n] / sums[n]) for n, by in terms.items() if float(sums[n]) > 0)
