"""FedNova: changes are averaged per unit of work, so that sites with more steps do not dominate.

Wang, Liu, Liang, Joshi and Poor, "Tackling the Objective Inconsistency Problem in Heterogeneous Federated
Optimization", NeurIPS 2020, equations 6 and 7 and, for ‖a‖₁, sections 3 and 4. https://arxiv.org/abs/2007.07481.
Running statistics are not weights and are updated by the plain mean.
"""

from dataclasses import dataclass

import torch

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.method import Request
from polyclinic.core.site import Site
from polyclinic.core.tree import Trees
from polyclinic.errors import ConfigError
from polyclinic.learning.tasks.task import InRunningStatistics
from polyclinic.learning.training.local import Proximal
from polyclinic.methods.optimization.fedavg import FedAvg, State


def accumulation(steps: int, momentum: float = 0.0, shrink: float = 0.0) -> float:
    """Return ‖a‖₁: the accumulated effect of a constant gradient over ``steps`` steps of SGD, in steps.

    Args:
        momentum: ρ. With it, ``‖a‖₁ = (τ − ρ (1 − ρ^τ) / (1 − ρ)) / (1 − ρ)``.
        shrink: α = η μ, of a proximal penalty. With it, ``‖a‖₁ = (1 − (1 − α)^τ) / α``.
    """
    if momentum and shrink:
        raise ConfigError(
            "FedNova's formula is for momentum or for a proximal penalty, not for both: set one of them to 0"
        )
    if shrink:
        return (1 - (1 - shrink) ** steps) / shrink
    return (steps - momentum * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)


@dataclass(frozen=True)
class FedNova(FedAvg):
    """FedAvg whose sites send their change per unit of local work.

    If sites take different numbers of steps (more data, faster machines), FedAvg converges to the minimum of a
    different objective. Each change is therefore divided by its work ‖a_i‖₁, averaged, and multiplied with the mean
    work.

    Attributes:
        mu: μ, the weight of a proximal term (FedProx); 0 for none.
    """

    mu: float = 0.0

    def __post_init__(self) -> None:
        if self.local.optimizer != "sgd":
            raise ConfigError(
                f'FedNova normalizes the work of SGD: set training.optimizer = "sgd", not {self.local.optimizer}'
            )
        accumulation(1, self.local.momentum, self.mu)
        if self.local.schedule or self.local.nesterov or self.local.keeps_optimizer:
            raise ConfigError(
                "FedNova's formula is for steps of one size and a momentum that begins anew each round: remove "
                "schedule and nesterov, and set keep_optimizer = false"
            )

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start = request.trees["params"]
        local = self.local.with_penalty(Proximal(self.mu)) if self.mu else self.local
        end = local.fit(self.task, start, site, request.round)
        shrink = self.mu * local.rate(request.round)
        a = accumulation(local.count(site.data["train"]), local.momentum, shrink)
        running, change = InRunningStatistics(self.task), tree.sub(end, start)
        # d_i = (x − x_i) / ‖a_i‖₁
        per_work = {name: d if running(name) else d / max(a, 1.0) for name, d in change.items()}
        weight = self.site_weight(site)
        work = WeightedMean.of({"work": torch.tensor(a, dtype=torch.float64)}, weight)
        return Reply({"update": WeightedMean.of(per_work, weight), "work": work}), memory

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        tau = float(reply.mean("work").value["work"])  # τ_eff = Σ p_i ‖a_i‖₁
        running = InRunningStatistics(self.task)
        # x ← x − τ_eff Σ p_i d_i
        mean = reply.mean("update").value
        change = {name: d * (1.0 if running(name) else tau * self.lr) for name, d in mean.items()}
        return State(state.round + 1, tree.shift(state.params, change))
