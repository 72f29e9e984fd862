"""FedSM: a global model, a personal model for each site, and a selector between them.

Xu, Li, Guo, Yang, Roth, Hatamizadeh, Zhao, Xu, Huang and Xu, "Closing the Generalization Gap of Cross-Silo Federated
Medical Image Segmentation", CVPR 2022, Algorithm 1 (FedSM-extra) with SoftPull. https://arxiv.org/abs/2203.10144.

Departures: the selector is a small network instead of VGG-11, without normalization layers, since a site has only its
own kind of image and these layers would remove its style; for bags of features it is a network with attention. Updates
are weighted by examples, those of the selector and of its Adams' moments equally.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from polyclinic.core import tree
from polyclinic.core.aggregates import PerSite, Reply, WeightedMean
from polyclinic.core.method import Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.networks.model_mixture import Selected
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.learning.training.optimizers import Memory, optimizer_memory
from polyclinic.methods.base.site_weights import SizeWeighted
from polyclinic.methods.optimization.fedavg import FedAvg


@savable("fedsm.Selector", 1)
class Selector(NamedTuple):
    """The selector, and the mean of the sites' moments of Adam; empty before the first round."""

    params: Tree
    moments: Tree


@savable("fedsm.State", 2)
class State(NamedTuple):
    """The global model, the selector with its optimizer, and each site's personal model."""

    round: int
    params: Tree
    selector: Selector
    personal: Trees


@dataclass(frozen=True)
class FedSM(SizeWeighted[State]):
    """Three kinds of model: the selector estimates which site an image resembles, and selects the model.

    If its probability exceeds the threshold, that site's personal model predicts; otherwise, as for an unseen hospital,
    the global one. Personal models are averaged softly with each other, which limits overfitting to one site.

    Attributes:
        sites: The training sites, in the order of the selector's outputs.
        pull: λ, the weight of a personal model in its own update; the rest is the mean of the others. 0.7 in the
            published code.
        threshold: γ, the selector's least probability for a personal model; 0.9 in the published code.
        width: Width of the selector's first layer.
        selector_lr: Step size of the selector's Adam.
        uniform: Whether all sites have equal weight, instead of in proportion to their training examples.
    """

    task: Task
    sites: tuple[str, ...]
    local: LocalTraining = LocalTraining()
    pull: float = 0.7
    threshold: float = 0.9
    width: int = 16
    selector_lr: float = 0.01
    uniform: bool = False

    needs_each_reply = True

    @property
    def selecting(self) -> Classification:
        """The selector's task: the site that an image is from."""
        inputs, options = self.task.network.inputs, (("width", self.width), ("norm", "none"))
        if len(inputs) == 2:  # a bag of features
            return Classification(Network("attention-mil", inputs, len(self.sites), options[:1]))
        return Classification(Network("mlp" if len(inputs) == 1 else "cnn", inputs, len(self.sites), options))

    @property
    def prediction_task(self) -> Task:
        return self.task.with_network(Selected(self.task.network, self.selecting.network, self.threshold))

    def init(self, params: Tree) -> State:
        return State(0, params, Selector(self.selecting.first(), {}), dict.fromkeys(self.sites, params))

    def request(self, state: State) -> Request:
        each = {name: {"personal": model} for name, model in state.personal.items()}
        trees = {"params": state.params, "selector": state.selector.params, "moments": state.selector.moments}
        return Request(state.round, trees, per_site=each)

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        reply, _ = FedAvg(self.task, self.local, uniform=self.uniform).site_update(request, memory, site)
        personal = self.local.fit(self.task, request.trees["personal"], site, request.round, slot="personal")
        own = PerSite({site.name: personal})
        return Reply({**reply.parts, "selector": self._selector(request, site), "personal": own}), memory

    def _selector(self, request: Request, site: Site) -> WeightedMean:
        """Return the change of the selector, and its moments, after a round of minibatches with Adam."""
        start, moments = request.trees["selector"], request.trees["moments"]
        labeled = Labeled(site.data["train"], self.sites.index(site.name))
        local = LocalTraining(
            self.local.epochs,
            self.local.batch_size,
            "adam",
            self.selector_lr,
            steps=self.local.steps,
            keep_optimizer=True,
        )
        memory: Memory = {"train/selector": moments}
        with optimizer_memory(memory):
            end = local.fit(self.selecting, start, site, request.round, data=labeled, slot="selector")
        change = tree.prefixed("change", tree.sub(end, start))
        return WeightedMean.of({**change, **tree.prefixed("moments", memory["train/selector"])})

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        mean = reply.mean("selector").value
        return State(
            state.round + 1,
            reply.mean("update").apply_to(state.params),
            Selector(tree.add(state.selector.params, tree.under("change", mean)), tree.under("moments", mean)),
            soft_pull({**state.personal, **reply.gather("personal")}, self.pull),
        )

    def evaluation_request(self, state: State) -> Request:
        own = {f"own.{k}": state.personal[name] for k, name in enumerate(self.sites)}
        return Request(state.round, {"params": state.params, "selector": state.selector.params, **own})

    def site_model(self, request: Request, memory: Trees) -> Tree:
        own = {f"own.{k}": request.trees[f"own.{k}"] for k in range(len(self.sites))}
        parts = {"shared": request.trees["params"], "selector": request.trees["selector"], **own}
        return {name: leaf for part, leaves in parts.items() for name, leaf in tree.prefixed(part, leaves).items()}


@dataclass(frozen=True)
class Labeled:
    """A site's inputs with the site itself as the target."""

    data: Any
    label: int

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.data[index][0], torch.full((len(index),), self.label)


def soft_pull(models: Trees, keep: float) -> Trees:
    """Return ``p_i ← λ p_i + (1 − λ)/(K − 1) Σ_{j≠i} p_j``. A single model is unchanged."""
    if len(models) < 2:
        return models
    names, rest = sorted(models), (1 - keep) / (len(models) - 1)
    total = tree.copy(models[names[0]])
    for name in names[1:]:
        tree.add_(total, models[name])
    return {name: tree.zip_with(lambda p, s: (keep - rest) * p + rest * s, models[name], total) for name in names}
