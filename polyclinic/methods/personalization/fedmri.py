"""FedMRI: a shared encoder, a private decoder, and a contrast between the server's and older encoders.

Feng, Yan, Wang, Xu, Shao and Fu, "Specificity-Preserving Federated Learning for MR Image Reconstruction", IEEE
Transactions on Medical Imaging 2022, equations 4 to 7. https://arxiv.org/abs/2112.05752. As in the published code, the
contrast is the ratio of L1 distances over all shared parameters, has no effect in the first step, in which the model is
the server's, and all sites have equal weight.

Departures: the published network for reconstruction has a second U-Net, which works on k-space; it is missing, so that
the contrast covers one encoder. The paper compares with the last encoders of all sites, which discloses every site's
encoder to all. By default a site is compared with its own last encoder only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from polyclinic.core import tree
from polyclinic.core.aggregates import PerSite, Reply, WeightedMean
from polyclinic.core.method import Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.batch import Batch
from polyclinic.learning.networks.model_tree import trainable
from polyclinic.learning.tasks.task import InEncoder, Not, Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.base.site_weights import SizeWeighted
from polyclinic.methods.personalization.partial_personalization import Personal


@savable("fedmri.State", 1)
class State(NamedTuple):
    """The model, and each site's last encoder if sites are compared with one another."""

    round: int
    params: Tree
    encoders: Trees


@dataclass(frozen=True)
class Contrasted(SizeWeighted[State]):
    """FedAvg with ``β · ‖θ − θ_server‖₁ / Σ ‖θ − θ_old‖₁`` added to the loss, over the encoder's parameters.

    Attributes:
        beta: β, the weight of the contrast; 100 in the published configuration.
        weight: λ, the weight of the task's loss.
        others: Whether θ_old are the last encoders of all sites, as in the paper, or the site's own.
        uniform: Whether all sites have equal weight, as in the published code.
    """

    task: Task
    local: LocalTraining = LocalTraining()
    beta: float = 100.0
    weight: float = 1.0
    others: bool = False
    uniform: bool = True

    @property
    def needs_each_reply(self) -> bool:
        return self.others

    def init(self, params: Tree) -> State:
        return State(0, params, {})

    def request(self, state: State) -> Request:
        last = {f"encoder.{name}": leaves for name, leaves in state.encoders.items()}
        return Request(state.round, {"params": state.params, **last})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start = request.trees["params"]
        old = [leaves for name, leaves in request.trees.items() if name.startswith("encoder.")]
        old = old if self.others else [memory["encoder"]] if "encoder" in memory else []
        server, *past = ({n: x.to(site.device) for n, x in leaves.items()} for leaves in (start, *old))

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            value = self.weight * self.task.loss(model, batch)
            return value + self.beta * self._contrast(model, server, past) if past else value

        end = self.local.fit(self.task, start, site, request.round, loss=loss)
        encoder = tree.select(end, InEncoder(self.task))
        weight = self.site_weight(site)
        reply = Reply({"update": WeightedMean.of(tree.sub(end, start), weight)})
        shown = Reply({"encoder": PerSite({site.name: encoder})}) if self.others else Reply()
        return reply + shown, {**memory, "encoder": encoder}

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        shown = reply.gather("encoder") if self.others else {}
        moved = reply.mean("update").apply_to(state.params)
        return State(state.round + 1, moved, {**state.encoders, **shown})

    def _contrast(self, model: nn.Module, server: Tree, old: Sequence[Tree]) -> Tensor:
        """Return ``‖θ − θ_server‖₁ / Σ_k ‖θ − θ_k‖₁``."""
        inside = InEncoder(self.task)
        shared = {name: p for name, p in trainable(model).items() if inside(name)}

        def distance(other: Tree) -> Tensor:
            return torch.stack([(p - other[name]).abs().sum() for name, p in shared.items()]).sum()

        return distance(server) / (torch.stack([distance(other) for other in old]).sum() + 1e-14)


def fedmri(
    task: Task,
    local: LocalTraining,
    *,
    beta: float = 100.0,
    weight: float = 1.0,
    others: bool = False,
    uniform: bool = True,
) -> Personal:
    """Compose the contrast of encoders with a decoder that stays at each site."""
    return Personal(Contrasted(task, local, beta, weight, others, uniform), Not(InEncoder(task)))
