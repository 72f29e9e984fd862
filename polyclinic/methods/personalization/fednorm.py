"""FedNorm: one model for several modalities, with separate normalization layers.

Bernecker, Peters, Schlett, Bamberg, Theis, Rueckert, Weiß and Albarqouni, "FedNorm: Modality-Based Normalization in
Federated Learning for Multi-Modal Liver Segmentation", 2022. https://arxiv.org/abs/2205.11096.

A site has one modality, as in FedNorm; FedNorm+, in which a site may have several, would need the modality of each
image. The sums of other modalities than a site's own are 0, so that all sites send the same tensors. A site of unknown
modality predicts with the mean of all modalities' layers.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.method import Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError
from polyclinic.learning.tasks.task import InNormalization, Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.base.site_weights import SizeWeighted


@savable("fednorm.State", 1)
class State(NamedTuple):
    """The shared leaves, and the normalization layers of each modality."""

    round: int
    shared: Tree
    layers: Trees

    @property
    def params(self) -> Tree:
        """The shared leaves and the mean of all modalities' layers."""
        first, *rest = self.layers.values()
        total = tree.copy(first)
        for layers in rest:
            tree.add_(total, layers)
        return {**self.shared, **tree.scale(total, 1 / len(self.layers))}


@dataclass(frozen=True)
class FedNorm(SizeWeighted[State]):
    """FedAvg whose normalization layers, weights and statistics alike, are averaged within each modality only.

    With one modality this is FedAvg; with one per site, FedBN.

    Attributes:
        modalities: The modality of each site, in the order of ``sites``; one for all if empty.
        uniform: Whether all sites have equal weight, instead of in proportion to their training examples.
    """

    task: Task
    sites: tuple[str, ...]
    local: LocalTraining = LocalTraining()
    modalities: tuple[str, ...] = ()
    uniform: bool = False

    def __post_init__(self) -> None:
        if self.modalities and len(self.modalities) != len(self.sites):
            wanted = f"name one for each of {', '.join(self.sites)}, in this order"
            raise ConfigError(f"modalities: {len(self.modalities)} for {len(self.sites)} sites; {wanted}")
        if wrong := [kind for kind in self.modalities if "." in kind]:
            raise ConfigError(f"modalities: {wrong[0]!r} must not contain a full stop")

    @property
    def modality_of(self) -> dict[str, str]:
        """The modality of each site."""
        return dict(zip(self.sites, self.modalities or ("all",) * len(self.sites), strict=True))

    @property
    def distinct(self) -> tuple[str, ...]:
        """All modalities, each once, in order."""
        return tuple(sorted({*self.modality_of.values()}))

    def init(self, params: Tree) -> State:
        inside = InNormalization(self.task)
        layers = tree.select(params, inside)
        return State(0, tree.select(params, lambda name: not inside(name)), dict.fromkeys(self.distinct, layers))

    def request(self, state: State) -> Request:
        each = {site: {"layers": state.layers[kind]} for site, kind in self.modality_of.items()}
        return Request(state.round, {"params": state.params}, per_site=each)

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start = self.site_model(request, memory)
        change = self.local.change(self.task, start, site, request.round)
        weight, mine = self.site_weight(site), self.modality_of[site.name]
        own = tree.scale(tree.select(change, InNormalization(self.task)), weight)
        sums: dict[str, torch.Tensor] = {}
        for kind in self.distinct:
            sums |= tree.prefixed(kind, own if kind == mine else tree.zeros(own))
            sums[f"weight {kind}"] = torch.tensor([weight if kind == mine else 0.0])
        shared = {name: leaf for name, leaf in change.items() if name not in own}
        return Reply({"update": WeightedMean.of(shared, weight), "layers": WeightedMean(sums, 1.0)}), memory

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        sums, layers = reply.mean("layers").total, dict(state.layers)
        for kind in self.distinct:
            if (weight := float(sums[f"weight {kind}"])) > 0:
                layers[kind] = tree.shift(layers[kind], tree.scale(tree.under(kind, sums), 1 / weight))
        return State(state.round + 1, reply.mean("update").apply_to(state.shared), layers)

    def site_model(self, request: Request, memory: Trees) -> Tree:
        return {**request.trees["params"], **request.trees.get("layers", {})}
