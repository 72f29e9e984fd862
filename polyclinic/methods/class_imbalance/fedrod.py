"""FedRoD: one network with two heads, a shared one for all classes alike and a private one for a site's classes.

Chen and Chao, "On Bridging Generic and Personalized Federated Learning for Image Classification", ICLR 2022, Algorithm
1 with balanced softmax and a linear private head, https://arxiv.org/abs/2107.00778. A site predicts with the sum of
both heads; a site that did not train, with the shared one. No gradient of the private head reaches the shared layers.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply
from polyclinic.core.method import Request
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.batch import Batch
from polyclinic.learning.networks.composite import Composed
from polyclinic.learning.networks.latent import head_name, represent
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.objectives.distillation_loss import Said
from polyclinic.learning.tasks.data_sums import class_counts
from polyclinic.learning.tasks.task import Task
from polyclinic.methods.class_imbalance.logit_adjustment import FEWEST
from polyclinic.methods.optimization.fedavg import FedAvg


@dataclass(frozen=True)
class TwoHeaded(Composed):
    """A network with a second head on the same features, whose logits are added."""

    def __call__(self) -> nn.Module:
        """Build the network as ``net``, and a copy of its head as ``personal``."""
        return _TwoHeaded(self.network)

    def in_head(self, name: str) -> bool:
        """Return whether a tensor belongs to the shared head or to the private one."""
        return not name.startswith("net.") or self.network.in_head(name.removeprefix("net."))

    def in_encoder(self, name: str) -> bool:
        """Return whether a tensor belongs to the network's encoder."""
        return name.startswith("net.") and self.network.in_encoder(name.removeprefix("net."))


class _TwoHeaded(nn.Module):
    use: Tensor

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network, self.net = network, network()
        self.personal = copy.deepcopy(self.net.get_submodule(head_name(network, self.net)))
        self.register_buffer("use", torch.zeros(()))  # 0 at a site that did not train

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of the shared head, and those of the private one, which sends no gradient further."""
        h, z = represent(self.network, self.net, x)
        own: Tensor = self.personal(h.detach())
        return z, own

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, *inputs] to [b, outputs]."""
        z, own = self.both(x)
        return z + self.use * own


@dataclass(frozen=True)
class FedRoD(FedAvg):
    """FedAvg with a class-balanced loss, and at each site a private head that corrects it for the site's classes."""

    @property
    def prediction_task(self) -> Task:
        return self.task.with_network(TwoHeaded(self.task.network))

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start = request.trees["params"]
        prior = class_counts(site.data["train"], self.task.network.outputs).clamp_min(FEWEST).log()

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            assert isinstance(model, _TwoHeaded)
            z, own = model.both(batch[0])
            balanced = self.task.loss(Said(z + prior.to(z)), batch)
            return balanced + self.task.loss(Said(z.detach() + own), batch)

        whole = {**self._whole(start, memory), "use": torch.ones(())}
        end = self.local.fit(self.prediction_task, whole, site, request.round, loss=loss)
        kept = {**memory, "personal": tree.under("personal", end)}
        return Reply({"update": self.update(tree.under("net", end), start, site)}), kept

    def site_model(self, request: Request, memory: Trees) -> Tree:
        return self._whole(request.trees["params"], memory)

    def _whole(self, shared: Tree, memory: Trees) -> Tree:
        """Return the leaves of the network with both heads; without a private one, a copy of the shared is unused."""
        own, use = memory.get("personal"), torch.tensor(float("personal" in memory))
        if own is None:
            own = tree.under(head_name(self.task.network, self.task.model()), shared)
        return {**tree.prefixed("net", shared), **tree.prefixed("personal", own), "use": use}
