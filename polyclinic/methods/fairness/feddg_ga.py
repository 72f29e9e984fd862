"""FedDG-GA: sites for which the averaged model is worse than their own receive more weight.

Zhang, Xu, Yao, Zhang, Tian and Wang, "Federated Domain Generalization with Generalization Adjustment", CVPR 2023,
equations 7 and 8, https://arxiv.org/abs/2303.13267, after the published code: the gap is the validation loss of the
averaged model minus that of the site's model before averaging, the weights are clipped to 0...1 and normalized, and the
step size decreases linearly. The gap of a round is sent with the next round's update. Departures: the step is divided
by the number of sites, which is 3 in the code; a site without validation data uses its training data.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from polyclinic.core import tree
from polyclinic.core.aggregates import PerSiteUniform, Reply
from polyclinic.core.method import Capabilities, Method, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError
from polyclinic.learning.tasks.risk import risk
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.robust.rules.aggregation_rule import Updates

GAP, KNOWN = "/gap", "/known"


@savable("feddg-ga.State", 1)
class State(NamedTuple):
    """The model, and each site's weight."""

    round: int
    params: Tree
    weights: dict[str, float]


@dataclass(frozen=True)
class FedDGGA(Method[State]):
    """FedAvg whose site weights follow ``a_i ← a_i + d · g_i / max_j |g_j|``, g being the gap of the site.

    Attributes:
        sites: The training sites.
        rounds: Number of planned rounds, over which the step decreases to 0.
        step: The step size d in the first round, times the number of sites; 0.2 in the paper.
    """

    task: Task
    sites: tuple[str, ...]
    rounds: int
    local: LocalTraining = LocalTraining()
    step: float = 0.2

    capabilities = Capabilities(needs_each_reply=True)

    def __post_init__(self) -> None:
        if not 0 <= self.step <= 1:
            raise ConfigError(f"feddg-ga: step must be between 0 and 1, not {self.step:g}")

    def init(self, params: Tree) -> State:
        return State(0, params, dict.fromkeys(self.sites, 1 / len(self.sites)))

    def request(self, state: State) -> Request:
        return Request(state.round, {"params": state.params})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start, role = request.trees["params"], "val" if len(site.data.get("val", ())) else "train"
        known = "before" in memory and int(memory["before"]["round"]) == request.round - 1
        gap = risk(self.task, start, site, request.round, role) - float(memory["before"]["loss"]) if known else 0.0
        end = self.local.fit(self.task, start, site, request.round)
        told = {GAP: torch.tensor(gap, dtype=torch.float64), KNOWN: torch.tensor(float(known))}
        own = torch.tensor(risk(self.task, end, site, request.round, role), dtype=torch.float64)
        kept = {**memory, "before": {"loss": own, "round": torch.tensor(request.round)}}
        return Reply({"update": PerSiteUniform({site.name: {**tree.sub(end, start), **told}})}), kept

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        sent = reply.gather("update")
        gaps = {site: float(leaves[GAP]) for site, leaves in sent.items() if leaves[KNOWN]}
        step = self.step * max(1 - (state.round - 2) / self.rounds, 0.0)
        weights = adjusted(state.weights, gaps, step / len(self.sites))
        changes = {site: tree.select(leaves, lambda name: name not in (GAP, KNOWN)) for site, leaves in sent.items()}
        w = torch.tensor([weights[site] for site in sorted(sent)], dtype=torch.float64)
        w = w / w.sum() if w.sum() > 0 else torch.full_like(w, 1 / len(w))
        return State(state.round + 1, tree.shift(state.params, Updates.of(changes).blend(w)), weights)


def adjusted(weights: dict[str, float], gaps: dict[str, float], step: float) -> dict[str, float]:
    """Return the weights after a step along the normalized gaps, clipped to 0...1 and with sum 1."""
    largest = max((abs(gap) for gap in gaps.values()), default=0.0)
    if not largest:
        return weights
    moved = {site: min(max(a + step * gaps.get(site, 0.0) / largest, 0.0), 1.0) for site, a in weights.items()}
    total = sum(moved.values())
    return {site: a / total for site, a in moved.items()} if total else weights
