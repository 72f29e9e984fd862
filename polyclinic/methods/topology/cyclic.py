"""Cyclic weight transfer: the model travels from site to site, and each trains it in turn.

Ken Chang, Niranjan Balachandar, Carson Lam, Darvin Yi, James Brown, Andrew Beers, Bruce Rosen, Daniel Rubin and
Jayashree Kalpathy-Cramer, "Distributed deep learning networks among institutions for medical imaging", Journal of the
American Medical Informatics Association 25 (2018), 945-954, https://doi.org/10.1093/jamia/ocy017.

What this shows: what is learned, and that it leans towards the hospital that trained last (docs/results/topologies.md
measures by how much). What it does not: that nobody else sees the model, since the driver carries it from site to site.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.method import Job, Method, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining


@savable("cyclic.State", 1)
class State(NamedTuple):
    """The model as the last site left it, the order of this cycle, and whose turn it is."""

    round: int
    params: Tree
    order: tuple[str, ...]
    at: int


@dataclass(frozen=True)
class Cyclic(Method[State]):
    """One model, passed on. A round is a cycle in which every site has its turn.

    A site that does not answer is passed over, where the driver bears it (``min_replies=0``).

    Attributes:
        sites: Who takes part, in the order of the first cycle.
        shuffle: Whether to draw a new order for every later cycle, so that no site is always the last.
    """

    task: Task
    sites: tuple[str, ...]
    local: LocalTraining = LocalTraining()
    shuffle: bool = False

    def init(self, params: Tree) -> State:
        return State(0, params, self.sites, 0)

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
        params = reply.mean("update").apply_to(state.params) if reply.parts else state.params
        if state.at + 1 < len(state.order):
            return state._replace(params=params, at=state.at + 1)
        order = state.order
        if self.shuffle:
            drawn = torch.randperm(len(order), generator=server.rng(state.round, "order"))
            order = tuple(sorted(order)[i] for i in drawn.tolist())
        return State(state.round + 1, params, order, 0)


def cyclic(
    task: Task, local: LocalTraining, sites: tuple[str, ...], *, order: tuple[str, ...] = (), shuffle: bool = False
) -> Cyclic:
    """The model travels from site to site, in ``order`` or as the study names them.

    Args:
        order: In which order sites are visited; as the study names them where empty.

    Raises:
        ValueError: If ``order`` does not name every site once.
    """
    if order and sorted(order) != sorted(sites):
        raise ConfigError(f"order must name every site once: {', '.join(sites)}; not {', '.join(order)}")
    return Cyclic(task, tuple(order or sites), local, shuffle)
