"""FedMix: segmentation from sites that are annotated by masks, by boxes, by image labels, or not at all.

Wicaksana, Yan, Zhang, Huang, Wu, Yang and Cheng, "FedMix: Mixed Supervised Federated Learning for Medical Image
Segmentation", IEEE TMI 42(7):1955, 2023, https://arxiv.org/abs/2205.01840, with the official settings
(https://github.com/Jwicaksana/FedMix). A round takes two requests, so that the server receives sums alone: sites first
send the number of examples used and the loss, then their change with the weight that follows from the sums. Departures:
masks are not refined further; empty ones are used only if an image is labeled as empty; sites predict with the
first network.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.method import Capabilities, Job, Method, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.batch import Batch
from polyclinic.learning.tasks.example_pool import endless, size, unlabeled
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.semi_supervised.mixed_annotations import ROLES, MixedSegmentation, Tally


@savable("fedmix.State", 1)
class State(NamedTuple):
    """Both networks; and between the two requests of a round, ``Σ n`` and ``Σ loss^β``."""

    round: int
    twins: Tree
    totals: Tree

    @property
    def params(self) -> Tree:
        """The first network."""
        return tree.under("first", self.twins)


@dataclass(frozen=True)
class FedMix(Method[State]):
    """Two networks teach each other where annotation is weak; a site's weight grows with its loss.

    Masks have the role ``train``, boxes ``boxed``, image labels ``tagged``, and bare images ``unlabeled``.

    Attributes:
        agree: ε, the least Dice between the two networks' masks for them to be used; 0.9.
        inside: The least Dice between a mask and its box; 0.5.
        by_loss: λ, the weight of a site's share of the loss, relative to its share of the examples; 10.
        power: β, the exponent of the loss; 1.5.
    """

    task: Task
    local: LocalTraining = LocalTraining()
    agree: float = 0.9
    inside: float = 0.5
    by_loss: float = 10.0
    power: float = 1.5

    capabilities = Capabilities(uniform=False)

    @property
    def mixed(self) -> MixedSegmentation:
        """The two networks' task."""
        return MixedSegmentation(self.task, self.agree, self.inside)

    def init(self, params: Tree) -> State:
        second = self.task.first(1)
        return State(0, {**tree.prefixed("first", params), **tree.prefixed("second", second)}, {})

    @property
    def jobs(self) -> tuple[Job, ...]:
        return Job("train"), Job("weigh")

    def request(self, state: State) -> Request:
        if state.totals:
            return Request(state.round, {"totals": state.totals}, "weigh")
        return Request(state.round, {"twins": state.twins})

    def evaluation_request(self, state: State) -> Request:
        return Request(state.round, {"twins": state.twins})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        if request.job == "weigh" and "own" not in memory:
            return Reply(), memory  # the site was lost before it sent its numbers
        if request.job == "weigh":
            own, total, change = memory["own"], request.trees["totals"], memory["change"]
            # w_i = n_i / Σ n + λ loss_i^β / Σ loss^β
            weight = float(
                own["used"] / total["used"].clamp_min(1) + self.by_loss * own["loss"] / total["loss"].clamp_min(1e-12)
            )
            kept = {name: leaves for name, leaves in memory.items() if name not in ("own", "change")}
            return Reply({"update": WeightedMean.of(change, weight)}), kept
        start, tally = request.trees["twins"], Tally()
        end = self._trained(start, site, request.round, tally)
        loss = (tally.loss / tally.used) ** self.power if tally.used else 0.0
        own = {"used": torch.tensor(float(tally.used)), "loss": torch.tensor(loss)}
        return Reply({"tally": WeightedMean.of(own)}), {**memory, "own": own, "change": tree.sub(end, start)}

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        if not state.totals:
            return state._replace(totals=reply.mean("tally").total)
        return State(state.round + 1, reply.applied("update", state.twins), {})

    def site_model(self, request: Request, memory: Trees) -> Tree:
        return tree.under("first", request.trees["twins"])

    def _trained(self, start: Tree, site: Site, round: int, tally: Tally) -> Tree:
        """Return both networks after training on all of the site's roles, for an epoch of the largest.

        Of weak annotations, the received networks' masks are used.
        """
        mixed, held = self.mixed, dict[str, Any]()
        for role in (role for role in ROLES if size(site.data, role)):
            data = unlabeled(site.data) if role == "unlabeled" else site.data[role]
            held[role] = data if role == "train" else mixed.masked(role, start, data, site.device)
        roles = sorted((role for role in held if len(held[role])), key=lambda role: -len(held[role]))
        streams = {role: endless(self.local, held[role], site.rng(round, role), site.device) for role in roles[1:]}

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            value = mixed.loss_of(roles[0], model, batch, tally)
            for role, stream in streams.items():
                value = value + mixed.loss_of(role, model, next(stream), tally)
            return value

        return self.local.fit(mixed, start, site, round, data=held[roles[0]] if roles else (), loss=loss)
