"""FedSLD: shared label distributions.

Jun Luo and Shandong Wu, "FedSLD: Federated Learning with Shared Label Distribution for Medical Image Classification",
ISBI 2022, Algorithm 1 and equation 3, https://arxiv.org/abs/2110.08378. The weight of an example in a minibatch is the
federation's share of its class divided by the minibatch's; the ratio is an interpretation of equation 3.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.job_enumeration import once
from polyclinic.core.method import Job, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.batch import Batch
from polyclinic.learning.tasks.data_sums import class_counts
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.base.site_weights import SizeWeighted


@savable("fedsld.State", 1)
class State(NamedTuple):
    """The model, and the federation's number of examples of each class; empty before they are counted."""

    round: int
    params: Tree
    counts: Tree


@dataclass(frozen=True)
class FedSLD(SizeWeighted[State]):
    """FedAvg whose sites weight examples so that every minibatch has the class distribution of the federation.

    Before the first round the sites' class counts are summed, once; only the sum is needed. This replaces the task's
    class weights and label smoothing.

    Attributes:
        lr: Step size of the server along the mean change.
        uniform: Whether all sites have equal weight, instead of in proportion to their training examples.
    """

    task: Task
    local: LocalTraining = LocalTraining()
    lr: float = 1.0
    uniform: bool = False

    def init(self, params: Tree) -> State:
        return State(0, params, {})

    @property
    def jobs(self) -> tuple[Job, ...]:
        return once("count"), Job("train")

    def request(self, state: State) -> Request:
        job = "train" if state.counts else "count"
        return Request(state.round, {"params": state.params, "counts": state.counts}, job)

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start, data = request.trees["params"], site.data["train"]
        if request.job == "count":
            found = class_counts(data, self.task.network.outputs)
            return Reply({"classes": WeightedMean({"counts": found}, 1.0)}), memory
        counts = request.trees["counts"]["counts"]
        prior = counts / counts.sum()  # p(c) = Σ_i n_{i,c} / Σ_i n_i

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            return balanced(model(batch[0]), batch[1], prior)

        end = self.local.fit(self.task, start, site, request.round, loss=loss)
        weight = 1.0 if self.uniform else float(len(data))
        return Reply({"update": WeightedMean.of(tree.sub(end, start), weight)}), memory

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        if not state.counts:
            return state._replace(counts=reply.mean("classes").total)
        change = tree.scale(reply.mean("update").value, self.lr)
        return State(state.round + 1, tree.shift(state.params, change), state.counts)


def balanced(logits: Tensor, targets: Tensor, prior: Tensor) -> Tensor:
    """Return ``mean_k p(y_k) / p_b(y_k) · CE_k``, with p_b the class shares of this minibatch. Shape []."""
    shares = torch.bincount(targets, minlength=len(prior)).to(logits.dtype) / len(targets)
    ratio = prior.to(logits)[targets] / shares[targets]
    return (ratio * F.cross_entropy(logits, targets, reduction="none")).mean()
