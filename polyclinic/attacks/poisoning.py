"""Poisoning: a method in which some sites are hostile, for tests and for studies of robustness.

Each attack states the attacker's knowledge. If it needs the honest updates of the round, the simulation lets the honest
sites answer first and then gives the attackers the mean and spread of their updates. A real server would not, so the
attack is stronger here than in a deployment; a defense that withstands it also withstands the weaker one.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from polyclinic.attacks.adversaries import Attack, Known
from polyclinic.core import tree
from polyclinic.core.aggregates import WEIGHT, ElementwiseMean, PerSite, Reply, Stat, WeightedMean
from polyclinic.core.method import Method, MethodWrapper, Request
from polyclinic.core.pipeline import transforms_of
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError

SPY, KNOWN = "~spy", "~known"


@savable("attack.State", 1)
class State(NamedTuple):
    """The method's state and, while the attackers are asked, the merged reply of the honest sites."""

    inner: Any
    honest: Reply | None

    @property
    def params(self) -> Tree:
        """The method's server model."""
        params: Tree = self.inner.params
        return params


@dataclass(frozen=True)
class Poisoned(MethodWrapper[State]):
    """``inner``, in which ``attackers`` execute ``attack`` whenever they train.

    Put a robust rule inside: ``Poisoned(Robust(FedAvg(task), rule), ...)``. A hostile site applies the attack last.

    Attributes:
        attackers: The hostile sites.
        attack: The attack.
        sites: All sites. Required if the attack needs the honest updates.
        start_round: The first round with the attack.
    """

    inner: Method[Any]
    attackers: tuple[str, ...]
    attack: Attack
    sites: tuple[str, ...] = ()
    start_round: int = 0

    def __post_init__(self) -> None:
        if hidden := [type(t).__name__ for t in transforms_of(self.inner) if t.secure or not t.additive]:
            raise ConfigError(
                f"an attack changes the numbers that leave a site, and {', '.join(hidden)} would encode "
                "them first: remove it"
            )
        if self.attack.spies and not set(self.attackers) < set(self.sites):
            raise ConfigError(
                f"{type(self.attack).__name__} needs the updates of the honest sites: give the names of all sites, "
                "including the attackers, as sites=(...)"
            )

    def init(self, params: Tree) -> State:
        """Return the initial state of the inner method."""
        return State(self.inner.init(params), None)

    def request(self, state: State) -> Request | None:
        """Return the method's request; divided in two if attackers must first see the honest updates."""
        request = self.inner.request(state.inner)
        if request is None or not self._spied(request):
            return request
        asked = self.sites if request.recipients is None else request.recipients
        if state.honest is None:
            honest = tuple(name for name in asked if name not in self.attackers)
            return replace(request, recipients=honest, trees={**request.trees, SPY: {}})
        request = replace(request, recipients=tuple(name for name in asked if name in self.attackers))
        if SPY not in state.honest.parts:
            return request  # the others sent nothing
        spied = state.honest.mean(SPY)
        known = {**spied.value, "/honest": torch.tensor(spied.weight, dtype=torch.float64)}
        return replace(request, trees={**request.trees, KNOWN: known})

    def evaluation_request(self, state: State) -> Request:
        """Return the method's evaluation request."""
        return self.inner.evaluation_request(state.inner)

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        """Run the method's site update at an honest site, or the attack at a hostile one."""
        spied = request.trees.get(KNOWN)
        bare = replace(request, trees={name: t for name, t in request.trees.items() if name not in (SPY, KNOWN)})
        if site.name not in self.attackers or request.round < self.start_round:
            reply, memory = self.inner.site_update(bare, memory, site)
            if SPY in request.trees and reply.parts:
                reply = Reply({**reply.parts, SPY: _spy(reply)})
            return reply, memory
        data = {role: self.attack.data(d) if role == "train" else d for role, d in site.data.items()}
        reply, memory = self.inner.site_update(bare, memory, replace(site, data=data))
        if not (own := _values(reply)) or (self.attack.spies and spied is None):
            return reply, memory  # nothing to change, or no honest update to use
        together = Site("~attackers", seed=site.seed).rng(request.round, request.job)
        known = None if spied is None else self._knowledge(spied)
        sent = self.attack.update(own, known, site.rng(request.round, request.job, "attack"), together)
        return _with(reply, sent), memory

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        """Run the method's server update once all sites have answered."""
        request = self.inner.request(state.inner)
        if request is not None and self._spied(request):
            if state.honest is None:
                return state._replace(honest=reply)
            reply = Reply({part: stat for part, stat in state.honest.parts.items() if part != SPY}) + reply
        return State(self.inner.server_update(state.inner, reply, server), None)

    def _spied(self, request: Request) -> bool:
        """Return whether the attackers answer this request after the others."""
        asked = set(self.sites if request.recipients is None else request.recipients)
        both = asked & set(self.attackers) and asked - set(self.attackers)
        return self.attack.spies and request.round >= self.start_round and bool(both)

    def _knowledge(self, spied: Tree) -> Known:
        mean, square, honest = tree.under("x", spied), tree.under("xx", spied), int(spied["/honest"])
        spread = max(honest, 2) / (max(honest, 2) - 1)  # σ² = n / (n - 1) · (mean of x² - (mean of x)²)
        deviation = tree.zip_with(lambda m, s: ((s - m * m).clamp_min(0) * spread).sqrt(), mean, square)
        length = float(sum(leaf.sum() for leaf in square.values())) ** 0.5
        single = {name: leaf.float() for name, leaf in mean.items()}
        return Known(single, {n: x.float() for n, x in deviation.items()}, length, honest, len(self.attackers))


def _values(reply: Reply) -> Tree:
    """Return all values in a reply as ``part/name``, except those that only state a weight."""
    values: dict[str, torch.Tensor] = {}
    for part, stat in reply.parts.items():
        if isinstance(stat, WeightedMean) and not stat.weight:
            continue
        leaves = next(iter(stat.items.values())) if isinstance(stat, PerSite) else stat.value
        values |= {
            f"{part}/{n}": x for n, x in leaves.items() if x.is_floating_point() and not n.endswith(("/", WEIGHT))
        }
    return values


def _spy(reply: Reply) -> WeightedMean:
    """Return the values of ``reply`` and their squares, in double precision."""
    wide = {name: leaf.double() for name, leaf in _values(reply).items()}
    return WeightedMean.of({**tree.prefixed("x", wide), **tree.prefixed("xx", tree.mul(wide, wide))})


def _with(reply: Reply, values: Tree) -> Reply:
    """Return ``reply`` with its values replaced by ``values``, and its own weights."""
    parts: dict[str, Stat] = {}
    for part, stat in reply.parts.items():
        own = {name.partition("/")[2]: leaf for name, leaf in values.items() if name.partition("/")[0] == part}
        match stat:
            case WeightedMean(_, weight) if weight:
                parts[part] = WeightedMean.of({**stat.value, **own}, weight)
            case ElementwiseMean(_, weight):
                parts[part] = ElementwiseMean.of({**stat.value, **own}, weight)
            case PerSite(items):
                parts[part] = replace(stat, items={site: {**leaves, **own} for site, leaves in items.items()})
            case _:
                parts[part] = stat
    return Reply(parts)
