"""Cyclic weight transfer: the sites train the model in turn.

Ken Chang, Niranjan Balachandar, Carson Lam, Darvin Yi, James Brown, Andrew Beers, Bruce Rosen, Daniel Rubin and
Jayashree Kalpathy-Cramer, "Distributed deep learning networks among institutions for medical imaging", Journal of the
American Medical Informatics Association 25 (2018), 945-954, https://doi.org/10.1093/jamia/ocy017.

The simulation shows what is learned, and the bias towards the hospital that trained last (measured in
docs/results/topologies.md). It does not show that only the next site sees the model, since the driver transports it.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.method import Capabilities, Job, Method, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining


@savable("cyclic.State", 1)
class State(NamedTuple):
    """The model after the last site's training, the order of this cycle, and the position of the next site in it."""

    round: int
    params: Tree
    order: tuple[str, ...]
    at: int


@dataclass(frozen=True)
class Cyclic(Method[State]):
    """One model, trained by each site in turn. A round is a cycle over all sites.

    A site that does not reply is skipped if the driver allows it (``min_replies=0``).

    Attributes:
        sites: The sites that take part.
        order: The order of the first cycle; that of ``sites`` if empty.
        shuffle: Whether to draw a new order for every later cycle, so that the last site changes.
    """

    task: Task
    sites: tuple[str, ...]
    local: LocalTraining = LocalTraining()
    order: tuple[str, ...] = ()
    shuffle: bool = False

    capabilities = Capabilities(recipients=1)

    def __post_init__(self) -> None:
        if self.order and sorted(self.order) != sorted(self.sites):
            raise ConfigError(f"order must name every site once: {', '.join(self.sites)}; not {', '.join(self.order)}")

    def init(self, params: Tree) -> State:
        return State(0, params, self.order or self.sites, 0)

    @property
    def jobs(self) -> tuple[Job, ...]:
        return (Job("train", at_start=False),)

    def request(self, state: State) -> Request:
        return Request(state.round, {"params": state.params}, recipients=(state.order[state.at],))

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start = request.trees["params"]
        end = self.local.fit(self.task, start, site, request.round)
        return Reply({"update": WeightedMean.of(tree.sub(end, start))}), memory

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        params = reply.applied("update", state.params)
        if state.at + 1 < len(state.order):
            return state._replace(params=params, at=state.at + 1)
        order = state.order
        if self.shuffle:
            drawn = torch.randperm(len(order), generator=server.rng(state.round, "order"))
            order = tuple(sorted(order)[i] for i in drawn.tolist())
        return State(state.round + 1, params, order, 0)
