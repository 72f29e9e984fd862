"""FedISM: sites where the model is sharpest receive more weight, and all sites train for flat minima.

Wu, Kuang, Yan and Yu, "From Optimization to Generalization: Fair Federated Learning against Quality Shift via
Inter-Client Sharpness Matching", IJCAI 2024, https://arxiv.org/abs/2404.17805, after the published code
(https://github.com/wnn2000/FFL4MIA): sharpness is that of the received model, and local steps are those of GSAM.
Departure: the loss is the study's, whereas the code uses a balanced softmax with all methods.
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
from polyclinic.learning.tasks.risk import full_gradient, risk
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.dp_sgd import refuse_private
from polyclinic.learning.training.local import LocalTraining
from polyclinic.learning.training.sharpness import matched
from polyclinic.methods.robust.rules.aggregation_rule import Updates

SHARPNESS = "/sharpness"


@savable("fedism.State", 1)
class State(NamedTuple):
    """The model, and each site's weight, if it has taken part."""

    round: int
    params: Tree
    weights: dict[str, float]


@dataclass(frozen=True)
class FedISM(Method[State]):
    """FedAvg with weights ``p_k ← β s_k^q / Σ s_j^q + (1 − β) p_k``, s being the shares of sharpness, and GSAM.

    Attributes:
        rho: ρ, the length of the perturbation; 0.05 in the published code.
        surrogate: α, how far a step also lowers the surrogate gap; 0.1 in the published code.
        q: The exponent; 1 in the published code, and 0 for equal weights.
        beta: β, the weight of a round's sharpness in the moving average; 0.5 in the published code.
    """

    task: Task
    local: LocalTraining = LocalTraining()
    rho: float = 0.05
    surrogate: float = 0.1
    q: float = 1.0
    beta: float = 0.5

    capabilities = Capabilities(needs_each_reply=True)

    def __post_init__(self) -> None:
        if self.rho <= 0 or self.surrogate < 0 or self.q < 0 or not 0 < self.beta <= 1:
            raise ConfigError("fedism: rho and beta must be above 0, surrogate and q at least 0, and beta at most 1")
        refuse_private(self.local, "fedism", "the weights are perturbed along the gradient of a minibatch")

    def init(self, params: Tree) -> State:
        return State(0, params, {})

    def request(self, state: State) -> Request:
        return Request(state.round, {"params": state.params})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start = request.trees["params"]
        told = {SHARPNESS: torch.tensor(self.sharpness(start, site, request.round), dtype=torch.float64)}
        loss = matched(self.task.loss, self.rho, self.surrogate)
        change = self.local.change(self.task, start, site, request.round, loss=loss)
        return Reply({"update": PerSiteUniform({site.name: {**change, **told}})}), memory

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        sent = reply.gather("update")
        sharp = torch.tensor([max(float(sent[site][SHARPNESS]), 1e-10) for site in sorted(sent)], dtype=torch.float64)
        shares = (sharp / sharp.sum() + 1e-10) ** self.q
        now, last = dict(zip(sorted(sent), (shares / shares.sum()).tolist(), strict=True)), state.weights
        weights = {**last, **{k: self.beta * p + (1 - self.beta) * last.get(k, p) for k, p in now.items()}}
        w = torch.tensor([weights[site] for site in sorted(sent)], dtype=torch.float64)
        changes = {site: tree.select(leaves, lambda name: name != SHARPNESS) for site, leaves in sent.items()}
        return State(state.round + 1, tree.shift(state.params, Updates.of(changes).blend(w / w.sum())), weights)

    def sharpness(self, params: Tree, site: Site, round: int) -> float:
        """Return ``F_k(w + ρ ∇F_k/‖∇F_k‖) − F_k(w)``, in evaluation mode, and at least 10⁻¹⁰."""
        slope = full_gradient(self.task, params, site, round, training=False)
        step = tree.scale(slope, self.rho / (tree.norm(slope) + 1e-12))
        here, there = (risk(self.task, w, site, round) for w in (params, tree.shift(params, step)))
        return max(there - here, 1e-10)
