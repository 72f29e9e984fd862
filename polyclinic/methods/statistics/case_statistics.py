"""Federated statistics of cases for planning: nnU-Net's fingerprint from sums, without moving the data.

Isensee et al., Nature Methods 18:203, 2021, https://doi.org/10.1038/s41592-020-01008-z. In FednnU-Net (Skorupko et
al., 2025, https://arxiv.org/abs/2503.02549) sites send the spacing and the size of every case, minima and maxima. Here
a site answers two requests by sums: counts in bins that are public and fixed; and, given the spacing that follows from
them, counts of the sizes after resampling. A bin that counts one patient still tells this patient's spacing or size to
the accuracy of the bin, so that a site with few patients should not answer (``min_patients`` of its policy), or answer
under secure summation.

Nothing is trained: the model is returned as it was.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.job_enumeration import once
from polyclinic.core.method import Capabilities, Job, Method, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.networks.unet_topology import target_spacing
from polyclinic.learning.tasks.case_sums import quantile, sizes_of, spacing_of, sums_of
from polyclinic.learning.tasks.task import Task


@savable("case-statistics.State", 1)
class State(NamedTuple):
    """The model, which does not change, and the sums so far."""

    round: int
    params: Tree
    sums: Tree


@dataclass(frozen=True)
class CaseStatistics(Method[State]):
    """Counts of spacings, sizes and foreground values of all sites' images, as sums.

    Attributes:
        task: The task. It is not used; a study names one.
        intensities: Whether sites also send the distribution of foreground values, which a plan for CT needs.
    """

    task: Task
    intensities: bool = True

    capabilities = Capabilities(uniform=False)

    def init(self, params: Tree) -> State:
        return State(0, params, {})

    @property
    def jobs(self) -> tuple[Job, ...]:
        return once("cases"), once("sizes")

    def request(self, state: State) -> Request | None:
        if "resampled" in state.sums:
            return None
        if not state.sums:
            return Request(0, {}, "cases")
        return Request(0, {"spacing": {"mm": planned_spacing(state.sums)}}, "sizes")

    def evaluation_request(self, state: State) -> Request:
        return Request(state.round, {"params": state.params})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        data = site.data["train"]
        sums = sums_of(data) if request.job == "cases" else sizes_of(data, request.trees["spacing"]["mm"])
        if not self.intensities:
            sums = {name: leaf for name, leaf in sums.items() if name not in ("known", "mean", "square", "values")}
        return Reply({"sums": WeightedMean(sums, max(1.0, float(len(data))))}), memory

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        found = {name: leaf.double() for name, leaf in reply.mean("sums").total.items()}
        return State(int("resampled" in found), state.params, {**state.sums, **found})


def axes_in(sums: Tree) -> int:
    """Return the number of spatial axes of most images, 2 or 3."""
    return 3 if float(sums["axes"][1]) >= float(sums["axes"][0]) else 2


def median(counts: Tensor, share: float = 0.5) -> tuple[float, ...]:
    """Return a quantile of the sizes that ``counts`` [3, LARGEST + 1] counts, along each axis."""
    found = []
    for row in counts:
        low, high, weight = quantile(row, share)
        found.append(low + (high - low) * weight)
    return tuple(found)


def spacing(sums: Tree, share: float) -> tuple[float, ...]:
    """Return a quantile of the spacing along each axis (z, y, x), to the accuracy of the bins; 0 for no axis."""
    found = []
    for row in sums["spacing"]:
        low, high, weight = quantile(row, share)
        ends = [spacing_of(at) if at else 0.0 for at in (low, high)]
        found.append(ends[0] + (ends[1] - ends[0]) * weight)
    return tuple(found)


def planned_spacing(sums: Tree) -> Tensor:
    """Return the spacing to which nnU-Net resamples, along (z, y, x): [3], 1 for an axis that does not exist."""
    axes = axes_in(sums)
    flat = [1.0] * (3 - axes)
    wanted = target_spacing(spacing(sums, 0.5)[-axes:], spacing(sums, 0.1)[-axes:], median(sums["size"])[-axes:])
    return torch.tensor([*flat, *wanted], dtype=torch.float64)
