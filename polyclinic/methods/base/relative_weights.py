"""Weights that are relative to sums over sites, from no paper of their own: a round takes two exchanges.

The sites first send numbers, which are summed, and receive the sums; then each site weights its own change. The numbers
and the changes of single sites remain hidden under secure summation.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.method import Capabilities, Job, Method, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.tasks.risk import risk
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining


@savable("relative-weights.State", 1)
class State(NamedTuple):
    """The model and, between the two requests of a round, the sums over sites."""

    round: int
    params: Tree
    sums: Tree


@dataclass(frozen=True)
class RelativeWeights(Method[State]):
    """FedAvg in which a site's weight follows from its examples, its losses, and the sums of such numbers over sites.

    A loss is that of the site's trained model on its training examples.
    """

    task: Task
    local: LocalTraining = LocalTraining()

    capabilities = Capabilities(uniform=False)

    @abstractmethod
    def amounts(self, examples: int, losses: Sequence[float]) -> Tree:
        """Return the numbers of a site that are summed, from the ``losses`` that it kept and then the newest."""

    @abstractmethod
    def weight(self, own: Tree, sums: Tree) -> float:
        """Return a site's weight from its ``amounts`` and their sums. The mean divides by the sum of all weights."""

    def kept(self, losses: Sequence[float]) -> Sequence[float]:
        """Return the losses that a site keeps for later rounds; none by default."""
        return ()

    def init(self, params: Tree) -> State:
        return State(0, params, {})

    @property
    def jobs(self) -> tuple[Job, ...]:
        return Job("train"), Job("send", at_start=False)

    def request(self, state: State) -> Request:
        return Request(state.round, {"params": state.params, "sums": state.sums}, "send" if state.sums else "train")

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        if request.job == "send" and "change" not in memory:
            return Reply(), memory  # the site was lost before it sent its numbers
        if request.job == "send":
            weight = self.weight(memory["amounts"], request.trees["sums"])
            rest = {name: leaves for name, leaves in memory.items() if name not in ("change", "amounts")}
            return Reply({"update": WeightedMean.of(memory["change"], weight)}), rest
        start = request.trees["params"]
        end = self.local.fit(self.task, start, site, request.round)
        past = memory["losses"]["last"].tolist() if "losses" in memory else []
        losses = [*past, risk(self.task, end, site, request.round)]
        own = {"amounts": self.amounts(len(site.data["train"]), losses), "change": tree.sub(end, start)}
        if kept := self.kept(losses):
            own["losses"] = {"last": torch.tensor(kept, dtype=torch.float64)}
        return Reply({"amounts": WeightedMean(own["amounts"], 1.0)}), {**memory, **own}

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        if not state.sums:
            return state._replace(sums=reply.mean("amounts").total)
        return State(state.round + 1, reply.applied("update", state.params), {})


def numbers(**values: float) -> Tree:
    """Return ``values`` in double precision."""
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
