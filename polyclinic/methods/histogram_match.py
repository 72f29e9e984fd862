"""Histogram matching to a federated reference: every site's grey values get the quantiles of all sites' together.

Nyúl and Udupa, "On standardizing the MR image intensity scale", Magnetic Resonance in Medicine 1999,
https://doi.org/10.1002/(SICI)1522-2594(199912)42:6<1072::AID-MRM11>3.0.CO;2-M, with quantiles as landmarks, of a
site's images together, not of each image. The reference comes from the sums of the federated fingerprint; a site's own
quantiles stay there. Where scanners differ because patients do, this takes that difference away, too.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from polyclinic.core.jobs import once
from polyclinic.core.method import Ask, Job
from polyclinic.core.site import Site
from polyclinic.core.state import savable
from polyclinic.core.stats import Reply
from polyclinic.core.tree import Tree, Trees
from polyclinic.methods.fedavg import FedAvg
from polyclinic.methods.fingerprint import Fingerprint
from polyclinic.methods.fingerprint import State as Found
from polyclinic.methods.personal import Personal
from polyclinic.methods.prepared import Prepared
from polyclinic.tasks.front import fronted, in_front
from polyclinic.tasks.local import Local
from polyclinic.tasks.monotone import MonotoneMap
from polyclinic.tasks.statistics import Summary, count_up, spread_out
from polyclinic.tasks.task import Task


@savable("histogram-match.State", 1)
class State(NamedTuple):
    """The fingerprint's state, and whether all sites know the reference."""

    found: Found
    told: bool


@dataclass(frozen=True)
class Reference:
    """Finds the quantiles of all sites' values, and for each site the way from its own to those.

    Attributes:
        fingerprint: What is asked of all sites.
        knots: How many quantiles, evenly spaced from 1 to 99 %.
    """

    fingerprint: Fingerprint
    knots: int = 17

    def init(self, params: Tree) -> State:
        return State(self.fingerprint.init(params), False)

    @property
    def jobs(self) -> tuple[Job, ...]:
        return (*self.fingerprint.jobs, once("match", static=False))

    def ask(self, state: State) -> Ask | None:
        if (ask := self.fingerprint.ask(state.found)) is not None:
            return ask
        if state.told:
            return None
        summary = self.fingerprint.summary(state.found)
        return Ask(0, {"reference": {"there": self.quantiles(summary), "edges": summary.edges}}, "match")

    def site_update(self, ask: Ask, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        if ask.job != "match":
            return self.fingerprint.site_update(ask, memory, site)
        task, data, reference = self.fingerprint.task, site.data["train"], ask.trees["reference"]
        sums = count_up(data, task.network.outputs) | spread_out(data, reference["edges"])
        here = self.quantiles(Summary(sums, reference["edges"]))
        own = {"front.here": here.float(), "front.there": reference["there"].float()}
        return Reply(), {**memory, "own": own}

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        if self.fingerprint.ask(state.found) is None:
            return state._replace(told=True)
        return state._replace(found=self.fingerprint.server_update(state.found, reply, server))

    def front(self, state: State) -> Tree:
        knots = torch.linspace(-1, 1, self.knots).repeat(self.fingerprint.task.network.inputs[0], 1)
        return {"front.here": knots, "front.there": knots}

    def quantiles(self, summary: Summary) -> torch.Tensor:
        """[channels, knots]"""
        return torch.stack([summary.quantile(float(q)) for q in torch.linspace(0.01, 0.99, self.knots)], 1)


def histogram_match(task: Task, local: Local, *, knots: int = 17, bins: int = 512, uniform: bool = False) -> Prepared:
    """FedAvg on values that were given the quantiles of all sites' together; unseen sites' are left as they are."""
    task = fronted(task, MonotoneMap(task.network.inputs[0], knots))
    shared = Personal(FedAvg(task, local, uniform=uniform), in_front)
    return Prepared(Reference(Fingerprint(task, bins), knots), shared, task)
