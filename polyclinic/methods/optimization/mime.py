"""Mime: local steps with the server's momentum and a control variate against client drift.

Sai Praneeth Karimireddy, Martin Jaggi, Satyen Kale, Mehryar Mohri, Sashank Reddi, Sebastian Stich and Ananda Theertha
Suresh, "Breaking the centralized barrier for cross-device federated learning", NeurIPS 2021, Algorithm 1 with SGD with
momentum as the base optimizer, https://arxiv.org/abs/2008.03606. All sites have equal weight, as in the paper.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.method import Job, Method, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError
from polyclinic.learning.batch import Batch
from polyclinic.learning.networks.model_tree import cached_model, gradient
from polyclinic.learning.tasks.risk import full_gradient, trained
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining


@savable("mime.State", 1)
class State(NamedTuple):
    """The model x, the momentum m and, between the two requests of a round of Mime, the mean gradient c at x."""

    round: int
    params: Tree
    momentum: Tree
    c: Tree


@dataclass(frozen=True)
class Mime(Method[State]):
    """Local steps with the server's momentum, which sites do not update, and a correction for client drift.

    ``y ← y − η ((1 − β) (∇f(y; ζ) − ∇f(x; ζ) + c) + β m)`` for a minibatch ζ. Sites keep no state, so that sites may
    join and leave. A round takes two requests; MimeLite, without the correction, takes one.

    Attributes:
        beta: β, the momentum.
        lr: Step size of the server along the mean change.
        lite: Whether to omit the correction (MimeLite).
    """

    task: Task
    local: LocalTraining = LocalTraining()
    beta: float = 0.9
    lr: float = 1.0
    lite: bool = False

    def __post_init__(self) -> None:
        if self.local.optimizer != "sgd" or self.local.momentum:
            raise ConfigError(
                'mime applies its own momentum: set training.optimizer = "sgd" and momentum = 0, '
                f"not {self.local.optimizer} with momentum {self.local.momentum:g}"
            )

    def init(self, params: Tree) -> State:
        return State(0, params, tree.zeros(tree.select(params, trained(self.task).__contains__)), {})

    @property
    def jobs(self) -> tuple[Job, ...]:
        return (Job("train"),) if self.lite else (Job("gradient"), Job("train"))

    def request(self, state: State) -> Request:
        if not self.lite and not state.c:
            return Request(state.round, {"params": state.params}, job="gradient")
        return Request(state.round, {"params": state.params, "momentum": state.momentum, "c": state.c})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        x = request.trees["params"]
        if request.job == "gradient":
            return Reply({"gradient": WeightedMean.of(full_gradient(self.task, x, site, request.round))}), memory
        m, c, at_start = request.trees["momentum"], request.trees["c"], dict[str, Tensor]()

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            if c:  # the same minibatch, and the same dropout, at x
                with torch.random.fork_rng(devices=[site.device] if site.device.startswith("cuda") else []):
                    anchor = cached_model(self.task, x, site.device, "anchor")
                    at_start.update(gradient(self.task.loss(anchor, batch), anchor))
            return self.task.loss(model, batch)

        def correct(name: str, g: Tensor) -> Tensor:
            # y ← y - η ((1 - β) (∇f(y; ζ) - ∇f(x; ζ) + c) + β m)
            corrected = g - at_start[name] + c[name].to(g.device) if c else g
            return (1 - self.beta) * corrected + self.beta * m[name].to(g.device)

        y = self.local.fit(self.task, x, site, request.round, loss=loss, gradient_hook=correct)
        parts = {"update": WeightedMean.of(tree.sub(y, x))}
        if self.lite:
            parts["gradient"] = WeightedMean.of(full_gradient(self.task, x, site, request.round))
        return Reply(parts), memory

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        if not self.lite and not state.c:
            return state._replace(c=reply.mean("gradient").value)
        c = reply.mean("gradient").value if self.lite else state.c
        # m ← (1 - β) 1/|S| Σ ∇f_i(x) + β m
        m = tree.zip_with(lambda new, old: (1 - self.beta) * new + self.beta * old, c, state.momentum)
        params = reply.mean("update").apply_to(state.params, self.lr)
        return State(state.round + 1, params, m, {})
