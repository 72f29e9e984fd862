"""Federated averaging of which some layers are averaged within groups of sites only, from no paper of its own.

The common part of FedNorm and of FMTL by disorder. The sums of other groups than a site's own are 0, so that all sites
send the same tensors and the server needs sums alone. A site of no group predicts with the mean of all groups' layers.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.method import Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.base.site_weights import SizeWeighted


@savable("fednorm.State", 1)
class State(NamedTuple):
    """The shared leaves, and the layers of each group."""

    round: int
    shared: Tree
    layers: Trees

    @property
    def params(self) -> Tree:
        """The shared leaves and the mean of all groups' layers."""
        first, *rest = self.layers.values()
        total = tree.copy(first)
        for layers in rest:
            tree.add_(total, layers)
        return {**self.shared, **tree.scale(total, 1 / len(self.layers))}


@dataclass(frozen=True)
class GroupedLayers(SizeWeighted[State]):
    """FedAvg whose grouped layers, weights and statistics alike, are averaged within each group only.

    Attributes:
        task: What sites train.
        sites: The training sites.
        uniform: Whether all sites have equal weight, instead of in proportion to their training examples.
    """

    task: Any
    sites: tuple[str, ...]
    local: LocalTraining = LocalTraining()
    uniform: bool = False

    def __post_init__(self) -> None:
        option, kinds = self.groups
        if kinds and len(kinds) != len(self.sites):
            wanted = f"name one for each of {', '.join(self.sites)}, in this order"
            raise ConfigError(f"{option}: {len(kinds)} for {len(self.sites)} sites; {wanted}")
        if wrong := [kind for kind in kinds if "." in kind]:
            raise ConfigError(f"{option}: {wrong[0]!r} must not contain a full stop")

    @property
    def groups(self) -> tuple[str, tuple[str, ...]]:
        """The name of the option that holds the groups, and the group of each site; one for all if empty."""
        raise NotImplementedError

    def grouped(self, name: str) -> bool:
        """Return whether a leaf is averaged within groups."""
        raise NotImplementedError

    @property
    def group_of(self) -> dict[str, str]:
        """The group of each site."""
        return dict(zip(self.sites, self.groups[1] or ("all",) * len(self.sites), strict=True))

    @property
    def distinct(self) -> tuple[str, ...]:
        """All groups, each once, in order."""
        return tuple(sorted({*self.group_of.values()}))

    def init(self, params: Tree) -> State:
        layers = tree.select(params, self.grouped)
        return State(0, tree.select(params, lambda name: not self.grouped(name)), dict.fromkeys(self.distinct, layers))

    def request(self, state: State) -> Request:
        each = {site: {"layers": state.layers[kind]} for site, kind in self.group_of.items()}
        return Request(state.round, {"params": state.params}, per_site=each)

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start = self.site_model(request, memory)
        change = self.local.change(self.task, start, site, request.round)
        weight, mine = self.site_weight(site), self.group_of[site.name]
        own = tree.scale(tree.select(change, self.grouped), weight)
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
