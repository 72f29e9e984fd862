"""FedLWS: the averaged model is shrunk layer by layer, more where the sites disagree.

Shi, Li, Zhao, Zhou, Guo and Chang, "FedLWS: Federated Learning with Adaptive Layer-wise Weight Shrinking", ICLR 2025,
equations 6 and 7, https://arxiv.org/abs/2503.15111, after the published code. Departures: a layer is a module's
trainable tensors, whereas the code cuts the list of all tensors after each bias; running statistics are not shrunk.
"""

from dataclasses import dataclass

import torch

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply
from polyclinic.core.method import Request
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError
from polyclinic.learning.tasks.risk import trained
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.base.visible_updates import VisibleUpdates
from polyclinic.methods.optimization.fedavg import State
from polyclinic.methods.robust.rules.aggregation_rule import Updates


@dataclass(frozen=True)
class FedLWS(VisibleUpdates[State]):
    """FedAvg whose mean is multiplied by ``γ_l = ‖w_l‖ / (‖w_l‖ + τ_l ‖Δ_l‖)`` in each layer l.

    ``τ_l`` is β times the mean distance of the sites' changes of the layer from their mean, between two bounds.

    Attributes:
        beta: β; 0.03 in the published code.
        least: The smallest τ; 0.01 in the published code.
        most: The largest τ; 0.2 in the published code.
    """

    task: Task
    local: LocalTraining = LocalTraining()
    beta: float = 0.03
    least: float = 0.01
    most: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.least <= self.most or self.beta < 0:
            raise ConfigError("fedlws: beta and least must be at least 0, and most at least as large as least")

    def init(self, params: Tree) -> State:
        return State(0, params)

    def request(self, state: State) -> Request:
        return Request(state.round, {"params": state.params})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start = request.trees["params"]
        return self.visible(self.local.change(self.task, start, site, request.round), site), memory

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        changes, sizes = self.received(reply)
        mean = Updates.of(changes).blend(sizes / sizes.sum())
        moved, layers = dict(tree.shift(state.params, mean)), dict[str, list[str]]()
        for name in (name for name in moved if name in trained(self.task)):
            layers.setdefault(name.rpartition(".")[0], []).append(name)
        for names in layers.values():
            by = self.shrinkage(*(tree.select(t, names.__contains__) for t in (state.params, mean, *changes.values())))
            moved |= {name: moved[name] * by for name in names}
        return State(state.round + 1, moved)

    def shrinkage(self, old: Tree, mean: Tree, *changes: Tree) -> float:
        """Return γ of one layer, from its weights, their mean change, and the change at each site."""
        updates = Updates.of({f"{k:09}": change for k, change in enumerate(changes)})
        even = torch.full((len(changes),), 1 / len(changes), dtype=torch.float64)
        along = updates.gram @ even
        apart = (updates.gram.diagonal() - 2 * along + even @ along).clamp_min(0).sqrt()
        tau = min(max(self.beta * float(apart.mean()), self.least), self.most)
        size = tree.norm(old)
        return size / (size + tau * tree.norm(mean)) if size else 1.0
