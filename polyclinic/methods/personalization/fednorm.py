"""FedNorm: one model for several modalities, with normalization layers for each.

Bernecker, Peters, Schlett, Bamberg, Theis, Rueckert, Weiß and Albarqouni, "FedNorm: Modality-Based Normalization in
Federated Learning for Multi-Modal Liver Segmentation", 2022. https://arxiv.org/abs/2205.11096.

A site has one modality, as in FedNorm; FedNorm+, where a site may have several, would need to know each image's. The
sums of a modality that is not a site's own are 0, so that every site sends the same form. A site whose modality is not
known predicts with the mean of all modalities' layers.
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
    """What all share, and the normalization layers of each modality."""

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

    With one modality it is FedAvg; with one for each site, FedBN.

    Attributes:
        modality: Of each site, by name.
    """

    task: Task
    modality: tuple[tuple[str, str], ...]
    local: LocalTraining = LocalTraining()
    uniform: bool = False

    @property
    def modalities(self) -> tuple[str, ...]:
        """Each once, in order."""
        return tuple(sorted({kind for _, kind in self.modality}))

    def init(self, params: Tree) -> State:
        inside = InNormalization(self.task)
        layers = tree.select(params, inside)
        return State(0, tree.select(params, lambda name: not inside(name)), dict.fromkeys(self.modalities, layers))

    def request(self, state: State) -> Request:
        each = {site: {"layers": state.layers[kind]} for site, kind in self.modality}
        return Request(state.round, {"params": state.params}, per_site=each)

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start = self.site_model(request, memory)
        change = tree.sub(self.local.fit(self.task, start, site, request.round), start)
        weight, mine = self.site_weight(site), dict(self.modality)[site.name]
        own = tree.scale(tree.select(change, InNormalization(self.task)), weight)
        sums: dict[str, torch.Tensor] = {}
        for kind in self.modalities:
            sums |= tree.prefixed(kind, own if kind == mine else tree.zeros(own))
            sums[f"weight {kind}"] = torch.tensor([weight if kind == mine else 0.0])
        shared = {name: leaf for name, leaf in change.items() if name not in own}
        return Reply({"update": WeightedMean.of(shared, weight), "layers": WeightedMean(sums, 1.0)}), memory

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        sums, layers = reply.mean("layers").total, dict(state.layers)
        for kind in self.modalities:
            if (weight := float(sums[f"weight {kind}"])) > 0:
                layers[kind] = tree.shift(layers[kind], tree.scale(tree.under(kind, sums), 1 / weight))
        return State(state.round + 1, reply.mean("update").apply_to(state.shared), layers)

    def site_model(self, request: Request, memory: Trees) -> Tree:
        return {**request.trees["params"], **request.trees.get("layers", {})}


def fednorm(
    task: Task, local: LocalTraining, sites: tuple[str, ...], *, modalities: tuple[str, ...] = (), uniform: bool = False
) -> FedNorm:
    """FedAvg with normalization layers for each modality; ``modalities`` names each site's, in the sites' order.

    Args:
        modalities: Each site's modality, in the order of the sites' names; one for all where empty.

    Raises:
        ValueError: If there are not as many modalities as sites.
    """
    if modalities and len(modalities) != len(sites):
        wanted = f"name one for each of {', '.join(sites)}, in this order"
        raise ConfigError(f"modalities: {len(modalities)} for {len(sites)} sites; {wanted}")
    if wrong := [kind for kind in modalities if "." in kind]:
        raise ConfigError(f"modalities: {wrong[0]!r} must not contain a full stop")
    return FedNorm(task, tuple(zip(sites, modalities or ("all",) * len(sites), strict=True)), local, uniform)
