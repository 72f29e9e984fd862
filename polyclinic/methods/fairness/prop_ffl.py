"""Proportional fairness between hospitals (Prop-FFL).

S. Maryam Hosseini, Milad Sikaroudi, Morteza Babaie and H. R. Tizhoosh, "Proportionally Fair Hospital Collaborations in
Federated Learning of Histopathology Images", IEEE Transactions on Medical Imaging 42 (2023), 1982-1995,
https://doi.org/10.1109/TMI.2023.3234450.

The paper's own loss was not available. This implements what its title and abstract state: proportional fairness in
the sense of resource allocation, in which hospital k's utility is the distance of its loss from a bound,
``max Σ p_k log(C − F_k(w))``, whose gradient weights site k by ``p_k / (C − F_k)``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from polyclinic.core import tree
from polyclinic.core.aggregates import WEIGHT, PerSite, PerSiteUniform, Reply, WeightedMean, require_weight
from polyclinic.core.method import Job, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError
from polyclinic.learning.tasks.risk import risk
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.base.site_weights import SizeWeighted


@savable("prop-ffl.State", 1)
class State(NamedTuple):
    """The model and, between the two requests of a round, the weight of each site."""

    round: int
    params: Tree
    shares: dict[str, float]


@dataclass(frozen=True)
class PropFFL(SizeWeighted[State]):
    """FedAvg in which a hospital's weight grows as its loss approaches the highest; two requests per round.

    Each site first sends the loss of the model on its data, one number; then it trains and is weighted accordingly.

    Attributes:
        margin: C, the bound on losses, in multiples of the highest. Values near 1 give the worst site most of the
            weight.
        lr: Step size of the server along the mean change.
        uniform: Whether p_k is equal for all sites, instead of proportional to their training examples.
    """

    task: Task
    local: LocalTraining = LocalTraining()
    margin: float = 1.1
    lr: float = 1.0
    uniform: bool = False

    def __post_init__(self) -> None:
        if not self.margin > 1:
            raise ConfigError(f"margin must be above 1, so that no site's loss reaches the bound, not {self.margin}")

    needs_each_reply = True

    def init(self, params: Tree) -> State:
        return State(0, params, {})

    @property
    def jobs(self) -> tuple[Job, ...]:
        return Job("loss"), Job("train")

    def request(self, state: State) -> Request:
        if not state.shares:
            return Request(state.round, {"params": state.params}, job="loss")
        each = {name: {"share": {"a": torch.tensor(a, dtype=torch.float64)}} for name, a in state.shares.items()}
        return Request(state.round, {"params": state.params}, per_site=each, recipients=tuple(state.shares))

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start, size = request.trees["params"], self.site_weight(site)
        if request.job == "loss":
            numbers = {"F": risk(self.task, start, site, request.round), WEIGHT: size}
            sent = {name: torch.tensor(x, dtype=torch.float64) for name, x in numbers.items()}
            return Reply({"loss": PerSiteUniform({site.name: sent})}), memory
        end = self.local.fit(self.task, start, site, request.round)
        return Reply({"update": WeightedMean.of(tree.sub(end, start), float(request.trees["share"]["a"]))}), memory

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        if not state.shares:
            sent = reply.gather("loss")
            losses, sizes = {name: float(leaves["F"]) for name, leaves in sent.items()}, PerSite(sent).stated_weights()
            require_weight(sizes)
            return state._replace(shares=proportional(losses, sizes, self.margin))
        change = tree.scale(reply.mean("update").value, self.lr)
        return State(state.round + 1, tree.shift(state.params, change), {})


def proportional(losses: Mapping[str, float], sizes: Mapping[str, float], margin: float = 1.1) -> dict[str, float]:
    """Return ``a_k ∝ p_k / (C − F_k)`` with ``C = margin · max F``, normalized to sum to 1."""
    bound = margin * max(losses.values()) + 1e-12
    raw = {name: sizes[name] / (bound - loss) for name, loss in sorted(losses.items())}
    total = sum(raw.values())
    return {name: a / total for name, a in raw.items()}
