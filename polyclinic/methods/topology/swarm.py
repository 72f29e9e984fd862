"""Swarm learning: no central server; in every round the sites elect one of them to merge.

Stefanie Warnat-Herresthal and others, "Swarm Learning for decentralized and confidential clinical machine learning",
Nature 594 (2021), 265-270, https://doi.org/10.1038/s41586-021-03583-3; for histology Saldanha and others, Nature
Medicine 28 (2022). Departure: a blockchain registers the sites and elects the merging site in the paper; here the
server's random generator elects it, and the state records the elected sites.

The simulation shows that the result is FedAvg's, which site merged, and that a failed site is replaced. It does not
show that outsiders see no model, since the driver transports all messages; nor a blockchain or its cost.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from polyclinic.core import tree
from polyclinic.core.aggregates import WEIGHT, PerSiteUniform, Reply, WeightedMean, merge
from polyclinic.core.method import Job, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.base.site_weights import SizeWeighted


@savable("swarm.State", 1)
class State(NamedTuple):
    """The model and, during merging, the sites' changes and the elected sites in order.

    ``merged`` lists the site that merged in each round; empty for a round without a merge.
    """

    round: int
    params: Tree
    sent: Trees
    elected: tuple[str, ...]
    merged: tuple[str, ...]


@dataclass(frozen=True)
class Swarm(SizeWeighted[State]):
    """FedAvg whose server is one of the sites, another in each round.

    Deputies merge in addition to the elected site, and the first available result in the order of election is used. If
    none replies and the driver allows it (``min_replies=0``), the next sites in order are asked.

    Attributes:
        deputies: Number of sites that merge in addition to the elected one.
        uniform: Whether all sites have equal weight, instead of in proportion to their training examples.
    """

    task: Task
    local: LocalTraining = LocalTraining()
    deputies: int = 1
    uniform: bool = False

    needs_each_reply = True

    def init(self, params: Tree) -> State:
        return State(0, params, {}, (), ())

    @property
    def jobs(self) -> tuple[Job, ...]:
        return Job("train"), Job("merge")

    def request(self, state: State) -> Request:
        if not state.elected:
            return Request(state.round, {"params": state.params})
        sent = {f"from/{site}": change for site, change in state.sent.items()}
        asked = state.elected[: 1 + self.deputies]
        return Request(state.round, {"params": state.params, **sent}, job="merge", recipients=asked)

    def evaluation_request(self, state: State) -> Request:
        return Request(state.round, {"params": state.params})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start = request.trees["params"]
        if request.job == "train":
            change = self.local.change(self.task, start, site, request.round)
            weight = torch.tensor(self.site_weight(site), dtype=torch.float64)
            return Reply({"change": PerSiteUniform({site.name: {**change, WEIGHT: weight}})}), memory
        sent = {name: t for name, t in sorted(request.trees.items()) if name.startswith("from/")}
        replies = merge(Reply({"update": _weighed(change)}) for change in sent.values())
        merged = replies.mean("update").apply_to(start)
        return Reply({"merged": PerSiteUniform({site.name: merged})}), memory

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        if state.elected:
            answers = reply.gather("merged") if reply.parts else {}
            if used := next((name for name in state.elected if name in answers), ""):
                return State(state.round + 1, answers[used], {}, (), (*state.merged, used))
            left = state.elected[1 + self.deputies :]
            if left:
                return state._replace(elected=left)
        elif reply.parts:
            sent = reply.gather("change")
            drawn = torch.randperm(len(sent), generator=server.rng(state.round, "election")).tolist()
            return state._replace(sent=sent, elected=tuple(sorted(sent)[i] for i in drawn))
        return State(state.round + 1, state.params, {}, (), (*state.merged, ""))  # no site is left


def _weighed(change: Tree) -> WeightedMean:
    return WeightedMean.of(tree.select(change, lambda name: name != WEIGHT), float(change[WEIGHT]))
