"""FedVSS: sites train on virtual examples beside their own, made with the local and with the global model.

Zhu and Luo, "Federated Medical Image Analysis with Virtual Sample Synthesis", MICCAI 2022,
https://doi.org/10.1007/978-3-031-16437-8_70. Two kinds: adversarial ones, at which the local model must say what it
says of the real image (virtual adversarial training), and ones moved so that the global model is surer of the label, on
which the local model trains too, which draws it towards the global one. The settings were not at hand; sizes are shares
of an image's own standard deviation. Virtual examples leave no trace in running statistics.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polyclinic.core.aggregates import Reply
from polyclinic.core.method import Request
from polyclinic.core.site import Site
from polyclinic.core.tree import Trees
from polyclinic.learning.objectives.distillation_loss import divergence
from polyclinic.learning.tasks.task import Batch, cached_model
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.synthesis.virtual_examples import adversarial, still_statistics, surer


@dataclass(frozen=True)
class FedVSS(FedAvg):
    """FedAvg whose sites also learn from images that exist nowhere.

    Attributes:
        smooth: λ₁, what staying the same at adversarial examples counts.
        align: λ₂, what the loss at examples of which the global model is surer counts.
        size: How far an adversarial example lies from its image, in standard deviations of its values.
        stride: How far an aligned one lies, reached in ``steps`` steps.
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
            with still_statistics(model):
                if self.smooth:  # KL(f(x) ‖ f(x + r))
                    near = adversarial(self.task.kind, model, x, rng, self.size)
                    with torch.no_grad():
                        said = model(x)
                    value = value + self.smooth * divergence(self.task.kind, model(near), said)
                if self.align:
                    sure = surer(lambda v: self.task.loss(server, (v, y)), x, self.stride, self.steps)
                    value = value + self.align * self.task.loss(model, (sure, y))
            return value

        end = self.local.fit(self.task, start, site, request.round, loss=loss)
        return Reply({"update": self.update(end, start, site)}), memory
