"""Mime: sites take the server's momentum along, and correct their steps as if they held everybody's data.

Sai Praneeth Karimireddy, Martin Jaggi, Satyen Kale, Mehryar Mohri, Sashank Reddi, Sebastian Stich and Ananda Theertha
Suresh, "Breaking the centralized barrier for cross-device federated learning", NeurIPS 2021, Algorithm 1 with SGD with
momentum as the base, https://arxiv.org/abs/2008.03606. Sites count the same, as there.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from polyclinic.core import tree
from polyclinic.core.method import Ask, Job, Method
from polyclinic.core.site import Site
from polyclinic.core.state import savable
from polyclinic.core.stats import Mean, Reply
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError
from polyclinic.tasks.local import Local
from polyclinic.tasks.model import gradient
from polyclinic.tasks.risk import full_gradient, trained
from polyclinic.tasks.task import Batch, Task, borrow


@savable("mime.State", 1)
class State(NamedTuple):
    """The model x, the momentum m and, between the two exchanges of a round of Mime, the mean gradient c at x."""

    round: int
    params: Tree
    momentum: Tree
    c: Tree


@dataclass(frozen=True)
class Mime(Method[State]):
    """Local steps with the server's momentum, which no site changes, and a correction against drift.

    Keeps nothing at the sites, so that it suits sites that come and go. Two exchanges a round; ``lite`` leaves the
    correction out and needs one.

    Attributes:
        beta: β, the momentum.
        lr: The server's step along the mean change.
        lite: Whether to leave the correction out (MimeLite).
    """

    task: Task
    local: Local = Local()
    beta: float = 0.9
    lr: float = 1.0
    lite: bool = False

    def __post_init__(self) -> None:
        if self.local.optimiser != "sgd" or self.local.momentum:
            raise ConfigError(
                'mime brings its own momentum: set training.optimiser = "sgd" and momentum = 0, '
                f"not {self.local.optimiser} with momentum {self.local.momentum:g}"
            )

    def init(self, params: Tree) -> State:
        return State(0, params, tree.zeros(tree.select(params, trained(self.task).__contains__)), {})

    @property
    def jobs(self) -> tuple[Job, ...]:
        return (Job("train"),) if self.lite else (Job("gradient"), Job("train"))

    def ask(self, state: State) -> Ask:
        if not self.lite and not state.c:
            return Ask(state.round, {"params": state.params}, job="gradient")
        return Ask(state.round, {"params": state.params, "momentum": state.momentum, "c": state.c})

    def site_update(self, ask: Ask, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        x = ask.trees["params"]
        if ask.job == "gradient":
            return Reply({"gradient": Mean.of(full_gradient(self.task, x, site, ask.round))}), memory
        m, c, there = ask.trees["momentum"], ask.trees["c"], dict[str, Tensor]()

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            if c:  # the same minibatch, and the same dropout, at x
                with torch.random.fork_rng(devices=[site.device] if site.device.startswith("cuda") else []):
                    anchor = borrow(self.task, x, site.device, "anchor")
                    there.update(gradient(self.task.loss(anchor, batch), anchor))
            return self.task.loss(model, batch)

        def correct(name: str, g: Tensor) -> Tensor:
            # y ← y - η ((1 - β) (∇f(y; ζ) - ∇f(x; ζ) + c) + β m)
            whole = g - there[name] + c[name].to(g.device) if c else g
            return (1 - self.beta) * whole + self.beta * m[name].to(g.device)

        y = self.local.fit(self.task, x, site, ask.round, loss=loss, correct=correct)
        parts = {"update": Mean.of(tree.sub(y, x))}
        if self.lite:
            parts["gradient"] = Mean.of(full_gradient(self.task, x, site, ask.round))
        return Reply(parts), memory

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        if not self.lite and not state.c:
            return state._replace(c=reply.mean("gradient").value)
        c = reply.mean("gradient").value if self.lite else state.c
        # m ← (1 - β) 1/|S| Σ ∇f_i(x) + β m
        m = tree.zip_with(lambda new, old: (1 - self.beta) * new + self.beta * old, c, state.momentum)
        params = reply.mean("update").added_to(state.params, self.lr)
        return State(state.round + 1, params, m, {})


def mime(task: Task, local: Local, *, beta: float = 0.9, lr: float = 1.0) -> Mime:
    """Local steps with the server's momentum, corrected against drift."""
    return Mime(task, local, beta, lr)


def mime_lite(task: Task, local: Local, *, beta: float = 0.9, lr: float = 1.0) -> Mime:
    """Local steps with the server's momentum."""
    return Mime(task, local, beta, lr, lite=True)
