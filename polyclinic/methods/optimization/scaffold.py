"""SCAFFOLD: stochastic controlled averaging.

Karimireddy, Kale, Mohri, Reddi, Stich and Suresh, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning",
ICML 2020, Algorithm 1 with option II. https://arxiv.org/abs/1910.06378. All sites have equal weight, as in the paper,
unless ``uniform`` is false: then a site weighs as many as its training examples in both means, of the models and of the
control variates, so that c remains the mean of all c_i under the weights of the objective. Option II divides by the
learning rate, so that training must use plain SGD.
"""

from dataclasses import dataclass
from typing import NamedTuple

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.method import Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError
from polyclinic.learning.networks.model_tree import trainable
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.base.site_weights import SizeWeighted


@savable("scaffold.State", 1)
class State(NamedTuple):
    """The model x and the server's control variate c."""

    round: int
    params: Tree
    control: Tree


@dataclass(frozen=True)
class Scaffold(SizeWeighted[State]):
    """FedAvg whose sites correct each gradient by a control variate: ``g − c_i + c``.

    Attributes:
        population: N, the number of sites in the federation.
        lr: η_g, the step size of the server.
        uniform: Whether all sites have equal weight, as in the paper, instead of in proportion to their training
            examples.
    """

    task: Task
    population: int
    local: LocalTraining = LocalTraining()
    lr: float = 1.0
    uniform: bool = True

    def __post_init__(self) -> None:
        if self.local.optimizer != "sgd" or self.local.momentum:
            raise ConfigError(
                'scaffold\'s correction is for plain SGD: set training.optimizer = "sgd" and momentum = 0, '
                f"not {self.local.optimizer} with momentum {self.local.momentum:g}"
            )

    def init(self, params: Tree) -> State:
        trained = trainable(self.task.model())
        return State(0, params, tree.zeros(tree.select(params, trained.__contains__)))

    def request(self, state: State) -> Request:
        return Request(state.round, {"params": state.params, "control": state.control})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        x, c, data = request.trees["params"], request.trees["control"], site.data["train"]
        c_i = memory.get("control", tree.zeros(c))
        drift = tree.sub(c, c_i)
        y = self.local.fit(
            self.task,
            x,
            site,
            request.round,
            gradient_hook=lambda name, g: g + drift[name].to(g.device) if name in drift else g,
        )
        # c_i⁺ = c_i − c + (x − y) / (K η_l)
        moved = tree.select(tree.sub(x, y), c.__contains__)
        distance = self.local.distance(request.round, self.local.count(data))  # K η_l
        c_new = tree.sub(tree.scale(moved, 1 / distance), drift)
        parts = {
            "update": self.update(y, x, site),
            "control": WeightedMean.of(tree.sub(c_new, c_i), self.site_weight(site)),
        }
        if not self.uniform:
            parts["sites"] = WeightedMean.of({})  # its weight counts them
        return Reply(parts), {**memory, "control": c_new}

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        share = reply.mean("control" if self.uniform else "sites").weight / self.population  # |S| / N
        return State(
            state.round + 1,
            reply.mean("update").apply_to(state.params, self.lr),
            tree.add(state.control, tree.scale(reply.mean("control").value, share)),
        )
