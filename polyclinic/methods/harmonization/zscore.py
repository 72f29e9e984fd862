"""Federated z-score: images and columns with mean 0 and standard deviation 1, over all sites or within each.

Textbook statistics from sums only; the simplest harmonization, and a baseline for the others.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.job_enumeration import once
from polyclinic.core.method import Capabilities, Job, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.networks.affine import AffineInput
from polyclinic.learning.tasks.data_sums import Summary, count_up
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.base.preparation import Prepared
from polyclinic.methods.harmonization.input_front import fronted, in_front
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.personalization.partial_personalization import Personal


@savable("zscore.State", 1)
class State(NamedTuple):
    """The sums of all sites' data; initially empty."""

    sums: Tree


@dataclass(frozen=True)
class ZScore:
    """Computes the mean and standard deviation of every channel or column, over all sites or within each.

    Attributes:
        by_site: Whether a site uses its own mean and standard deviation instead of those of all sites.
    """

    task: Task
    by_site: bool = False

    capabilities = Capabilities(uniform=False)

    def init(self, params: Tree) -> State:
        return State({})

    @property
    def jobs(self) -> tuple[Job, ...]:
        return (once("moments"),)

    def request(self, state: State) -> Request | None:
        return None if state.sums else Request(0, {}, "moments")

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        sums = count_up(site.data["train"], self.task.label_count)
        own = {**memory, "own": self.standardize(sums)} if self.by_site else memory
        by_pixel = tree.scale(sums, 1 / math.prod(self.task.network.inputs[1:]))  # in digits that secure sums keep
        return Reply({"sums": WeightedMean(by_pixel, float(len(site.data["train"])))}), own

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        pixels = math.prod(self.task.network.inputs[1:])
        return State({name: leaf.double() * pixels for name, leaf in reply.mean("sums").total.items()})

    def front(self, state: State) -> Tree:
        return self.standardize(state.sums)

    def standardize(self, sums: Tree) -> Tree:
        """Return the front ``x ↦ (x − mean) / deviation``; constant channels are centered only. Identity if empty."""
        shape = affine_shape(self.task)
        if not sums:
            return {"front.scale": torch.ones(shape), "front.shift": torch.zeros(shape)}
        found = Summary(sums, torch.empty(0))
        scale = 1 / torch.where(found.std > 1e-12, found.std, 1.0)
        leaves = {"front.scale": scale, "front.shift": -found.mean * scale}
        return {name: leaf.float().reshape(shape) for name, leaf in leaves.items()}


def affine_shape(task: Task) -> tuple[int, ...]:
    """Return a shape with one number per channel of an image, or column of a table, that broadcasts."""
    channels, *spatial = task.network.inputs
    return (channels, *[1] * len(spatial))


def zscore(task: Task, local: LocalTraining, *, by_site: bool = False, uniform: bool = False) -> Prepared:
    """Compose the statistics with FedAvg on standardized inputs.

    Args:
        by_site: Whether a site uses its own mean and standard deviation instead of those of all sites.
    """
    task = fronted(task, AffineInput(affine_shape(task)))
    plain = FedAvg(task, local, uniform=uniform)
    return Prepared(ZScore(task, by_site), Personal(plain, in_front) if by_site else plain, task)
