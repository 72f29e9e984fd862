"""Dynamic fusion: a site sends its model only where training made it better.

Weishan Zhang, Tao Zhou, Qinghua Lu, Xiao Wang, Chunsheng Zhu, Haoyun Sun, Zhipeng Wang, Sin Kit Lo and Fei-Yue Wang,
"Dynamic-Fusion-Based Federated Learning for COVID-19 Detection", IEEE Internet of Things Journal 8 (2021), 15884-15891,
https://arxiv.org/abs/2009.10401. Whether to take part is decided from validation accuracy there, from the validation
loss here, so that every kind of task can use it. Its other half, a time limit that follows the participants' last
times, is the driver's ``deadline``.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from polyclinic.core import tree
from polyclinic.core.aggregates import PerSiteUniform, Reply, WeightedMean
from polyclinic.core.method import Capabilities, Job, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.tasks.risk import risk
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.base.site_weights import SizeWeighted


@savable("dynamic-fusion.State", 1)
class State(NamedTuple):
    """The model and, between the two exchanges of a round, which sites have something better to send."""

    round: int
    params: Tree
    better: tuple[str, ...]


@dataclass(frozen=True)
class DynamicFusion(SizeWeighted[State]):
    """FedAvg over the sites whose training helped; the others send one bit.

    A site trains from the server's model, and compares what came of it with that model on its validation data. What the
    others learned is not lost to it: it starts from the mean again in the next round.

    Attributes:
        margin: By how much the validation loss must fall, for the change to be worth sending.
    """

    task: Task
    local: LocalTraining = LocalTraining()
    margin: float = 0.0
    uniform: bool = False

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(needs_each_reply=True, uniform=self.uniform)

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
        said = {"better": torch.tensor(float(gain > self.margin))}
        return Reply({"said": PerSiteUniform({site.name: said})}), {**memory, "change": tree.sub(end, start)}

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        if state.better:
            moved = reply.mean("update").apply_to(state.params) if reply.parts else state.params
            return State(state.round + 1, moved, ())
        better = tuple(sorted(site for site, said in reply.gather("said").items() if said["better"] > 0))
        return state._replace(better=better) if better else State(state.round + 1, state.params, ())
