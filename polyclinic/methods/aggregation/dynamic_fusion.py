"""Dynamic fusion: a site sends its model only if training improved it.

Weishan Zhang, Tao Zhou, Qinghua Lu, Xiao Wang, Chunsheng Zhu, Haoyun Sun, Zhipeng Wang, Sin Kit Lo and Fei-Yue Wang,
"Dynamic-Fusion-Based Federated Learning for COVID-19 Detection", IEEE Internet of Things Journal 8 (2021), 15884-15891,
https://arxiv.org/abs/2009.10401. Departures: participation depends on the validation loss, not accuracy, so that every
kind of task can use it; the paper's time limit, which follows the participants' last times, is the driver's
``deadline``.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from polyclinic.core import tree
from polyclinic.core.aggregates import PerSiteUniform, Reply, WeightedMean
from polyclinic.core.method import Job, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.tasks.risk import risk
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.base.site_weights import SizeWeighted


@savable("dynamic-fusion.State", 1)
class State(NamedTuple):
    """The model and, between the two requests of a round, the sites whose models improved."""

    round: int
    params: Tree
    better: tuple[str, ...]


@dataclass(frozen=True)
class DynamicFusion(SizeWeighted[State]):
    """FedAvg over the sites whose training reduced the validation loss; the others send one bit.

    A site trains from the server's model and compares the result with that model on its validation data. A site that
    does not send its change starts from the mean again in the next round.

    Attributes:
        margin: The least decrease of the validation loss for which a change is sent.
        uniform: Whether all sites have equal weight, instead of in proportion to their training examples.
    """

    task: Task
    local: LocalTraining = LocalTraining()
    margin: float = 0.0
    uniform: bool = False

    needs_each_reply = True

    def init(self, params: Tree) -> State:
        return State(0, params, ())

    @property
    def jobs(self) -> tuple[Job, ...]:
        return Job("train"), Job("send")

    def request(self, state: State) -> Request:
        if state.better:
            return Request(state.round, {"params": state.params}, job="send", recipients=state.better)
        return Request(state.round, {"params": state.params})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start = request.trees["params"]
        if request.job == "send":
            weight = self.site_weight(site)
            kept = {name: t for name, t in memory.items() if name != "change"}
            return Reply({"update": WeightedMean.of(memory["change"], weight)}), kept
        end = self.local.fit(self.task, start, site, request.round)
        gain = risk(self.task, start, site, request.round, "val") - risk(self.task, end, site, request.round, "val")
        better = {"better": torch.tensor(float(gain > self.margin))}
        return Reply({"gain": PerSiteUniform({site.name: better})}), {**memory, "change": tree.sub(end, start)}

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        if state.better:
            moved = reply.mean("update").apply_to(state.params) if reply.parts else state.params
            return State(state.round + 1, moved, ())
        better = tuple(sorted(site for site, gain in reply.gather("gain").items() if gain["better"] > 0))
        return state._replace(better=better) if better else State(state.round + 1, state.params, ())
