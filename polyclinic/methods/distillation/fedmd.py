"""FedMD: sites exchange what their models say of public images, never the models.

Li and Wang, "FedMD: Heterogenous Federated Learning via Model Distillation", NeurIPS 2019 workshop, Algorithm 1.
https://arxiv.org/abs/1910.03581. The public images here have no labels, so the paper's first training on them is left
out; all are used in every round. Networks are of one kind here. A server with the images distils one for new sites.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.method import Method, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.batch import Batch
from polyclinic.learning.objectives.distillation_loss import answers
from polyclinic.learning.tasks.example_pool import public, size
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining


@savable("fedmd.State", 1)
class State(NamedTuple):
    """What all sites say of the public images on average, and the model of a site that never took part."""

    round: int
    params: Tree
    consensus: Tree


@dataclass(frozen=True)
class FedMD(Method[State]):
    """Each round, sites digest the consensus on public images, revisit their own data, and say what they now think.

    Needs the role ``public``, the same images at every site.

    Attributes:
        digest: How a site learns the consensus, by mean absolute error of scores.
    """

    task: Task
    local: LocalTraining = LocalTraining()
    digest: LocalTraining = LocalTraining()

    def init(self, params: Tree) -> State:
        return State(0, params, {})

    def request(self, state: State) -> Request:
        return Request(state.round, {"params": state.params, "consensus": state.consensus})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        params, images = memory.get("params", request.trees["params"]), public(site.data, site.name, "fedmd")
        params = self._digested(params, request.trees["consensus"], images, site, request.round)
        params = self.local.fit(self.task, params, site, request.round)  # revisit
        scores, _ = answers(self.task, params, images, site.device)
        return Reply({"scores": WeightedMean.of({"scores": scores})}), {**memory, "params": params}

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        consensus = reply.mean("scores").value  # f̃ = Σ_k f_k / m
        params = state.params
        if size(server.data, "public"):
            params = self._digested(params, consensus, public(server.data, "the server", "fedmd"), server, state.round)
        return State(state.round + 1, params, consensus)

    def site_model(self, request: Request, memory: Trees) -> Tree:
        return memory.get("params", request.trees["params"])

    def _digested(self, params: Tree, consensus: Tree, images: object, at: Site, round: int) -> Tree:
        """``params`` after learning to say what everybody says; unchanged before anybody has said anything."""
        if not consensus:
            return params

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            z = model(batch[0])
            return F.l1_loss(z, consensus["scores"][batch[1].cpu()].to(z))

        return self.digest.fit(self.task, params, at, round, data=images, loss=loss, slot="digest")


def fedmd(task: Task, local: LocalTraining, *, digest_epochs: int = 1, digest_lr: float = 0.0) -> FedMD:
    """Sites exchange scores on public images.

    Args:
        digest_epochs: Passes over the public images in which a site learns the consensus.
        digest_lr: The learning rate in those; 0 for that of training.
    """
    return FedMD(task, local, replace(local, epochs=digest_epochs, steps=None, lr=digest_lr or local.lr))
