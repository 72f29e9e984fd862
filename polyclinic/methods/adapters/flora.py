"""FLoRA: the server stacks the sites' adapters, and adds their product to the layers.

Ziyao Wang, Zheyu Shen, Yexiao He, Guoheng Sun, Hongyi Wang, Lingjuan Lyu and Ang Li, "FLoRA: Federated Fine-Tuning
Large Language Models with Heterogeneous Low-Rank Adaptations", NeurIPS 2024, section 3.2,
https://arxiv.org/abs/2409.05976: with ``A = [p_1 A_1; ...; p_N A_N]`` and ``B = [B_1, ..., B_N]`` the product is
``B A = Σ p_i B_i A_i``, which needs no common rank; it becomes part of the layers, and the next round begins with new
adapters. As in the official code (https://github.com/ATP-1010/FederatedLLM), the weights ``p_i`` multiply ``A`` alone,
and the scale α / r is the same at sites of every rank. Departures: the server adds the product and sends the changed
layers, where the paper sends the stacked factors for the sites to add, because sites need not have taken part in
earlier rounds; all other trained tensors, such as the head, are averaged. The server sees each site's factors, which
secure sums exclude.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from polyclinic.core import tree
from polyclinic.core.aggregates import PerSite, PerSiteUniform, Reply
from polyclinic.core.method import Request
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError, ProtocolError
from polyclinic.learning.networks.adapters import DOWN, UP, LowRank, factors, product
from polyclinic.learning.networks.fine_tuning import FineTuned
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.dp_sgd import DPSGD
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.adapters.site_factors import reply_of, shares_of
from polyclinic.methods.base.site_weights import SizeWeighted
from polyclinic.methods.optimization.fedavg import State

LAYER = ".base.weight"
"""The end of the name of the weights of a layer that has an adapter."""


@dataclass(frozen=True)
class OutsideLayers:
    """Tests whether a tensor is trained at sites: the weights of layers that have adapters are not."""

    layers: tuple[str, ...]

    def __call__(self, name: str) -> bool:
        """Return whether the tensor ``name`` is."""
        return name not in self.layers


@dataclass(frozen=True)
class FLoRA(SizeWeighted[State]):
    """FedAvg, except for adapters: the mean of their products, without any cut, is added to the layers.

    Attributes:
        sites: The sites, for ``ranks``.
        ranks: The rank of the adapters at each site, in name order, at most that of the study; empty for that of the
            study at all of them.
        uniform: Whether all sites have equal weight, instead of in proportion to their training examples.
    """

    task: Task
    local: LocalTraining = LocalTraining()
    sites: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()
    uniform: bool = False

    def __post_init__(self) -> None:
        if not self.ranks:
            return
        if isinstance(self.local, DPSGD):
            raise ConfigError(
                "flora: private training adds noise to all rows of the factors, so that no site has a smaller rank: "
                "leave ranks out"
            )
        if len(self.ranks) != len(self.sites):
            raise ConfigError(f"flora: ranks has {len(self.ranks)} entries, and {len(self.sites)} sites train")
        most = self._adapters.rank
        if wrong := [rank for rank in self.ranks if not 1 <= rank <= most]:
            raise ConfigError(f"flora: ranks must be from 1 to lora.rank = {most}, not {wrong[0]}")

    needs_each_reply = True

    @property
    def _adapters(self) -> LowRank:
        network = self.task.network
        return (network.lora if isinstance(network, FineTuned) else None) or LowRank()

    def init(self, params: Tree) -> State:
        return State(0, params)

    def request(self, state: State) -> Request:
        return Request(state.round, {"params": state.params})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start, rank = dict(request.trees["params"]), self._rank(site.name)
        pairs = factors(start)
        for layer, (down, _) in pairs.items():
            # Rows of A that are 0, with columns of B that are 0, stay 0: their gradients are products with each other.
            start[layer + DOWN] = torch.cat([down[:rank], torch.zeros_like(down[rank:])])
        layers = tuple(layer + LAYER for layer in pairs)
        end = self.local.fit(self.task, start, site, request.round, trainable=OutsideLayers(layers))
        own = dict[str, Tensor]()
        for layer, (down, up) in factors(end).items():
            own |= {layer + DOWN: down[:rank].clone(), layer + UP: up[:, :rank].clone()}
        change = tree.select(tree.sub(end, start), lambda name: name not in layers)
        kind = PerSite if self.ranks else PerSiteUniform
        return reply_of(site.name, change, own, self.site_weight(site), kind), memory

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        sent = reply.gather("factors")
        shares, rng = shares_of(sent, self.uniform), server.rng(state.round, "flora")
        moved, scale = {**state.params, **reply.mean("update").apply_to(state.params)}, self._scale
        for layer, (down, up) in factors(state.params).items():
            pairs = {name: _checked(name, layer, sent[name], down, up) for name in shares}
            a, b = stacked(pairs, shares)
            moved[layer + LAYER] = state.params[layer + LAYER] + scale * product(a, b)  # W + (α / r) Σ p_i B_i A_i
            bound = down[0].numel() ** -0.5  # as the adapters of a new network
            moved[layer + DOWN] = torch.empty_like(down).uniform_(-bound, bound, generator=rng)
            moved[layer + UP] = torch.zeros_like(up)
        return State(state.round + 1, moved)

    @property
    def _scale(self) -> float:
        return self._adapters.alpha / self._adapters.rank

    def _rank(self, site: str) -> int:
        return dict(zip(sorted(self.sites), self.ranks, strict=True))[site] if self.ranks else self._adapters.rank


def stacked(pairs: Mapping[str, tuple[Tensor, Tensor]], shares: Mapping[str, float]) -> tuple[Tensor, Tensor]:
    """Return ``A = [p_1 A_1; ...]`` and ``B = [B_1, ...]``, whose product is the mean of the sites' products."""
    a = torch.cat([shares[name] * down for name, (down, _) in pairs.items()])
    return a, torch.cat([up for _, up in pairs.values()], 1)


def _checked(site: str, layer: str, own: Tree, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return A and B of a site.

    Raises:
        ProtocolError: If they do not fit the layer, or their rank exceeds that of the study.
    """
    a, b = own.get(layer + DOWN), own.get(layer + UP)
    fits = a is not None and b is not None and a.ndim == down.ndim and b.ndim == up.ndim
    if fits:
        assert a is not None
        assert b is not None
        fits = 1 <= len(a) == b.shape[1] <= len(down)
        if fits and a.shape[1:] == down.shape[1:] and b.shape[::2] == up.shape[::2]:
            return a, b
    raise ProtocolError(f"{site} sent factors for {layer} that do not fit the layer or its rank {len(down)}")
