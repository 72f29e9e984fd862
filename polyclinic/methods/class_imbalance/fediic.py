"""FedIIC: contrasts within and across sites, and margins for classes that are rare at a site or difficult for all.

Wu, Yu, Cheng and Yan, "FedIIC: Towards Robust Federated Learning for Class-Imbalanced Medical Image Classification",
MICCAI 2023, Algorithm 1, https://arxiv.org/abs/2206.13803, after the published code. A round takes two requests: sums
of the losses of each class, then training. Departure: the two views of an image are flipped, turned and shifted, as
those of other methods here, and keep their colors.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.method import Job, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError
from polyclinic.learning.batch import Batch
from polyclinic.learning.networks.latent import pooled, represent
from polyclinic.learning.networks.model_tree import cached_model
from polyclinic.learning.objectives.distillation_loss import Said, answers
from polyclinic.learning.tasks.data_sums import class_counts
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.augmentation import WEAK
from polyclinic.learning.training.dp_sgd import refuse_private
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.base.site_weights import SizeWeighted
from polyclinic.methods.class_imbalance.balanced_contrast import Projecting, across, last_layer, prototypes, within
from polyclinic.methods.class_imbalance.logit_adjustment import FEWEST
from polyclinic.methods.multitask.gated_experts import begin


@savable("fediic.State", 1)
class State(NamedTuple):
    """The network with its projector; between the requests of a round, mean ``losses`` [C] and ``prototypes``."""

    round: int
    params: Tree
    known: Tree


@dataclass(frozen=True)
class FedIIC(SizeWeighted[State]):
    """FedAvg with ``CE(z + log(p / (l^d + 10⁻⁵))) + k₁ L_within + k₂ L_across``.

    Attributes:
        within_weight: k₁; 2 in the published code.
        across_weight: k₂; 2 in the published code.
        difficulty: d; 0.25 in the published code.
        width: Length of a projection; 1024 in the published code.
        uniform: Whether all sites have equal weight, instead of in proportion to their training examples.
    """

    task: Task
    local: LocalTraining = LocalTraining()
    within_weight: float = 2.0
    across_weight: float = 2.0
    difficulty: float = 0.25
    width: int = 1024
    uniform: bool = False

    def __post_init__(self) -> None:
        refuse_private(self.local, "fediic", "the images of a minibatch are compared")
        if min(self.within_weight, self.across_weight, self.difficulty) < 0 or self.width < 1:
            raise ConfigError("fediic: both weights and difficulty must be at least 0, and width at least 1")

    @property
    def prediction_task(self) -> Any:
        return self.task.with_network(Projecting(self.task.network, self.width))

    def init(self, params: Tree) -> State:
        return State(0, begin(self.prediction_task, params), {})

    @property
    def jobs(self) -> tuple[Job, ...]:
        return Job("losses"), Job("train")

    def request(self, state: State) -> Request:
        job = "train" if state.known else "losses"
        return Request(state.round, {"params": state.params, "known": state.known}, job)

    def evaluation_request(self, state: State) -> Request:
        return Request(state.round, {"params": state.params})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start, task, data = request.trees["params"], self.prediction_task, site.data["train"]
        if request.job == "losses":
            z, y = answers(task, start, data, site.device)
            of = F.one_hot(y, task.network.outputs).double()
            sums = {"loss": of.T @ F.cross_entropy(z, y, reduction="none").double(), "count": of.sum(0)}
            return Reply({"losses": WeightedMean(sums, 1.0)}), memory
        counts, rng = class_counts(data, task.network.outputs), site.rng(request.round, "views")
        share, centers = (counts / counts.sum()).to(site.device), request.trees["known"]["prototypes"].to(site.device)
        hard = request.trees["known"]["losses"].to(share) ** self.difficulty + 1e-5
        margin = (share.clamp_min(FEWEST) / hard).log()

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            h, z = represent(task.network, model, torch.cat([WEAK.view(batch[0], rng) for _ in range(2)]))
            f, y = F.normalize(model.get_submodule("projector")(pooled(h)), dim=1), batch[1].repeat(2)
            value = self.task.loss(Said(z[: len(batch[1])] + margin.to(z)), batch)
            value = value + self.within_weight * within(f, y, share.to(f))
            return value + self.across_weight * across(f, y, centers)

        end = self.local.fit(task, start, site, request.round, loss=loss)
        return Reply({"update": self.update(end, start, site)}), memory

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        if state.known:
            return State(state.round + 1, reply.mean("update").apply_to(state.params), {})
        sums, task = reply.mean("losses").total, self.prediction_task
        model = cached_model(task, state.params, server.device, "prototypes")
        with torch.no_grad():
            projected = model.get_submodule("projector")(last_layer(task.network, model)).cpu()
        losses = (sums["loss"] / (sums["count"] + 1e-5)).float()
        return state._replace(known={"losses": losses, "prototypes": prototypes(projected)})
