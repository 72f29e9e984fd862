"""FedNTD: sites keep the shared model's knowledge of the classes that they do not see.

Lee, Jeong, Shin, Bae and Yun, "Preservation of the Global Knowledge by Not-True Distillation in Federated Learning",
NeurIPS 2022, equations 4 and 5, https://arxiv.org/abs/2106.03097.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polyclinic.core.aggregates import Reply
from polyclinic.core.method import Request
from polyclinic.core.site import Site
from polyclinic.core.tree import Trees
from polyclinic.learning.batch import Batch
from polyclinic.learning.networks.model_tree import cached_model
from polyclinic.learning.objectives.distillation_loss import Said
from polyclinic.methods.optimization.fedavg import FedAvg


@dataclass(frozen=True)
class FedNTD(FedAvg):
    """FedAvg with the divergence from the received model's probabilities of all classes but the true one.

    Attributes:
        beta: β, the weight of the divergence; 1 in the paper.
        temperature: τ; 1 in the paper.
    """

    beta: float = 1.0
    temperature: float = 1.0

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start = request.trees["params"]
        shared = cached_model(self.task, start, site.device, "shared").eval()

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            z = model(batch[0])
            with torch.no_grad():
                known = shared(batch[0])
            return self.task.loss(Said(z), batch) + self.beta * not_true(z, known, batch[1], self.temperature)

        end = self.local.fit(self.task, start, site, request.round, loss=loss if self.beta else None)
        return Reply({"update": self.update(end, start, site)}), memory


def not_true(z: Tensor, known: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Return ``τ² · KL(softmax(known / τ) ‖ softmax(z / τ))`` over all classes but the true one, for logits [b, C]."""
    true = torch.arange(z.shape[1], device=z.device) == target[:, None]
    p, q = ((part / temperature).masked_fill(true, -torch.inf).log_softmax(1) for part in (known, z))
    each = p.exp() * (p - q).masked_fill(true, 0.0)
    return temperature**2 * each.sum(1).mean()
