"""Gossip: no server; each site averages its model with its neighbors' and continues training.

Xiangru Lian, Ce Zhang, Huan Zhang, Cho-Jui Hsieh, Wei Zhang and Ji Liu, "Can Decentralized Algorithms Outperform
Centralized Algorithms?", NeurIPS 2017, Algorithm 1 (D-PSGD), https://arxiv.org/abs/1705.09056, with several local steps
between two exchanges; random neighbors after Boyd, Ghosh, Prabhakar and Shah, "Randomized gossip algorithms", IEEE
Transactions on Information Theory 52 (2006).

The simulation shows what each site learns, how far the sites' models diverge, and that the loss of a site does not stop
the others. It does not show that only neighbors see a model, since the driver transports all messages.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from polyclinic.core import tree
from polyclinic.core.aggregates import PerSiteUniform, Reply
from polyclinic.core.method import Capabilities, Method, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining


@savable("gossip.State", 1)
class State(NamedTuple):
    """The mean of all models, for inspection only; each site's own model; and the order of the sites on the circle."""

    round: int
    params: Tree
    models: Trees
    circle: tuple[str, ...]


@dataclass(frozen=True)
class Gossip(Method[State]):
    """Each site averages its model with those of its neighbors on a circle, and trains.

    Attributes:
        neighbors: Number of neighbors, half on each side; an even number, or 0 for all other sites.
        graph: ``ring``, a circle in name order, or ``random``, a new random circle for every round.
    """

    task: Task
    local: LocalTraining = LocalTraining()
    neighbors: int = 2
    graph: Literal["ring", "random"] = "random"

    def __post_init__(self) -> None:
        if self.neighbors < 0 or self.neighbors % 2:
            raise ConfigError(f"neighbors must be an even number, half on each side, not {self.neighbors}")

    capabilities = Capabilities(needs_each_reply=True)

    def init(self, params: Tree) -> State:
        return State(0, params, {}, ())

    def request(self, state: State) -> Request:
        each = {
            name: {f"from/{other}": state.models[other] for other in around(name, state.circle, self.neighbors)}
            for name in state.circle
        }
        return Request(state.round, {"params": state.params}, per_site=each)

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        end = self.local.fit(self.task, self.site_model(request, memory), site, request.round)
        return Reply({"model": PerSiteUniform({site.name: end})}), {**memory, "own": end}

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        if not reply.parts:
            return State(state.round + 1, state.params, {}, ())
        models = reply.gather("model")
        circle = tuple(sorted(models))
        if self.graph == "random":
            drawn = torch.randperm(len(circle), generator=server.rng(state.round, "circle"))
            circle = tuple(circle[i] for i in drawn.tolist())
        return State(state.round + 1, mean(list(models.values())), models, circle)

    def site_model(self, request: Request, memory: Trees) -> Tree:
        """Return the mean of the site's own model and its neighbors'; for a site without one, the mean of all."""
        received = {name: t for name, t in request.trees.items() if name.startswith("from/")}
        return mean([memory["own"], *received.values()]) if "own" in memory else request.trees["params"]


def around(name: str, circle: Sequence[str], neighbors: int) -> list[str]:
    """Return the sites within ``neighbors`` / 2 positions of ``name`` on the circle, in name order."""
    n, at = len(circle), list(circle).index(name)
    reach = neighbors // 2 or n
    return sorted({circle[(at + d) % n] for d in range(-reach, reach + 1)} - {name})


def mean(models: Sequence[Tree]) -> Tree:
    """Return the mean of ``models``."""
    total = tree.copy(models[0])
    for other in models[1:]:
        tree.add_(total, other)
    return tree.scale(total, 1 / len(models))
