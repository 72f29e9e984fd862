"""FCL: contrastive learning for volumes, in which slices at the same position of the body are positives.

Wu, Zeng, Wang, Shi and Hu, "Federated Contrastive Learning for Volumetric Medical Image Segmentation", MICCAI 2021,
https://arxiv.org/abs/2204.10983: momentum contrast of a U-Net's encoder; sites exchange features of slices, so that
each compares with all; slices in the same partition of their volumes are positives, within a site and across sites
(global structural matching); few labels then suffice. The exact loss was not available: all keys of a slice's partition
are its positives, every other key a negative, in one InfoNCE. Positions come with the data, as ``positions`` from 0 to
1; without them each slice is its own only positive.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from polyclinic.core import tree
from polyclinic.core.aggregates import PerSite, Reply, WeightedMean
from polyclinic.core.method import Capabilities, Method, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import DataError
from polyclinic.learning.batch import Batch
from polyclinic.learning.networks.model_momentum import follow_
from polyclinic.learning.networks.model_tree import cached_model
from polyclinic.learning.objectives.contrastive import Contrast, alike, extended, nce, partitions
from polyclinic.learning.tasks.example_pool import all_inputs
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.augmentation import STRONG
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.base.phases import Then, share_of
from polyclinic.methods.optimization.fedavg import FedAvg


@savable("fcl.State", 1)
class State(NamedTuple):
    """The network with its projection, and the features that each site last sent."""

    round: int
    whole: Tree
    features: dict[str, Tree]

    @property
    def params(self) -> Tree:
        """The study's network alone."""
        return tree.under("backbone", self.whole)


@dataclass(frozen=True)
class FCL(Method[State]):
    """Sites contrast slices by their position in the body, with their own volumes and with other sites' features.

    Attributes:
        contrast: The network with its projection, and the temperature.
        parts: Number of partitions of a volume; 4.
        queue: Number of a site's earlier keys in the contrast.
        exchange: Number of features of single slices that a site sends in a round.
        keep: Momentum of the key encoder.
    """

    contrast: Contrast
    local: LocalTraining = LocalTraining()
    parts: int = 4
    queue: int = 512
    exchange: int = 64
    keep: float = 0.99

    capabilities = Capabilities(needs_each_reply=True)

    def init(self, params: Tree) -> State:
        return State(0, extended(self.contrast, params), {})

    def request(self, state: State) -> Request:
        features = {f"{name}/{leaf}": x for name, found in state.features.items() for leaf, x in found.items()}
        return Request(state.round, {"whole": state.whole, "features": features})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start, data, rng = request.trees["whole"], all_inputs(site.data), site.rng(request.round, "views")
        key, place = cached_model(self.contrast, start, site.device, "key"), partitions(data.parts, self.parts)
        if len(place) and not bool((place >= 0).any()):
            raise DataError(
                f"fcl compares slices at the same height, and no image of site {site.name!r} has one: set position in "
                "[data], use volumes that are cut into slices, or choose fedmoco"
            )
        nothing = {"keys": torch.zeros(0, self.contrast.width), "places": torch.zeros(0, dtype=torch.long)}
        queue, remote = dict(memory.get("queue", nothing)), self._others(request.trees["features"], site.name, nothing)

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            q, here = self.contrast.embed(model, STRONG.view(batch[0], rng)), place[batch[1].cpu()]
            with torch.no_grad():
                k = self.contrast.embed(key, STRONG.view(batch[0], rng))
            keys = torch.cat([k, queue["keys"].to(k), remote["keys"].to(k)])
            positive = alike(here, torch.cat([here, queue["places"], remote["places"]]))
            positive[:, : len(k)].fill_diagonal_(1)  # a slice is its own positive
            queue["keys"] = torch.cat([queue["keys"], k.cpu()])[-self.queue :]
            queue["places"] = torch.cat([queue["places"], here])[-self.queue :]
            return nce(q @ keys.T / self.contrast.temperature, positive.to(q))

        def after(model: nn.Module) -> None:
            follow_(key, model, self.keep)

        end = self.local.fit(self.contrast, start, site, request.round, data=data, loss=loss, after_step=after)
        some = torch.randperm(len(data), generator=site.rng(request.round, "exchange"))[: self.exchange]
        sent = {"keys": self.contrast.keys(end, data, site.device)[some], "places": place[some]}
        update, features = WeightedMean.of(tree.sub(end, start), float(len(data))), PerSite({site.name: sent})
        return Reply({"update": update, "features": features}), {**memory, "queue": queue}

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        whole = reply.mean("update").apply_to(state.whole)
        return State(state.round + 1, whole, {**state.features, **reply.gather("features")})

    def site_model(self, request: Request, memory: Trees) -> Tree:
        return tree.under("backbone", request.trees["whole"])

    def _others(self, features: Tree, name: str, nothing: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the keys of other sites, and their partitions."""
        sites = sorted({leaf.rpartition("/")[0] for leaf in features} - {name})
        return {leaf: torch.cat([x, *(features[f"{site}/{leaf}"] for site in sites)]) for leaf, x in nothing.items()}


def fcl(
    task: Task,
    local: LocalTraining,
    rounds: int,
    *,
    pretrain: float = 0.5,
    pretrain_lr: float = 0.0,
    width: int = 64,
    temperature: float = 0.1,
    parts: int = 4,
    queue: int = 512,
    exchange: int = 64,
    keep: float = 0.99,
) -> Then:
    """Compose the contrast, for the first share ``pretrain`` of the rounds, with FedAvg on labels.

    Args:
        pretrain: The share of the rounds in which images are contrasted, labeled or not, without their labels.
        pretrain_lr: The learning rate in those rounds; 0 for that of training.
        width: Length of a projection.
        temperature: τ of the contrast.
        parts: Number of partitions of a volume; 4.
        queue: Number of a site's earlier keys in the contrast.
        exchange: Number of features of single slices that a site sends in a round.
        keep: Momentum of the key encoder.
    """
    first = replace(local, lr=pretrain_lr or local.lr)
    contrast = FCL(Contrast(task, width, temperature), first, parts, queue, exchange, keep)
    return Then(contrast, FedAvg(task, local), share_of(rounds, pretrain))
