"""FedDecorr: features that are not correlated, against the collapse of dimensions at sites with few classes.

Shi, Liang, Zhang, Tan and Bai, "Towards Understanding and Mitigating Dimensional Collapse in Heterogeneous Federated
Learning", ICLR 2023, equation 9, https://arxiv.org/abs/2210.00226, after the published code.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polyclinic.core.aggregates import Reply
from polyclinic.core.method import Request
from polyclinic.core.site import Site
from polyclinic.core.tree import Trees
from polyclinic.learning.batch import Batch
from polyclinic.learning.networks.latent import pooled, represent
from polyclinic.learning.objectives.distillation_loss import Said
from polyclinic.learning.training.dp_sgd import refuse_private
from polyclinic.methods.optimization.fedavg import FedAvg


@dataclass(frozen=True)
class FedDecorr(FedAvg):
    """FedAvg with the mean squared correlation between the features that enter the head.

    Attributes:
        beta: β, the weight of the correlations; 0.1 in the paper.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        refuse_private(self.local, "feddecorr", "correlations are between the examples of a minibatch")

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start = request.trees["params"]

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            h, z = represent(self.task.network, model, batch[0])
            return self.task.loss(Said(z), batch) + self.beta * correlation(pooled(h))

        end = self.local.fit(self.task, start, site, request.round, loss=loss if self.beta else None)
        return Reply({"update": self.update(end, start, site)}), memory


def correlation(h: Tensor) -> Tensor:
    """Return ``1 / (N F (F − 1)) Σ_{i ≠ j} (x_i · x_j)²`` of standardized features h [N, F]; 0 for one example."""
    n, width = h.shape
    if n < 2 or width < 2:
        return h.sum() * 0.0
    x = h - h.mean(0)
    x = x / (1e-8 + x.var(0)).sqrt()
    between = (x.T @ x)[~torch.eye(width, dtype=torch.bool, device=h.device)]
    return between.square().mean() / n
