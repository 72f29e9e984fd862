"""Asymmetric federated averaging: sites with different networks average the tensors that all of them have.

Skorupko and others, "Federated nnU-Net for privacy-preserving medical image segmentation", Scientific Reports, 2025,
https://doi.org/10.1038/s41598-025-22239-0, after the published code: nnU-Net's plan of a site determines its network,
so that networks differ in strides, kernels or widths. A tensor is common if every site has one with its name and its
shape; all others stay at their site.

Departures: sites are weighted by their number of training examples, or equally, as in the code, with ``uniform``; sites
send changes instead of models; common tensors begin with the same values everywhere.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.method import Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError
from polyclinic.learning.networks.composite import Composed
from polyclinic.learning.networks.model_tree import initial
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.base.site_weights import SizeWeighted


@savable("asym-fedavg.State", 1)
class State(NamedTuple):
    """The common tensors after ``round`` rounds, and the initial values of the others of the study's network."""

    round: int
    common: Tree
    first: Tree

    @property
    def params(self) -> Tree:
        """The study's network: the common tensors, and the others at their initial values."""
        return {**self.first, **self.common}


@dataclass(frozen=True)
class AsymFedAvg(SizeWeighted[State]):
    """FedAvg over the tensors that the networks of all sites have in common.

    Attributes:
        sites: The training sites.
        networks: For sites with another network, the options of the study's network that differ there, such as
            ``{ site-2 = { width = 16 } }``.
        lr: Step size of the server along the mean change; 1 for plain averaging.
        uniform: Whether all sites have equal weight, instead of in proportion to their training examples.
    """

    task: Task
    sites: tuple[str, ...]
    local: LocalTraining = LocalTraining()
    networks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    lr: float = 1.0
    uniform: bool = False

    def __post_init__(self) -> None:
        if unknown := sorted(self.networks.keys() - set(self.sites)):
            raise ConfigError(f"networks: no site is called {unknown[0]!r}; there are {', '.join(self.sites)}")
        if self.networks and not isinstance(self.task.network, Network):
            raise ConfigError("networks: they cannot be combined with start weights, adapters or frozen tensors")

    @property
    def variants(self) -> tuple[Network, ...]:
        """The different networks, the study's first."""
        own: Network = self.task.network
        return tuple(dict.fromkeys([own, *(self.network(site) for site in self.sites)]))

    def network(self, site: str) -> Network:
        """Return the network of a site."""
        own: Network = self.task.network
        if site not in self.networks:
            return own
        options = {**dict(own.options), **{key: _hashable(value) for key, value in self.networks[site].items()}}
        return replace(own, options=tuple(sorted(options.items())))

    @property
    def prediction_task(self) -> Task | None:
        """A task whose model holds all networks, one of which predicts; None if all are the same."""
        if len(self.variants) == 1:
            return None
        return self.task.with_network(Variants(self.task.network, self.variants))

    def init(self, params: Tree) -> State:
        names = common_names(self.variants)
        common = tree.select(params, lambda name: name in names)
        return State(0, common, tree.select(params, lambda name: name not in names))

    def request(self, state: State) -> Request:
        return Request(state.round, {"common": state.common, "first": state.first})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        network, common = self.network(site.name), request.trees["common"]
        own = memory.get("own") or self._own(network, request)
        start = {**own, **common}
        end = self.local.fit(self.task.with_network(network), start, site, request.round)
        update = self.update(tree.select(end, lambda name: name in common), common, site)
        kept = tree.select(end, lambda name: name not in common)
        return Reply({"update": update}), {"own": kept, "which": {"at": torch.tensor(self.variants.index(network))}}

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        mean: WeightedMean = reply.mean("update")
        return state._replace(round=state.round + 1, common=mean.apply_to(state.common, self.lr))

    def site_model(self, request: Request, memory: Trees) -> Tree:
        which = int(memory["which"]["at"]) if memory else 0
        network = self.variants[which]
        own = {**(memory.get("own") or self._own(network, request)), **request.trees["common"]}
        if len(self.variants) == 1:
            return own
        trees = [own if i == which else _initial(variant) for i, variant in enumerate(self.variants)]
        parts = {f"{i}.{name}": leaf for i, one in enumerate(trees) for name, leaf in one.items()}
        return {**parts, "which": torch.tensor(float(which))}

    def _own(self, network: Network, request: Request) -> Tree:
        """Return the tensors of a network that are not common, at their initial values."""
        first = request.trees["first"] if network == self.task.network else _initial(network)
        return {name: leaf for name, leaf in first.items() if name not in request.trees["common"]}


@dataclass(frozen=True)
class Variants(Composed):
    """Several networks, of which the one that the buffer ``which`` names predicts."""

    networks: tuple[Network, ...]

    def __call__(self) -> nn.Module:
        """Build a module with random parameters."""
        return _Variants([network() for network in self.networks])

    def in_head(self, name: str) -> bool:
        """Return whether a tensor belongs to the head of its network."""
        at, _, inner = name.partition(".")
        return at.isdigit() and self.networks[int(at)].in_head(inner)

    def in_encoder(self, name: str) -> bool:
        """Return whether a tensor belongs to the encoder of its network."""
        at, _, inner = name.partition(".")
        return at.isdigit() and self.networks[int(at)].in_encoder(inner)


class _Variants(nn.Module):
    which: Tensor

    def __init__(self, models: list[nn.Module]) -> None:
        super().__init__()
        for i, model in enumerate(models):
            self.add_module(str(i), model)
        self.register_buffer("which", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        return self.get_submodule(str(int(self.which)))(x)


@lru_cache(maxsize=16)
def _initial(network: Network) -> Tree:
    return initial(network, 0)


@lru_cache(maxsize=16)
def common_names(networks: tuple[Network, ...]) -> frozenset[str]:
    """Return the names of the tensors that all ``networks`` have with the same shape."""
    shapes = [{(name, tuple(leaf.shape)) for name, leaf in _initial(network).items()} for network in networks]
    return frozenset(name for name, _ in set.intersection(*shapes))


def _hashable(value: Any) -> Any:
    return tuple(_hashable(item) for item in value) if isinstance(value, list | tuple) else value
