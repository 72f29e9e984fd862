"""MOON: model-contrastive federated learning.

Li, He and Song, "Model-Contrastive Federated Learning", CVPR 2021, equations 3 and 4 and Algorithm 1.
https://arxiv.org/abs/2103.16257. Departures: the representation is the input of the network's head, averaged over
spatial axes; the paper adds a projection head of two layers. The two reference models are used in evaluation mode.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyclinic.core.aggregates import Reply
from polyclinic.core.method import Request
from polyclinic.core.site import Site
from polyclinic.core.tree import Trees
from polyclinic.learning.batch import Batch
from polyclinic.learning.networks.functional import still
from polyclinic.learning.networks.latent import features
from polyclinic.learning.networks.model_tree import cached_model
from polyclinic.methods.optimization.fedavg import FedAvg


@dataclass(frozen=True)
class Moon(FedAvg):
    """FedAvg with a contrast that draws representations to the global model's and away from the site's previous one's.

    Attributes:
        mu: μ, the weight of the contrast. The paper chooses among 0.1, 1, 5 and 10.
        temperature: τ, 0.5 in the paper.
    """

    mu: float = 1.0
    temperature: float = 0.5

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start = request.trees["params"]
        network = self.task.network
        shared = cached_model(self.task, start, site.device, "shared").eval()
        previous = cached_model(self.task, memory.get("previous", start), site.device, "previous").eval()

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            with still(model):  # the task's own pass below updates running statistics
                z = features(network, model, batch[0])
            with torch.no_grad():
                near, far = features(network, shared, batch[0]), features(network, previous, batch[0])
            return self.task.loss(model, batch) + self.mu * contrast(z, near, far, self.temperature)

        end = self.local.fit(self.task, start, site, request.round, loss=loss if self.mu else None)
        update = self.update(end, start, site)
        return Reply({"update": update}), {**memory, "previous": end}


def contrast(z: Tensor, near: Tensor, far: Tensor, temperature: float) -> Tensor:
    """Return the contrastive loss, averaged over the batch. All [b, F].

    ``−log( e^{cos(z, near)/τ} / (e^{cos(z, near)/τ} + e^{cos(z, far)/τ}) )``
    """
    towards, away = F.cosine_similarity(z, near) / temperature, F.cosine_similarity(z, far) / temperature
    return F.softplus(away - towards).mean()
