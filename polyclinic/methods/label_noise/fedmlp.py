"""FedMLP: sites that label different findings complete each other's labels, by prototypes of the federation.

Sun, Wu, Yan and Cheng, "FedMLP: Federated Multi-Label Medical Image Classification under Task Heterogeneity", MICCAI
2024, Algorithm 1, https://arxiv.org/abs/2406.18995, after the published code: first every site trains on the findings
that it labels and follows the received model for the others; then the images nearest to a prototype of a missing
finding are labeled with it, more in every round. A finding that no example of a site labels is missing there; unknown
labels are NaN. Departure: the two views are flipped, turned and shifted, as those of other methods here.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyclinic.core.aggregates import ElementwiseMean, Reply
from polyclinic.core.method import Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError
from polyclinic.learning.batch import Batch, targets_of
from polyclinic.learning.networks.latent import encode_all, encoded_width
from polyclinic.learning.networks.model_tree import cached_model
from polyclinic.learning.tasks.relabeled import Relabeled
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.augmentation import WEAK
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.base.site_weights import SizeWeighted


@savable("fedmlp.State", 1)
class State(NamedTuple):
    """The model, and the mean features of images without and with each finding: ``mean`` [L, 2, F]."""

    round: int
    params: Tree
    prototypes: Tree


@dataclass(frozen=True)
class FedMLP(SizeWeighted[State]):
    """FedAvg of labels with gaps: distillation of missing findings first, then pseudo-labels by prototypes.

    Attributes:
        rounds: Number of planned rounds.
        warmup: Share of the rounds before missing findings are labeled; 0.1 in the published code.
        without: Share of the remaining images that are labeled as free of a missing finding in a round, of those nearer
            to its prototype of images without; 0.005 in the published code.
        having: The same of those that are labeled as having it; 0.01.
        uniform: Whether all sites have equal weight, instead of in proportion to their training examples.
    """

    task: Task
    rounds: int
    local: LocalTraining = LocalTraining()
    warmup: float = 0.1
    without: float = 0.005
    having: float = 0.01
    uniform: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.warmup < 1 or not 0 <= self.without <= 1 or not 0 <= self.having <= 1:
            raise ConfigError("fedmlp: warmup is a share of the rounds between 0 and 1, without and having from 0 to 1")

    @property
    def wait(self) -> int:
        """Number of rounds before missing findings are labeled."""
        return max(math.ceil(self.warmup * self.rounds), 1)

    def init(self, params: Tree) -> State:
        shape = (self.task.network.outputs, 2, encoded_width(self.task.network))
        return State(0, params, {"mean": torch.zeros(shape)})

    def request(self, state: State) -> Request:
        return Request(state.round, {"params": state.params, "prototypes": state.prototypes})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start, data = request.trees["params"], site.data["train"]
        given, rng = targets_of(data), site.rng(request.round, "views")
        missing = ~given.isfinite().any(0)
        labels, late = memory["labels"]["y"] if "labels" in memory else given, request.round >= self.wait
        shared = cached_model(self.task, start, site.device, "shared").eval()
        if late and len(data):
            h = encode_all(self.task.network, shared, data, site.device)
            labels = completed(labels, missing, h, request.trees["prototypes"]["mean"], self.without, self.having)
            memory = {**memory, "labels": {"y": labels}}

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            x, y = batch
            if late:
                return self.task.loss(model, (WEAK.view(x, rng), y))
            return torch.stack([self.followed(model, shared, WEAK.view(x, rng), y, missing) for _ in range(2)]).mean()

        end = self.local.fit(self.task, start, site, request.round, data=Relabeled(data, labels), loss=loss)
        reply = Reply({"update": self.update(end, start, site)})
        if request.round < self.wait - 1:
            return reply, memory
        h = encode_all(self.task.network, cached_model(self.task, end, site.device), data, site.device)
        return reply + Reply({"prototypes": prototypes(h, given, self.site_weight(site))}), memory

    def followed(self, model: nn.Module, shared: nn.Module, x: Tensor, y: Tensor, missing: Tensor) -> Tensor:
        """Return the loss of known findings, and the mean squared distance of the others from the received model's."""
        z = model(x)
        with torch.no_grad():
            target = shared(x).sigmoid()
        known = F.binary_cross_entropy_with_logits(z, y.nan_to_num(), reduction="none")[y.isfinite()]
        value = known.mean() if known.numel() else z.sum() * 0
        return value + (F.mse_loss(z[:, missing].sigmoid(), target[:, missing]) if bool(missing.any()) else 0.0)

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        moved, found = reply.mean("update").apply_to(state.params), state.prototypes
        if "prototypes" in reply.parts:
            new = reply.leaf_mean("prototypes")
            found = {"mean": torch.where(new.weight["mean"] > 0, new.value["mean"], found["mean"])}
        return State(state.round + 1, moved, found)


def prototypes(h: Tensor, y: Tensor, weight: float) -> ElementwiseMean:
    """Return the mean features of images without and with each finding, for merging over the sites that know both.

    Args:
        h: Features [n, F].
        y: Labels [n, L]; NaN if unknown.
        weight: The weight of the site.
    """
    of = torch.stack([y == 0, y == 1], 2).float()  # [n, L, 2]
    count = of.sum(0)
    mean = torch.einsum("nls,nf->lsf", of, h) / count.clamp_min(1)[..., None]
    weights = torch.where(count > 0, weight, 0.0)[..., None].expand_as(mean).clone()
    return ElementwiseMean.of({"mean": mean}, {"mean": weights})


def completed(labels: Tensor, missing: Tensor, h: Tensor, known: Tensor, without: float, having: float) -> Tensor:
    """Return ``labels`` [n, L] in which the surest of the unknown ones of ``missing`` [L] findings are filled in.

    The surest are those whose features ``h`` [n, F] differ most in cosine similarity to the two prototypes of the
    finding in ``known`` [L, 2, F].
    """
    filled = labels.clone()
    for c in missing.nonzero().flatten().tolist():
        free = labels[:, c].isnan().nonzero().flatten()
        near = F.cosine_similarity(h[free], known[c, :1]) - F.cosine_similarity(h[free], known[c, 1:])
        order = near.argsort(descending=True, stable=True)
        clear = int((near >= 0).sum())
        filled[free[order[: int(without * clear)]], c] = 0.0
        filled[free[order.flip(0)[: int(having * (len(free) - clear))]], c] = 1.0
    return filled
