"""Federated data set fingerprint: pooled statistics of all sites' data, without moving the data.

After the data fingerprint of nnU-Net: Isensee et al., Nature Methods 2021, https://doi.org/10.1038/s41592-020-01008-z.

Two requests, each answered by sums: first counts and moments; then histograms, whose edges follow from the pooled
moments, so that no range must be agreed on beforehand. Minima and maxima would reveal single patients and are not
requested.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from polyclinic.core import tree
from polyclinic.core.aggregates import PerSite, Reply, WeightedMean
from polyclinic.core.job_enumeration import once
from polyclinic.core.method import Capabilities, Job, Method, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.tasks.data_sums import Summary, count_up, spread_out
from polyclinic.learning.tasks.task import Task


@savable("dataset-fingerprint.State", 1)
class State(NamedTuple):
    """The statistics so far: pooled, and by site if requested."""

    sums: Tree
    sites: Trees

    @property
    def finished(self) -> bool:
        """Whether both requests have been answered."""
        return "histogram" in self.sums


@dataclass(frozen=True)
class Fingerprint(Method[State]):
    """Counts, moments, missing values, histograms and class counts of all sites' data, as sums.

    Attributes:
        task: The task, which defines the number of classes.
        bins: Number of bins of the histogram; a quantile is exact to one of them, 2 · ``reach`` / ``bins`` deviations
            wide.
        reach: Half-width of the histogram's range, in standard deviations from the mean.
        role: The role of the data.
        by_site: Whether each site's own numbers are also sent separately; secure summation then refuses them.
    """

    task: Task
    bins: int = 256
    reach: float = 5.0
    role: str = "train"
    by_site: bool = False

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(needs_each_reply=self.by_site, uniform=False)

    def init(self, params: Tree) -> State:
        return State({}, {})

    @property
    def jobs(self) -> tuple[Job, ...]:
        return once("moments"), once("histogram")

    def request(self, state: State) -> Request | None:
        if state.finished:
            return None
        return (
            Request(0, {"edges": {"edges": self.edges(state.sums)}}, "histogram")
            if state.sums
            else Request(0, {}, "moments")
        )

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        data, edges = site.data[self.role], request.trees["edges"]["edges"] if request.job == "histogram" else None
        sums = count_up(data, self.task.label_count) if edges is None else spread_out(data, edges)
        reply = Reply({"sums": WeightedMean(tree.scale(sums, 1 / self.pixels), max(1.0, float(len(data))))})
        return (reply + Reply({"apart": PerSite({site.name: sums})}) if self.by_site else reply), memory

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        apart = reply.gather("apart") if self.by_site else {}
        sites = {name: {**state.sites.get(name, {}), **sums} for name, sums in apart.items()}
        found = {name: leaf.double() * self.pixels for name, leaf in reply.mean("sums").total.items()}
        return State({**state.sums, **found}, {**state.sites, **sites})

    @property
    def pixels(self) -> int:
        """Number of values per channel of an example; sums are sent per pixel, at the precision of secure sums."""
        return math.prod(self.task.network.inputs[1:])

    def edges(self, sums: Tree) -> Tensor:
        """Return the edges of equal bins over the range around the mean. [channels, bins + 1]"""
        found = Summary({name: leaf for name, leaf in sums.items() if name != "around"}, torch.empty(0))
        half = self.reach * torch.where(found.std > 0, found.std, 1.0)
        return found.mean[:, None] + half[:, None] * torch.linspace(-1, 1, self.bins + 1, dtype=torch.float64)

    def summary(self, state: State, site: str | None = None) -> Summary:
        """Return the statistics of all data, or of one ``site``'s."""
        return Summary(state.sums if site is None else state.sites[site], self.edges(state.sums))
