"""FedCE: a site's weight is its estimated contribution.

Meirui Jiang, Holger Roth, Wenqi Li, Dong Yang, Can Zhao, Vishwesh Nath, Daguang Xu, Qi Dou and Ziyue Xu, "Fair
Federated Medical Image Segmentation via Client Contribution Estimation", CVPR 2023, section 3,
https://arxiv.org/abs/2303.16520. Details follow NVIDIA's published code: similarities are averaged over the rounds so
far; both scores are normalized, at least 10⁻³, and multiplied. Departures: the error of the model without a site is its
loss on the site's training data, so that every kind of task has one; it is sent with the next round's update.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from polyclinic.core import tree
from polyclinic.core.aggregates import PerSiteUniform, Reply
from polyclinic.core.method import Capabilities, Method, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError
from polyclinic.learning.tasks.risk import risk, trained
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.robust.rules.aggregation_rule import Updates


@savable("fedce.State", 1)
class State(NamedTuple):
    """The model, each site's weight (its contribution), and the values from which the weights are computed.

    Attributes:
        without: For each site, the model that the others produced.
        cosines: The sum over rounds of each site's similarity with the others. ``seen``: the number of these rounds.
    """

    round: int
    params: Tree
    weights: dict[str, float]
    without: Trees
    cosines: dict[str, float]
    seen: dict[str, int]


@dataclass(frozen=True)
class FedCE(Method[State]):
    """FedAvg whose site weights grow with the dissimilarity of an update and the loss of the model without the site.

    ``weights`` in the state are the contributions after each round, which a federation may use for credit.

    Attributes:
        mode: How the two scores are combined: ``times`` or ``plus``.
    """

    task: Task
    local: LocalTraining = LocalTraining()
    mode: Literal["times", "plus"] = "times"

    def __post_init__(self) -> None:
        if self.mode not in ("times", "plus"):
            raise ConfigError(f'fedce combines its two scores by mode = "times" or "plus", not "{self.mode}"')

    capabilities = Capabilities(needs_each_reply=True)

    def init(self, params: Tree) -> State:
        return State(0, params, {}, {}, {}, {})

    def request(self, state: State) -> Request:
        each = {name: {"without": model} for name, model in state.without.items()}
        return Request(state.round, {"params": state.params}, per_site=each)

    def evaluation_request(self, state: State) -> Request:
        return Request(state.round, {"params": state.params})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start = request.trees["params"]
        error = risk(self.task, request.trees.get("without", start), site, request.round)
        change = self.local.change(self.task, start, site, request.round)
        sent = {**change, "/error": torch.tensor(error, dtype=torch.float64)}
        return Reply({"update": PerSiteUniform({site.name: sent})}), memory

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        sent = reply.gather("update")
        changes = {site: tree.select(leaves, lambda name: name != "/error") for site, leaves in sent.items()}
        learned = {site: tree.select(change, trained(self.task).__contains__) for site, change in changes.items()}
        old = torch.tensor([state.weights.get(site, 1 / len(sent)) for site in sent], dtype=torch.float64)
        apart = cosines(Updates.of(learned).gram, old / old.sum())
        total = {site: state.cosines.get(site, 0.0) + c for site, c in zip(sent, apart.tolist(), strict=True)}
        seen = {site: state.seen.get(site, 0) + 1 for site in sent}
        unlike = _shares(torch.tensor([1 - total[site] / seen[site] for site in sent], dtype=torch.float64))
        errors = _shares(torch.stack([leaves["/error"] for leaves in sent.values()]))
        w = _shares(unlike * errors if self.mode == "times" else unlike + errors)
        w = w / w.sum()
        updates = Updates.of(changes)
        params = tree.shift(state.params, updates.blend(w))
        without = dict(state.without)
        for i, site in enumerate(sent):
            rest = w.clone().index_fill(0, torch.tensor([i]), 0.0)
            if rest.sum() > 0:
                without[site] = tree.shift(state.params, updates.blend(rest / rest.sum()))
        weights = {**state.weights, **dict(zip(sent, w.tolist(), strict=True))}
        return State(state.round + 1, params, weights, without, {**state.cosines, **total}, {**state.seen, **seen})


def cosines(gram: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the cosine of each update with the weighted mean of the others, from inner products. Shape [K]."""
    along, found = gram @ weights, []
    total = weights @ along
    for i in range(len(weights)):
        w = weights[i]
        # ⟨g_i, m - w_i g_i⟩ / (‖g_i‖ ‖m - w_i g_i‖) with m = Σ w_j g_j
        rest = (total - 2 * w * along[i] + w**2 * gram[i, i]).clamp_min(0).sqrt()
        found.append((along[i] - w * gram[i, i]) / (gram[i, i].sqrt() * rest).clamp_min(1e-300))
    return torch.stack(found)


def _shares(scores: torch.Tensor) -> torch.Tensor:
    """Return scores as shares of their sum, at least 10⁻³ each."""
    total = scores.sum()
    return (scores / total if total > 0 else torch.full_like(scores, 1 / len(scores))).clamp_min(1e-3)
