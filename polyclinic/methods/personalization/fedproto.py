"""FedProto: sites exchange class means of features instead of models, and each trains a model of its own.

Tan, Long, Liu, Zhou, Lu, Jiang and Zhang, "FedProto: Federated Prototype Learning across Heterogeneous Clients", AAAI
2022, Algorithm 1 and equations 3 to 6, https://arxiv.org/abs/2105.00243. As in the published code, a prototype of the
federation is the mean over the sites that have the class, and the class with the nearest prototype is predicted.
Departures: a site's prototypes are computed after training and in evaluation mode, whereas the code averages features
during training; all sites have one network.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyclinic.core import tree
from polyclinic.core.aggregates import ElementwiseMean, Reply
from polyclinic.core.method import Method, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.batch import Batch
from polyclinic.learning.networks.composite import Composed
from polyclinic.learning.networks.latent import encode_all, head_width, pooled, represent
from polyclinic.learning.networks.model_tree import cached_model
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.objectives.distillation_loss import Said
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining


@savable("fedproto.State", 1)
class State(NamedTuple):
    """The initial model, which sites start from, and the prototypes: ``mean`` [C, F], and ``known`` [C] or 0."""

    round: int
    params: Tree
    prototypes: Tree


@dataclass(frozen=True)
class Nearest(Composed):
    """A network whose logits are minus the squared distances of its features from prototypes."""

    def __call__(self) -> nn.Module:
        """Build the network as ``net``, with the buffers ``mean`` and ``known``."""
        return _Nearest(self.network)

    def in_head(self, name: str) -> bool:
        """Return whether a tensor belongs to the network's head."""
        return name.startswith("net.") and self.network.in_head(name.removeprefix("net."))

    def in_encoder(self, name: str) -> bool:
        """Return whether a tensor belongs to the network's encoder."""
        return name.startswith("net.") and self.network.in_encoder(name.removeprefix("net."))


class _Nearest(nn.Module):
    mean: Tensor
    known: Tensor

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network, self.net = network, network()
        self.register_buffer("mean", torch.zeros(network.outputs, head_width(network)))
        self.register_buffer("known", torch.zeros(network.outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, *inputs] to [b, outputs]; with the network's own head as long as no prototype is known."""
        h, z = represent(self.network, self.net, x)
        near = -(pooled(h)[:, None] - self.mean).square().sum(2)
        return torch.where(self.known.any(), near.masked_fill(self.known == 0, -1e4), z)


@dataclass(frozen=True)
class FedProto(Method[State]):
    """Local training with the squared distance of features from the federation's prototype of their class.

    Attributes:
        lam: λ, the weight of the distance; 1 in the paper for most data sets.
    """

    task: Task
    local: LocalTraining = LocalTraining()
    lam: float = 1.0

    @property
    def prediction_task(self) -> Task:
        return self.task.with_network(Nearest(self.task.network))

    def init(self, params: Tree) -> State:
        classes, width = self.task.network.outputs, head_width(self.task.network)
        return State(0, params, {"mean": torch.zeros(classes, width), "known": torch.zeros(classes)})

    def request(self, state: State) -> Request:
        return Request(state.round, {"params": state.params, "prototypes": state.prototypes})

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        mean, known = (request.trees["prototypes"][name].to(site.device) for name in ("mean", "known"))

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            h, z = represent(self.task.network, model, batch[0])
            features, y = pooled(h), batch[1]
            towards = torch.where(known[y, None] > 0, mean[y], features.detach())
            return self.task.loss(Said(z), batch) + self.lam * F.mse_loss(features, towards)

        end = self.local.fit(self.task, memory.get("own", request.trees["params"]), site, request.round, loss=loss)
        own = self._prototypes(end, site)
        return Reply({"prototypes": own} if own else {}), {**memory, "own": end}

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        found, old = reply.leaf_mean("prototypes"), state.prototypes
        seen = found.weight["mean"] > 0
        fresh = {
            "mean": torch.where(seen, found.value["mean"], old["mean"]),
            "known": torch.maximum(old["known"], seen[:, 0].to(old["known"])),
        }
        return State(state.round + 1, state.params, fresh)

    def site_model(self, request: Request, memory: Trees) -> Tree:
        net = memory.get("own", request.trees["params"])
        return {**tree.prefixed("net", net), **request.trees["prototypes"]}

    def kept_at_sites(self, name: str) -> bool:
        return name.startswith("net.")

    def _prototypes(self, params: Tree, site: Site) -> ElementwiseMean | None:
        """Return the mean features of each class at ``site``, with weight 1 for the classes that it has."""
        data, classes = site.data["train"], self.task.network.outputs
        if not len(data):
            return None
        h = encode_all(self.task.network, cached_model(self.task, params, site.device), data, site.device)
        labels = torch.cat([data[chunk][1] for chunk in torch.arange(len(data)).split(256)])
        of = F.one_hot(labels, classes).to(h)
        mean = of.T @ h / of.sum(0).clamp_min(1)[:, None]
        return ElementwiseMean.of({"mean": mean}, {"mean": (of.sum(0) > 0).to(h)[:, None].expand_as(mean).clone()})
