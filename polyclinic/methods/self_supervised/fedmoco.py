"""FedMoCo: momentum contrast at each site, with negatives drawn from the feature statistics of other sites.

Dong and Voiculescu, "Federated Contrastive Learning for Decentralized Unlabeled Medical Images", MICCAI 2021,
https://arxiv.org/abs/2109.07504: MoCo, metadata transfer (each site sends the mean and covariance of its features, and
others draw negatives from those Gaussians) and self-adaptive aggregation by representational similarity analysis. The
paper's exact weights were not available. Interpretation: a site's weight is n · ρᵖ, where ρ is the Spearman correlation
between the dissimilarities of its images before and after its training (Kriegeskorte et al., 2008), so that p = 0 is
FedAvg and p > 0 favors sites whose training preserved the shared geometry. The key encoder starts each round, as the
query encoder, from the server's model; only the queue persists.
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
from polyclinic.learning.batch import Batch
from polyclinic.learning.networks.model_momentum import follow_
from polyclinic.learning.networks.model_tree import cached_model
from polyclinic.learning.objectives.contrastive import Contrast, drawn, extended, gaussian, momentum_nce, similarity
from polyclinic.learning.tasks.example_pool import all_inputs
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.augmentation import STRONG
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.base.phases import Then, share_of
from polyclinic.methods.optimization.fedavg import FedAvg


@savable("fedmoco.State", 1)
class State(NamedTuple):
    """The network with its projection, and the Gaussian of each site's features."""

    round: int
    whole: Tree
    gaussians: dict[str, Tree]

    @property
    def params(self) -> Tree:
        """The study's network alone."""
        return tree.under("backbone", self.whole)


@dataclass(frozen=True)
class FedMoCo(Method[State]):
    """Sites contrast their images with each other and with samples from other sites' feature distributions.

    Attributes:
        contrast: The network with its projection, and the temperature.
        queue: Number of a site's earlier keys in the contrast.
        transfer: Number of negatives drawn from each other site's Gaussian at each step; 0 for none.
        keep: Momentum of the key encoder; 0.999 in MoCo, which takes many more steps than a round here.
        power: p, the exponent of the representational similarity in a site's weight.
    """

    contrast: Contrast
    local: LocalTraining = LocalTraining()
    queue: int = 1024
    transfer: int = 64
    keep: float = 0.99
    power: float = 1.0

    capabilities = Capabilities(needs_each_reply=True)

    def init(self, params: Tree) -> State:
        return State(0, extended(self.contrast, params), {})

    def request(self, state: State) -> Request:
        gaussians = {f"{name}/{leaf}": x for name, found in state.gaussians.items() for leaf, x in found.items()}
        return Request(state.round, {"whole": state.whole, "gaussians": gaussians})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start, data, rng = request.trees["whole"], all_inputs(site.data), site.rng(request.round, "views")
        key = cached_model(self.contrast, start, site.device, "key")
        queue = memory.get("queue", {}).get("keys", torch.zeros(0, self.contrast.width)).to(site.device)
        others = self._others(request.trees["gaussians"], site.name)

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            nonlocal queue
            q = self.contrast.embed(model, STRONG.view(batch[0], rng))
            with torch.no_grad():
                k = self.contrast.embed(key, STRONG.view(batch[0], rng))
                foreign = [drawn(of, self.transfer, rng).to(q) for of in others.values()] if self.transfer else []
            found = momentum_nce(q, k, torch.cat([queue, *foreign]), self.contrast.temperature)
            queue = torch.cat([queue, k])[-self.queue :]
            return found

        def after(model: nn.Module) -> None:
            follow_(key, model, self.keep)

        end = self.local.fit(self.contrast, start, site, request.round, data=data, loss=loss, after_step=after)
        before, now = (self.contrast.keys(params, data, site.device) for params in (start, end))
        some = torch.randperm(len(data), generator=site.rng(request.round, "similarity"))[:64]
        weight = len(data) * max(similarity(before[some], now[some]), 0.01) ** self.power
        update, features = WeightedMean.of(tree.sub(end, start), weight), PerSite({site.name: gaussian(now)})
        return Reply({"update": update, "features": features}), {**memory, "queue": {"keys": queue.cpu()}}

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        whole = reply.mean("update").apply_to(state.whole)
        found = {name: leaves for name, leaves in reply.gather("features").items() if leaves}
        return State(state.round + 1, whole, {**state.gaussians, **found})

    def site_model(self, request: Request, memory: Trees) -> Tree:
        return tree.under("backbone", request.trees["whole"])

    def _others(self, gaussians: Tree, name: str) -> Mapping[str, Tree]:
        sites = {leaf.rpartition("/")[0] for leaf in gaussians} - {name}
        return {site: {part: gaussians[f"{site}/{part}"] for part in ("mean", "covariance")} for site in sorted(sites)}


def fedmoco(
    task: Task,
    local: LocalTraining,
    rounds: int,
    *,
    pretrain: float = 0.5,
    pretrain_lr: float = 0.0,
    width: int = 64,
    temperature: float = 0.1,
    queue: int = 1024,
    transfer: int = 64,
    keep: float = 0.99,
    power: float = 1.0,
) -> Then:
    """Compose momentum contrast, for the first share ``pretrain`` of the rounds, with FedAvg on labels.

    Args:
        pretrain: The share of the rounds in which images are contrasted, labeled or not, without their labels.
        pretrain_lr: The learning rate in those rounds; 0 for that of training.
        width: Length of a projection.
        temperature: τ of the contrast.
        queue: Number of a site's earlier keys in the contrast.
        transfer: Number of negatives drawn from each other site's Gaussian at each step; 0 for none.
        keep: Momentum of the key encoder.
        power: p, the exponent of the representational similarity in a site's weight; 0 for FedAvg's weights.
    """
    first = replace(local, lr=pretrain_lr or local.lr)
    contrast = FedMoCo(Contrast(task, width, temperature), first, queue, transfer, keep, power)
    return Then(contrast, FedAvg(task, local), share_of(rounds, pretrain))
