"""FedA3I: sites whose annotators draw too large or too small count less, and balance each other.

Wu, Sun, Yu, Cheng and Yan, "FedA3I: Annotation Quality-Aware Aggregation for Federated Medical Image Segmentation
against Heterogeneous Annotation Noise", AAAI 2024, Algorithm 1, https://arxiv.org/abs/2312.12838, after the published
code: after a warm-up, the losses just inside and just outside of the annotated structures divide the sites into two
groups, whose weights are equal. Departures: the mixture starts from one division of the sites; the weight of quality
grows from layer to layer, whereas the code counts ten blocks of a U-Net; a group of one site is not left out.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from polyclinic.core import tree
from polyclinic.core.aggregates import PerSiteUniform, Reply
from polyclinic.core.method import Job, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.base.visible_updates import VisibleUpdates
from polyclinic.methods.label_noise.boundary_losses import boundary_losses
from polyclinic.methods.label_noise.two_groups import higher_group
from polyclinic.methods.robust.rules.aggregation_rule import Updates


@savable("feda3i.State", 1)
class State(NamedTuple):
    """The model, and the quality of each site once it is known: weights with the sum 1."""

    round: int
    params: Tree
    quality: dict[str, float]


@dataclass(frozen=True)
class FedA3I(VisibleUpdates[State]):
    """FedAvg whose weights change from numbers of examples, in the first layer, to quality, in the last.

    Attributes:
        rounds: Number of planned rounds.
        warmup: Share of the rounds before the sites are divided; 0.1 in the published code.
        enlarging: The weight of all sites together whose masks are too large; 0.5 in the published code.
    """

    task: Task
    rounds: int
    local: LocalTraining = LocalTraining()
    warmup: float = 0.1
    enlarging: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.warmup < 1 or not 0 <= self.enlarging <= 1:
            raise ConfigError(
                "feda3i: warmup must be a share of the rounds between 0 and 1, and enlarging from 0 to 1, not "
                f"{self.warmup:g} and {self.enlarging:g}"
            )

    @property
    def wait(self) -> int:
        """Number of rounds before the sites are divided."""
        return max(math.ceil(self.warmup * self.rounds), 1)

    def init(self, params: Tree) -> State:
        return State(0, params, {})

    @property
    def jobs(self) -> tuple[Job, ...]:
        return Job("losses", first=self.wait, last=self.wait), Job("train")

    def request(self, state: State) -> Request:
        job = "losses" if state.round == self.wait and not state.quality else "train"
        return Request(state.round, {"params": state.params}, job)

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start = request.trees["params"]
        if request.job == "losses":
            found = boundary_losses(self.task, start, site.data["train"], site.device)
            return Reply({"losses": PerSiteUniform({site.name: {"sides": found}})}), memory
        return self.visible(self.local.change(self.task, start, site, request.round), site), memory

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        if state.round == self.wait and not state.quality:
            found = {site: leaves["sides"] for site, leaves in sorted(reply.gather("losses").items())}
            weights = quality(torch.stack(list(found.values())), self.enlarging).tolist()
            return state._replace(quality=dict(zip(found, weights, strict=True)))
        changes, sizes = self.received(reply)
        known = torch.tensor([state.quality.get(site, 0.0) for site in changes], dtype=torch.float64)
        sizes, known = (w / w.sum() if w.sum() > 0 else torch.full_like(w, 1 / len(w)) for w in (sizes, known))
        moved, layers = dict(state.params), self.layers() if state.quality else {0: list(state.params)}
        for k, names in layers.items():
            alpha = k / max(len(layers) - 1, 1)
            part = {site: tree.select(leaves, names.__contains__) for site, leaves in changes.items()}
            mean = Updates.of(part).blend(alpha * known + (1 - alpha) * sizes)
            moved |= tree.shift(tree.select(moved, names.__contains__), mean)
        return State(state.round + 1, moved, state.quality)

    def layers(self) -> dict[int, list[str]]:
        """Return the tensors of each layer, in the order of the network."""
        found = dict[str, list[str]]()
        for name in self.task.first():
            found.setdefault(name.rpartition(".")[0], []).append(name)
        return dict(enumerate(found.values()))


def quality(table: Tensor, enlarging: float) -> Tensor:
    """Return the weight of each site [K] from its losses [K, 2C], of each class inside and outside.

    A site of the group with higher losses inside draws too large. Within a group, weights fall with the difference.
    """
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(table.shape[1] // 2)
    large, gap = higher_group(table.double() * signs), table[:, 0].double() - table[:, 1].double()
    weights = torch.zeros(len(table), dtype=torch.float64)
    for group, sign, share in ((large, 1.0, enlarging), (~large, -1.0, 1 - enlarging)):
        excess = sign * gap[group]
        if len(excess):
            span = excess.max() - excess.min()
            own = 1 - (excess - excess.min()) / span if span > 0 else torch.ones_like(excess)
            weights[group] = (share if bool(large.any()) and bool((~large).any()) else 1.0) * own / own.sum()
    return weights
