"""FedSpeed: a proximal term with a correction at each site, and steps towards flat minima.

Sun, Shen, Huang, Ding and Tao, "FedSpeed: Larger Local Interval, Less Communication Round, and Higher Generalization
Accuracy", ICLR 2023, Algorithm 1, https://arxiv.org/abs/2302.10429. After the published code: the gradient is that of
the perturbed weights alone (α = 1), and the proximal weight is ``lam``, the paper's 1/λ. All sites have equal weight.
Departure: the first pass of a step does not update running statistics.
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
from polyclinic.learning.training.dp_sgd import refuse_private
from polyclinic.learning.training.local import LocalTraining, Proximal
from polyclinic.learning.training.sharpness import sharpened


@savable("fedspeed.State", 1)
class State(NamedTuple):
    """The model, and the mean correction over all sites, including those that were not asked."""

    round: int
    params: Tree
    correction: Tree


@dataclass(frozen=True)
class FedSpeed(Method[State]):
    """FedAvg whose sites minimize ``F(w + δ) + λ/2 ‖w − w_t‖² + λ ⟨h_i, w⟩``; h_i sums the site's changes.

    Attributes:
        population: N, the number of sites in the federation.
        lam: λ, the weight of the proximal term; 0.1 in the published code.
        rho: ρ, the length of the perturbation of the weights; 0.1 in the published code.
    """

    task: Task
    population: int
    local: LocalTraining = LocalTraining()
    lam: float = 0.1
    rho: float = 0.1

    def __post_init__(self) -> None:
        if self.lam < 0 or self.rho < 0:
            raise ConfigError(f"fedspeed: lam and rho must be at least 0, not {self.lam:g} and {self.rho:g}")
        refuse_private(self.local, "fedspeed", "the weights are perturbed along the gradient of a minibatch")

    def init(self, params: Tree) -> State:
        return State(0, params, tree.zeros(tree.select(params, trained(self.task).__contains__)))

    def request(self, state: State) -> Request:
        return Request(state.round, {"params": state.params})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start = request.trees["params"]
        h = memory.get("correction", tree.zeros(tree.select(start, trained(self.task).__contains__)))
        end = self.local.with_penalty(Proximal(self.lam)).fit(
            self.task,
            start,
            site,
            request.round,
            loss=sharpened(self.task.loss, self.rho),
            gradient_hook=lambda name, g: g + self.lam * h[name].to(g.device),
        )
        change = tree.sub(end, start)
        # h_i ← h_i + (w_i − w_t)
        kept = tree.add(h, tree.select(change, h.__contains__))
        return Reply({"update": WeightedMean.of(change)}), {**memory, "correction": kept}

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        update = reply.mean("update")
        moved, share = update.value, update.weight / self.population
        # w ← mean of w_i + 1/N Σ_i h_i
        own = tree.select(moved, state.correction.__contains__)
        correction = tree.add(state.correction, tree.scale(own, share))
        return State(state.round + 1, tree.shift(tree.shift(state.params, moved), correction), correction)
