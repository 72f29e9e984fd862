"""FedDyn: a dynamic regularizer aligns the minimum of each site's objective with the global one.

Durmus Alp Emre Acar, Yue Zhao, Ramon Matas, Matthew Mattina, Paul Whatmough and Venkatesh Saligrama, "Federated
Learning Based on Dynamic Regularization", ICLR 2021, Algorithm 1, https://arxiv.org/abs/2111.04263. All sites have
equal weight, as in the paper. Running statistics are updated by the plain mean.
"""

from dataclasses import dataclass
from typing import NamedTuple

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.method import Method, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError
from polyclinic.learning.tasks.risk import trained
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining, Proximal


@savable("feddyn.State", 1)
class State(NamedTuple):
    """The model θ, and h, the server's accumulated client drift."""

    round: int
    params: Tree
    h: Tree


@dataclass(frozen=True)
class FedDyn(Method[State]):
    """FedAvg with a linear and a proximal term in each site's loss; the linear term persists between rounds.

    Site k minimizes ``L_k(θ) − ⟨g_k, θ⟩ + α/2 ‖θ − θ_t‖²``. Unlike FedProx, the stationary points are those of the
    global objective. A smaller α gives larger steps of the server.

    Attributes:
        population: m, the number of sites in the federation.
        alpha: α, 0.01 to 0.1 in the paper.
    """

    task: Task
    population: int
    local: LocalTraining = LocalTraining()
    alpha: float = 0.1

    def __post_init__(self) -> None:
        if not self.alpha > 0:
            raise ConfigError(
                f"alpha must be above 0, not {self.alpha}, since the server divides by it; for alpha = 0 use fedavg"
            )

    def init(self, params: Tree) -> State:
        return State(0, params, tree.zeros(tree.select(params, trained(self.task).__contains__)))

    def request(self, state: State) -> Request:
        return Request(state.round, {"params": state.params})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start = request.trees["params"]
        g = memory.get("gradient", tree.zeros(tree.select(start, trained(self.task).__contains__)))
        # θ_k = argmin L_k(θ) - ⟨g_k, θ⟩ + α/2 ‖θ - θ_t‖²
        local = self.local.with_penalty(Proximal(self.alpha))
        end = local.fit(
            self.task, start, site, request.round, gradient_hook=lambda name, grad: grad - g[name].to(grad.device)
        )
        change = tree.sub(end, start)
        # g_k ← g_k - α (θ_k - θ_t)
        kept = tree.zip_with(lambda old, moved: old - self.alpha * moved, g, tree.select(change, g.__contains__))
        return Reply({"update": WeightedMean.of(change)}), {**memory, "gradient": kept}

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        update = reply.mean("update")
        moved, share = update.value, update.weight / self.population
        # h ← h - α 1/m Σ_{k asked} (θ_k - θ_t);  θ ← mean of θ_k - h / α
        h = tree.zip_with(
            lambda old, x: old - self.alpha * share * x, state.h, tree.select(moved, state.h.__contains__)
        )
        params = tree.shift(tree.shift(state.params, moved), tree.scale(h, -1 / self.alpha))
        return State(state.round + 1, params, h)
