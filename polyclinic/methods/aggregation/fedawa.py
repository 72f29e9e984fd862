"""FedAWA: the server adapts the weights of the sites by the directions of their updates.

Shi, Zhao, Zhang, Zhou, Guo and Chang, "FedAWA: Adaptive Optimization of Aggregation Weights in Federated Learning Using
Client Vectors", CVPR 2025, equations 5 to 8, https://arxiv.org/abs/2503.15842, after the published code: the weights
are the softmax of numbers T, which start as shares of the examples and take steps of Adam; the mean uses the weights
before the last step.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply
from polyclinic.core.method import Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.tasks.risk import trained
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.base.visible_updates import VisibleUpdates
from polyclinic.methods.robust.rules.aggregation_rule import Updates


@savable("fedawa.State", 1)
class State(NamedTuple):
    """The model, and each site's number T."""

    round: int
    params: Tree
    logits: dict[str, float]


@dataclass(frozen=True)
class FedAWA(VisibleUpdates[State]):
    """FedAvg with weights p that minimize ``Σ p_i (1 − cos(w, w_i)) + Σ p_i ‖Δ_i − Σ_j p_j Δ_j‖``.

    Attributes:
        rate: Step size of Adam for the weights; 0.001 in the published code.
        steps: Number of its steps in a round; 1 in the published code.
    """

    task: Task
    local: LocalTraining = LocalTraining()
    rate: float = 1e-3
    steps: int = 1

    def init(self, params: Tree) -> State:
        return State(0, params, {})

    def request(self, state: State) -> Request:
        return Request(state.round, {"params": state.params})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start = request.trees["params"]
        return self.visible(self.local.change(self.task, start, site, request.round), site), memory

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        changes, sizes = self.received(reply)
        shares = (sizes / sizes.sum()).tolist()
        known = {site: state.logits.get(site, share) for site, share in zip(changes, shares, strict=True)}
        learned = trained(self.task).__contains__
        moved = {site: tree.select(change, learned) for site, change in changes.items()}
        old = tree.select(state.params, learned)
        ends = {site: tree.cosine(old, tree.shift(old, change)) for site, change in moved.items()}
        gram, cosine = Updates.of(moved).gram, torch.tensor(list(ends.values()), dtype=torch.float64)
        start = torch.tensor(list(known.values()), dtype=torch.float64)
        p, end = adapted(start, gram, cosine, self.rate, self.steps)
        logits = {**state.logits, **dict(zip(changes, end.tolist(), strict=True))}
        return State(state.round + 1, tree.shift(state.params, Updates.of(changes).blend(p)), logits)


def adapted(logits: Tensor, gram: Tensor, cosine: Tensor, rate: float, steps: int) -> tuple[Tensor, Tensor]:
    """Return the weights before the last step, and T after it.

    Args:
        logits: T [K].
        gram: Inner products ⟨Δ_i, Δ_j⟩ [K, K].
        cosine: cos(w, w_i) [K].
    """
    first, second = torch.zeros_like(logits), torch.zeros_like(logits)
    p = logits.softmax(0)
    for step in range(1, steps + 1):
        T = logits.clone().requires_grad_()
        p = T.softmax(0)
        # ‖Δ_i − Σ_j p_j Δ_j‖² = G_ii − 2 (G p)_i + pᵀ G p
        apart = (gram.diagonal() - 2 * gram @ p + p @ gram @ p).clamp_min(1e-24).sqrt()
        (g,) = torch.autograd.grad((p * (1 - cosine)).sum() + (p * apart).sum(), [T])
        first, second = 0.5 * first + 0.5 * g, 0.999 * second + 0.001 * g.square()
        size = (second / (1 - 0.999**step)).sqrt() + 1e-8
        logits = logits - rate * first / (1 - 0.5**step) / size
    return p.detach(), logits
