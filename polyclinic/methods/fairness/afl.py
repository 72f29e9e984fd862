"""Agnostic federated learning: minimize the loss of the worst mixture of sites.

Mehryar Mohri, Gary Sivek and Ananda Theertha Suresh, "Agnostic Federated Learning", ICML 2019, equation 4 and Algorithm
1 (stochastic AFL), https://arxiv.org/abs/1902.00146; a case of distributionally robust optimization. Departure: sites
take several local steps instead of one gradient step, as in Deng, Kamani and Mahdavi (NeurIPS 2020,
https://arxiv.org/abs/2102.12660), and all sites take part.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from polyclinic.core import tree
from polyclinic.core.aggregates import PerSiteUniform, Reply, WeightedMean
from polyclinic.core.method import Capabilities, Method, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.tasks.risk import risk
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining


@savable("afl.State", 1)
class State(NamedTuple):
    """The model w, and λ, the share of each site in the mixture."""

    round: int
    params: Tree
    shares: dict[str, float]


@dataclass(frozen=True)
class AFL(Method[State]):
    """FedAvg whose site weights increase with the loss after every round.

    Attributes:
        sites: The sites of the mixture.
        rate: γ_λ, the step size of the weights.
        lr: Step size of the server along the mean change.
    """

    task: Task
    sites: tuple[str, ...]
    local: LocalTraining = LocalTraining()
    rate: float = 0.1
    lr: float = 1.0

    capabilities = Capabilities(needs_each_reply=True, uniform=False)

    def init(self, params: Tree) -> State:
        return State(0, params, {name: 1 / len(self.sites) for name in sorted(self.sites)})

    def request(self, state: State) -> Request:
        each = {name: {"share": {"λ": torch.tensor(x, dtype=torch.float64)}} for name, x in state.shares.items()}
        return Request(state.round, {"params": state.params}, per_site=each)

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start = request.trees["params"]
        loss = risk(self.task, start, site, request.round)
        end = self.local.fit(self.task, start, site, request.round)
        return Reply(
            {
                "update": WeightedMean.of(tree.sub(end, start), float(request.trees["share"]["λ"])),
                "loss": PerSiteUniform({site.name: {"F": torch.tensor(loss, dtype=torch.float64)}}),
            }
        ), memory

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        names, losses, update = sorted(state.shares), reply.gather("loss"), reply.mean("update")
        # λ ← the projection of λ + γ F(w) onto the simplex. F of a site without a reply counts as 0.
        climbed = [state.shares[n] + self.rate * (float(losses[n]["F"]) if n in losses else 0.0) for n in names]
        shares = dict(zip(names, on_simplex(torch.tensor(climbed, dtype=torch.float64)).tolist(), strict=True))
        params = update.apply_to(state.params, self.lr) if update.weight else state.params
        return State(state.round + 1, params, shares)


def on_simplex(x: Tensor) -> Tensor:
    """Return the point nearest to x [n] whose coordinates are at least 0 and sum to 1.

    Duchi, Shalev-Shwartz, Singer and Chandra, ICML 2008, figure 1.
    """
    ordered = x.sort(descending=True).values
    excess = (ordered.cumsum(0) - 1) / torch.arange(1, len(x) + 1, dtype=x.dtype)
    return (x - excess[ordered > excess][-1]).clamp_min(0)
