"""Histogram matching to a federated reference: each site's gray values are mapped to the quantiles of all sites.

Nyúl and Udupa, "On standardizing the MR image intensity scale", Magnetic Resonance in Medicine 1999,
https://doi.org/10.1002/(SICI)1522-2594(199912)42:6<1072::AID-MRM11>3.0.CO;2-M, with quantiles as landmarks, of all of a
site's images, not of each image. The reference is computed from the sums of the federated fingerprint; a site's own
quantiles stay there. If scanners differ because patients do, this removes that difference, too.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from polyclinic.core.aggregates import Reply
from polyclinic.core.job_enumeration import once
from polyclinic.core.method import Capabilities, Job, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.tasks.data_sums import Summary, count_up, spread_out
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.base.preparation import Prepared
from polyclinic.methods.harmonization.input_front import fronted, in_front
from polyclinic.methods.harmonization.monotone_front import MonotoneMap
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.personalization.partial_personalization import Personal
from polyclinic.methods.statistics.pooled_statistics import Fingerprint
from polyclinic.methods.statistics.pooled_statistics import State as Found


@savable("histogram-match.State", 1)
class State(NamedTuple):
    """The fingerprint's state, and whether all sites have the reference."""

    found: Found
    sent: bool


@dataclass(frozen=True)
class Reference:
    """Computes the quantiles of all sites' values, and for each site the map from its own to those.

    Attributes:
        fingerprint: The statistics requested from all sites.
        knots: Number of quantiles, evenly spaced from 1 to 99 %.
    """

    fingerprint: Fingerprint
    knots: int = 17

    capabilities = Capabilities(uniform=False)

    def init(self, params: Tree) -> State:
        return State(self.fingerprint.init(params), False)

    @property
    def jobs(self) -> tuple[Job, ...]:
        return (*self.fingerprint.jobs, once("match", static=False))

    def request(self, state: State) -> Request | None:
        if (request := self.fingerprint.request(state.found)) is not None:
            return request
        if state.sent:
            return None
        summary = self.fingerprint.summary(state.found)
        return Request(0, {"reference": {"there": self.quantiles(summary), "edges": summary.edges}}, "match")

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        if request.job != "match":
            return self.fingerprint.site_update(request, memory, site)
        task, data, reference = self.fingerprint.task, site.data["train"], request.trees["reference"]
        sums = count_up(data, task.label_count) | spread_out(data, reference["edges"])
        here = self.quantiles(Summary(sums, reference["edges"]))
        own = {"front.here": here.float(), "front.there": reference["there"].float()}
        return Reply(), {**memory, "own": own}

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        if self.fingerprint.request(state.found) is None:
            return state._replace(sent=True)
        return state._replace(found=self.fingerprint.server_update(state.found, reply, server))

    def front(self, state: State) -> Tree:
        knots = torch.linspace(-1, 1, self.knots).repeat(self.fingerprint.task.network.inputs[0], 1)
        return {"front.here": knots, "front.there": knots}

    def quantiles(self, summary: Summary) -> torch.Tensor:
        """Return the quantiles, [channels, knots]."""
        return torch.stack([summary.quantile(float(q)) for q in torch.linspace(0.01, 0.99, self.knots)], 1)


def histogram_match(
    task: Task, local: LocalTraining, *, knots: int = 17, bins: int = 512, uniform: bool = False
) -> Prepared:
    """Compose the reference with FedAvg on matched values. An unseen site's values are not changed.

    Args:
        knots: Number of quantiles, evenly spaced from 1 to 99 %.
        bins: Number of bins of the histograms from which quantiles are read.
    """
    task = fronted(task, MonotoneMap(task.network.inputs[0], knots))
    shared = Personal(FedAvg(task, local, uniform=uniform), in_front)
    return Prepared(Reference(Fingerprint(task, bins), knots), shared, task)
