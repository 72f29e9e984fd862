"""FedFA: feature statistics are drawn anew for each image, farther where the sites differ.

Zhou and Konukoglu, "FedFA: Federated Feature Augmentation", ICLR 2023, equations 4 to 10,
https://arxiv.org/abs/2301.12995, after the published code. Sites send the running mean and deviation of each channel's
statistics; the server computes their variance over sites from sums. Departures: the variance is by channel, as in the
paper, whereas the code takes one number over all channels; the places are the ends of the encoder's resolutions.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.method import Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError
from polyclinic.learning.batch import Batch
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.dp_sgd import refuse_private
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.base.site_weights import SizeWeighted
from polyclinic.methods.harmonization.feature_styles import changed, moments, stages, standardized

MOMENTUM, FLOOR = 0.99, 1e-6


@savable("fedfa.State", 1)
class State(NamedTuple):
    """The model, and by place the mean over sites of the running statistics, and their variance over sites."""

    round: int
    params: Tree
    running: Tree
    variance: Tree


@dataclass(frozen=True)
class FedFA(SizeWeighted[State]):
    """FedAvg whose feature maps have statistics from ``N(μ, (1 + γ) Var)`` in place of their own.

    Var is the variance over the minibatch and γ the relative variance of the channel over sites.

    Attributes:
        probability: Probability with which a place changes a minibatch; 0.5 in the published code.
        uniform: Whether all sites have equal weight, as in the published code, or in proportion to their examples.
    """

    task: Task
    local: LocalTraining = LocalTraining()
    probability: float = 0.5
    uniform: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ConfigError(f"fedfa: probability must be between 0 and 1, not {self.probability:g}")
        refuse_private(self.local, "fedfa", "the variance of a minibatch enters the loss")
        stages(self.task.network)  # refuses networks without feature maps

    def init(self, params: Tree) -> State:
        places = stages(self.task.network)
        running = {
            f"{name}/{part}": torch.full((c,), v) for name, c in places for part, v in (("mean", 0.0), ("std", 1.0))
        }
        return State(0, params, running, {name: torch.ones_like(leaf) for name, leaf in running.items()})

    def request(self, state: State) -> Request:
        return Request(state.round, {"params": state.params, "running": state.running, "variance": state.variance})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start, running = request.trees["params"], dict(request.trees["running"])
        factors = {name: relative(leaf) for name, leaf in request.trees["variance"].items()}
        places = [name for name, _ in stages(self.task.network)]

        def augment(name: str, x: Tensor) -> Tensor:
            if float(torch.rand(())) >= self.probability or len(x) < 2:
                return x
            new, old = [], moments(x)
            for part, value in zip(("mean", "std"), old, strict=True):
                key = f"{name}/{part}"
                running[key] = MOMENTUM * running[key] + (1 - MOMENTUM) * value.detach().mean(0).cpu()
                spread = ((factors[key].to(x) + 1) * (value.var(0) + FLOOR)).sqrt()
                new.append(value + spread * torch.randn_like(value))
            return standardized(x, *old, *new)

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            with changed(model, places, augment):
                return self.task.loss(model, batch)

        end = self.local.fit(self.task, start, site, request.round, loss=loss if self.probability else None)
        sums = {name: leaf.double() for name, leaf in running.items()}  # whose differences are small
        found = WeightedMean.of({**sums, **{f"{name}/square": leaf.square() for name, leaf in sums.items()}})
        return Reply({"update": self.update(end, start, site), "statistics": found}), memory

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        found = reply.mean("statistics")
        mean = tree.select(found.value, state.running.__contains__)
        # the variance over K sites, K / (K − 1) (E[m²] − E[m]²)
        by = found.weight / (found.weight - 1) if found.weight > 1 else 0.0
        variance = {n: (by * (found.value[f"{n}/square"] - leaf.square())).clamp_min(0) for n, leaf in mean.items()}
        running, spread = ({n: leaf.float() for n, leaf in part.items()} for part in (mean, variance))
        return State(state.round + 1, reply.mean("update").apply_to(state.params), running, spread)


def relative(variance: Tensor) -> Tensor:
    """Return γ ``= C s / Σ s`` with ``s = 1 / (1 + 1 / V)``, for the variances V [C] of the channels over sites."""
    s = 1 / (1 + 1 / (variance + FLOOR))
    return len(s) * s / s.sum()
