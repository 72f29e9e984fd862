"""FedVSS: sites train on virtual examples in addition to their own, made with the local and with the global model.

Zhu and Luo, "Federated Medical Image Analysis with Virtual Sample Synthesis", MICCAI 2022,
https://doi.org/10.1007/978-3-031-16437-8_70. Two kinds: adversarial ones, on which the local model's prediction must
equal that on the real image (virtual adversarial training), and ones moved to increase the global model's confidence in
the label, on which the local model also trains, which limits client drift. The settings were not available; sizes are
shares of an image's own standard deviation. Virtual examples do not affect running statistics.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polyclinic.core.aggregates import Reply
from polyclinic.core.method import Request
from polyclinic.core.site import Site
from polyclinic.core.tree import Trees
from polyclinic.learning.batch import Batch
from polyclinic.learning.networks.functional import still
from polyclinic.learning.networks.model_tree import cached_model
from polyclinic.learning.objectives.distillation_loss import divergence
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.synthesis.virtual_examples import adversarial, surer


@dataclass(frozen=True)
class FedVSS(FedAvg):
    """FedAvg whose sites also learn from synthetic images.

    Attributes:
        smooth: λ₁, the weight of consistency at adversarial examples.
        align: λ₂, the weight of the loss at examples of which the global model is more confident.
        size: Distance of an adversarial example from its image, in standard deviations of its values.
        stride: Distance of an aligned one, reached in ``steps`` steps.
        steps: Number of these steps.
    """

    smooth: float = 1.0
    align: float = 1.0
    size: float = 0.1
    stride: float = 0.1
    steps: int = 1

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start, rng = request.trees["params"], site.rng(request.round, "virtual")
        server = cached_model(self.task, start, site.device, "global").eval()

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            x, y = batch
            value = self.task.loss(model, batch)
            with still(model):
                if self.smooth:  # KL(f(x) ‖ f(x + r))
                    near = adversarial(self.task.kind, model, x, rng, self.size)
                    with torch.no_grad():
                        prediction = model(x)
                    value = value + self.smooth * divergence(self.task.kind, model(near), prediction)
                if self.align:
                    sure = surer(lambda v: self.task.loss(server, (v, y)), x, self.stride, self.steps)
                    value = value + self.align * self.task.loss(model, (sure, y))
            return value

        end = self.local.fit(self.task, start, site, request.round, loss=loss)
        return Reply({"update": self.update(end, start, site)}), memory
