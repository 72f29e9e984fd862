"""FedMD: sites exchange predictions on public images instead of models.

Li and Wang, "FedMD: Heterogenous Federated Learning via Model Distillation", NeurIPS 2019 workshop, Algorithm 1.
https://arxiv.org/abs/1910.03581. Departures: the public images have no labels, so that the paper's initial training on
them is omitted; all are used in every round; all sites have the same network. A server with the images distills a model
for new sites.
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
    """The mean prediction of all sites on the public images, and the model for sites that never took part."""

    round: int
    params: Tree
    consensus: Tree


@dataclass(frozen=True)
class FedMD(Method[State]):
    """Each round, sites learn the consensus on public images, train on their own data, and send new predictions.

    Needs the role ``public``, the same images at every site.

    Attributes:
        digest_epochs: Epochs over the public images in which a site learns the consensus, by mean absolute error of
            scores.
        digest_lr: The learning rate in those; 0 for that of training.
    """

    task: Task
    local: LocalTraining = LocalTraining()
    digest_epochs: int = 1
    digest_lr: float = 0.0

    @property
    def digest(self) -> LocalTraining:
        """A site's training on the consensus."""
        return replace(self.local, epochs=self.digest_epochs, steps=None, lr=self.digest_lr or self.local.lr)

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
        """Return ``params`` after learning the consensus; unchanged before there is one."""
        if not consensus:
            return params

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            z = model(batch[0])
            return F.l1_loss(z, consensus["scores"][batch[1].cpu()].to(z))

        return self.digest.fit(self.task, params, at, round, data=images, loss=loss, slot="digest")
