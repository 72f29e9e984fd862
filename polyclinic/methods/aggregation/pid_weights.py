"""FedCostWAvg, FedPIDAvg and FedPID: a site's weight grows with the decrease of its loss; entries of FeTS 2021 to 2024.

Mächler, Ezhov, Kofler, Shit, Paetzold, Loehr, Zimmer, Wiestler and Menze, "FedCostWAvg: A new averaging for better
Federated Learning", 2021, equations 1 and 2, https://arxiv.org/abs/2111.08649; Mächler, Ezhov, Shit and Paetzold,
"FedPIDAvg: A PID controller inspired aggregation method for Federated Learning", 2023, equations 2 to 5,
https://arxiv.org/abs/2304.12117; Mächler, Grimberg, Ezhov, Nickel, Shit, Naccache and Paetzold, "FedPID: An Aggregation
Method for Federated Learning", 2024, https://arxiv.org/abs/2411.02152, of which the abstract was available: in place of
a sum of losses, the decrease since the first round. The loss is that of the site's trained model on its examples.

Each term is divided by a sum over sites. As in ``fedmix-weights``, sites therefore first send numbers, which are
summed, and then their weighted changes, so that those of a single site remain hidden under secure summation.
Departures: an increase of the loss counts as no decrease, since a weight cannot be negative; a term whose sum is 0 is
omitted, as in the first round; FedPIDAvg's choice of sites by a Poisson distribution is left to the sampling of sites.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.method import Capabilities, Job, Method, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError
from polyclinic.learning.tasks.risk import risk
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining

WINDOW = 6


@savable("pid-weights.State", 1)
class State(NamedTuple):
    """The model and, between the two requests of a round, the sums over sites."""

    round: int
    params: Tree
    sums: Tree


@dataclass(frozen=True)
class PIDWeights(Method[State]):
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

    task: Task
    local: LocalTraining = LocalTraining()
    alpha: float = 0.45
    beta: float = 0.45
    gamma: float = 0.1
    ratio: bool = False
    since_first: bool = False

    capabilities = Capabilities(uniform=False)

    def __post_init__(self) -> None:
        if min(self.alpha, self.beta, self.gamma) < 0 or not self.alpha:
            raise ConfigError("alpha must be above 0, and beta and gamma at least 0")

    def init(self, params: Tree) -> State:
        return State(0, params, {})

    @property
    def jobs(self) -> tuple[Job, ...]:
        return Job("train"), Job("send", at_start=False)

    def request(self, state: State) -> Request:
        return Request(state.round, {"params": state.params, "sums": state.sums}, "send" if state.sums else "train")

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start = request.trees["params"]
        if request.job == "send" and "change" not in memory:
            return Reply(), memory  # the site was lost before it sent its numbers
        if request.job == "send":
            share = self.weight(memory["amounts"], request.trees["sums"])
            kept = {name: leaves for name, leaves in memory.items() if name not in ("change", "amounts")}
            return Reply({"update": WeightedMean.of(memory["change"], share)}), kept
        end = self.local.fit(self.task, start, site, request.round)
        past = memory["losses"]["last"].tolist() if "losses" in memory else []
        losses = [*past, risk(self.task, end, site, request.round)]
        amounts = self.amounts(len(site.data["train"]), losses)
        last = losses[:1] + losses[1:][-1:] if self.since_first else losses[-WINDOW:]
        kept = {"amounts": amounts, "change": tree.sub(end, start), "losses": {"last": torch.tensor(last).double()}}
        return Reply({"amounts": WeightedMean(amounts, 1.0)}), {**memory, **kept}

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        if not state.sums:
            return state._replace(sums=reply.mean("amounts").total)
        return State(state.round + 1, reply.applied("update", state.params), {})

    def amounts(self, examples: int, losses: list[float]) -> Tree:
        """Return s, k and m of a site with these losses, the newest at the end."""
        now, before = losses[-1], losses[-2] if len(losses) > 1 else None
        drop = 0.0 if before is None else before / max(now, 1e-12) if self.ratio else max(before - now, 0.0)
        total = max(losses[0] - now, 0.0) if self.since_first else sum(losses[-WINDOW:])
        found = {"size": float(examples), "drop": drop, "sum": total}
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in found.items()}

    def weight(self, own: Tree, sums: Tree) -> float:
        """Return a site's weight. The mean divides by the sum of all weights."""
        terms = {"size": self.alpha, "drop": self.beta, "sum": self.gamma}
        return sum(by * float(own[n] / sums[n]) for n, by in terms.items() if float(sums[n]) > 0)
