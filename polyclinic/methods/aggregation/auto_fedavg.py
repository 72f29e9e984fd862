"""Auto-FedAvg: the weights of the mean are learned.

Yingda Xia, Dong Yang, Wenqi Li, Andriy Myronenko, Daguang Xu, Holger Roth and others, "Auto-FedAvg: Learnable Federated
Averaging for Multi-Institutional Medical Image Segmentation", 2021, with softmax weights,
https://arxiv.org/abs/2104.10195.

Departure: in the paper each site receives all models and computes ∂L_val/∂α itself. Here a site receives only their
mean θ(α) and replies with ∇L_val(θ); the server, which has the models, computes ``∂L/∂α_k = ⟨∇L_val(θ), θ_k⟩``. The
result is the same for a K-th of the download and one additional gradient of upload. Batch normalization uses the
statistics of its inputs instead of running ones.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from polyclinic.core import tree
from polyclinic.core.aggregates import WEIGHT, PerSite, PerSiteUniform, Reply, WeightedMean, require_weight
from polyclinic.core.method import Capabilities, Job, Method, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.tasks.risk import full_gradient
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.robust.rules.aggregation_rule import Updates


@savable("auto-fedavg.State", 1)
class State(NamedTuple):
    """The model for the present weights, and the state of learning them.

    Attributes:
        start: The model at the start of the round. ``changes``: each site's change of it, while the weights are
            learned.
        beta: β, by site; the weights are α = softmax(β).
        left: Number of steps of β left in this round.
    """

    round: int
    params: Tree
    start: Tree
    changes: Trees
    beta: dict[str, float]
    left: int

    @property
    def alpha(self) -> dict[str, float]:
        """The weights."""
        soft = torch.tensor(list(self.beta.values()), dtype=torch.float64).softmax(0)
        return dict(zip(self.beta, soft.tolist(), strict=True))


@dataclass(frozen=True)
class AutoFedAvg(Method[State]):
    """FedAvg whose weights follow the gradient of the mean validation loss over sites.

    Attributes:
        rate: Step size of β.
        steps: Number of steps of β each time; each takes one request.
        interval: Number of rounds from one update of the weights to the next.
    """

    task: Task
    local: LocalTraining = LocalTraining()
    rate: float = 1.0
    steps: int = 2
    interval: int = 1

    capabilities = Capabilities(needs_each_reply=True)

    def init(self, params: Tree) -> State:
        return State(0, params, params, {}, {}, 0)

    @property
    def jobs(self) -> tuple[Job, ...]:
        return Job("train"), Job("weigh", count=self.steps, at_start=False)

    def request(self, state: State) -> Request:
        return Request(state.round, {"params": state.params}, "weigh" if state.left else "train")

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start = request.trees["params"]
        if request.job == "weigh":  # a site without validation data has weight 0
            if len(site.data.get("val", ())):
                gradient = WeightedMean.of(full_gradient(self.task, start, site, request.round, "val"))
            else:
                gradient = WeightedMean(tree.zeros(full_gradient(self.task, start, site, request.round)), 0.0)
            return Reply({"gradient": gradient}), memory
        change = self.local.change(self.task, start, site, request.round)
        size = torch.tensor(float(len(site.data["train"])), dtype=torch.float64)
        return Reply({"change": PerSiteUniform({site.name: {**change, WEIGHT: size}})}), memory

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        if state.left:
            gradient, beta = reply.mean("gradient"), state.beta
            if gradient.weight:
                beta = climbed(state.changes, state.beta, gradient.value, self.rate)
            return self._mixed(state._replace(beta=beta, left=state.left - 1))
        sent = reply.gather("change")
        require_weight(PerSite(sent).stated_weights())
        beta = {s: state.beta.get(s, float(leaves[WEIGHT].log())) for s, leaves in sent.items()}  # first α = n_k / n
        changes = {s: tree.select(leaves, lambda name: name != WEIGHT) for s, leaves in sent.items()}
        left = self.steps if state.round % self.interval == 0 else 0
        return self._mixed(state._replace(start=state.params, changes=changes, beta={**state.beta, **beta}, left=left))

    def _mixed(self, state: State) -> State:
        """Return the state with ``θ(α) = start + Σ α_k Δ_k``; the round ends when no step is left."""
        alpha = torch.tensor([state.beta[s] for s in state.changes], dtype=torch.float64).softmax(0)
        state = state._replace(params=tree.shift(state.start, Updates.of(state.changes).blend(alpha)))
        return state if state.left else state._replace(round=state.round + 1, start={}, changes={})


def climbed(changes: Trees, beta: dict[str, float], gradient: Tree, rate: float) -> dict[str, float]:
    """Return β after one step along ``∂L/∂β_k = α_k (∂L/∂α_k − Σ_j α_j ∂L/∂α_j)``, where ``∂L/∂α_k = ⟨∇L, Δ_k⟩``."""
    alpha = torch.tensor([beta[s] for s in changes], dtype=torch.float64).softmax(0)
    slope = torch.tensor([tree.dot(gradient, tree.select(c, gradient.__contains__)) for c in changes.values()]).double()
    step = rate * alpha * (slope - alpha @ slope)
    return {**beta, **{s: beta[s] - float(d) for s, d in zip(changes, step, strict=True)}}
