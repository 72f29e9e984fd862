"""FedSM: a global model, a personal one for each site, and a selector that says which to trust.

Xu, Li, Guo, Yang, Roth, Hatamizadeh, Zhao, Xu, Huang and Xu, "Closing the Generalization Gap of Cross-Silo Federated
Medical Image Segmentation", CVPR 2022, Algorithm 1 (FedSM-extra) with SoftPull. https://arxiv.org/abs/2203.10144.

Departures. The selector is a small network of ours instead of VGG-11, without normalisation layers, since a site sees
only its own kind of image and they would hide its style. Sites send its full-batch gradient and the server takes the
Adam step, where the paper averages the moments of the sites' own Adams. Updates are weighed by examples.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from polyclinic.core import tree
from polyclinic.core.method import Ask, Method
from polyclinic.core.site import Site
from polyclinic.core.state import savable
from polyclinic.core.stats import Gather, Mean, Reply
from polyclinic.core.tree import Tree, Trees
from polyclinic.methods import fedopt
from polyclinic.methods.fedavg import FedAvg
from polyclinic.tasks.classification import Classification
from polyclinic.tasks.composed import predicting_with
from polyclinic.tasks.local import Local
from polyclinic.tasks.mixture import Selected
from polyclinic.tasks.networks import Network
from polyclinic.tasks.task import Task


@savable("fedsm.State", 1)
class State(NamedTuple):
    """The global model, the selector with its optimiser, and each site's personal model."""

    round: int
    params: Tree
    selector: fedopt.State
    personal: Trees


@dataclass(frozen=True)
class FedSM(Method[State]):
    """Three kinds of model at once; the selector guesses whose images an image resembles, and picks the model.

    Where it is sure, that site's personal model predicts; where it is not, as for a hospital never seen, the global
    one. Personal models are pulled softly towards each other, so that none drifts alone.

    Attributes:
        sites: Who trains, in the order of the selector's outputs.
        pull: λ, what a personal model keeps of itself; the rest is the mean of the others. 0.7 in the published code.
        threshold: γ, how sure the selector must be; 0.9 in the published code.
        width: Of the selector's first layer. ``selector_lr``: the step of its Adam.
    """

    task: Task
    sites: tuple[str, ...]
    local: Local = Local()
    pull: float = 0.7
    threshold: float = 0.9
    width: int = 16
    selector_lr: float = 0.01
    uniform: bool = False

    @property
    def selecting(self) -> Classification:
        """The selector's task: which site is this image from?"""
        inputs, kind = self.task.network.inputs, "mlp" if len(self.task.network.inputs) == 1 else "cnn"
        return Classification(Network(kind, inputs, len(self.sites), (("width", self.width), ("norm", "none"))))

    @property
    def optimiser(self) -> fedopt.FedOpt:
        """Adam at the server, for the selector."""
        return fedopt.FedOpt(self.selecting, rule="adam", lr=self.selector_lr)

    @property
    def predicts(self) -> Task:
        return predicting_with(self.task, Selected(self.task.network, self.selecting.network, self.threshold))

    def init(self, params: Tree) -> State:
        return State(0, params, self.optimiser.init(self.selecting.first()), dict.fromkeys(self.sites, params))

    def ask(self, state: State) -> Ask:
        each = {name: {"personal": model} for name, model in state.personal.items()}
        return Ask(state.round, {"params": state.params, "selector": state.selector.params}, each=each)

    def site_update(self, ask: Ask, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        reply, _ = FedAvg(self.task, self.local, uniform=self.uniform).site_update(ask, memory, site)
        personal = self.local.fit(self.task, ask.trees["personal"], site, ask.round, slot="personal")
        start, here = ask.trees["selector"], Labelled(site.data["train"], self.sites.index(site.name))
        once = Local(epochs=1, batch_size=len(here), lr=1.0)  # one full-batch step of gradient descent: w − ∇
        selector = once.fit(self.selecting, start, site, ask.round, data=here, slot="selector")
        chosen, own = Mean.of(tree.sub(selector, start)), Gather({site.name: personal})
        return Reply({**reply.parts, "selector": chosen, "personal": own}), memory

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        return State(
            state.round + 1,
            reply.mean("update").added_to(state.params),
            self.optimiser.server_update(state.selector, Reply({"update": reply.mean("selector")}), server),
            soft_pull({**state.personal, **reply.gather("personal")}, self.pull),
        )

    def trial(self, state: State) -> Ask:
        own = {f"own.{k}": state.personal[name] for k, name in enumerate(self.sites)}
        return Ask(state.round, {"params": state.params, "selector": state.selector.params, **own})

    def model_at(self, ask: Ask, memory: Trees) -> Tree:
        own = {f"own.{k}": ask.trees[f"own.{k}"] for k in range(len(self.sites))}
        parts = {"shared": ask.trees["params"], "selector": ask.trees["selector"], **own}
        return {name: leaf for part, leaves in parts.items() for name, leaf in tree.prefixed(part, leaves).items()}


@dataclass(frozen=True)
class Labelled:
    """A site's inputs with the site itself as the target."""

    data: Any
    label: int

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.data[index][0], torch.full((len(index),), self.label)


def soft_pull(models: Trees, keep: float) -> Trees:
    """p_i ← λ p_i + (1 − λ)/(K − 1) Σ_{j≠i} p_j. A model alone stays as it is."""
    if len(models) < 2:
        return models
    names, rest = sorted(models), (1 - keep) / (len(models) - 1)
    total = tree.copy(models[names[0]])
    for name in names[1:]:
        tree.add_(total, models[name])
    return {name: tree.zip_with(lambda p, s: (keep - rest) * p + rest * s, models[name], total) for name in names}


def fedsm(
    task: Task, local: Local, sites: tuple[str, ...], *, pull: float = 0.7, threshold: float = 0.9, width: int = 16,
    selector_lr: float = 0.01, uniform: bool = False,
) -> FedSM:  # fmt: skip
    """A global and several personal models, and a selector between them that also serves unseen hospitals."""
    return FedSM(task, sites, local, pull, threshold, width, selector_lr, uniform)
