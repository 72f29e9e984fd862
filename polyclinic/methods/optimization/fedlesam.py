"""FedLESAM: flat minima of the global loss, with a perturbation estimated from the change of the global model.

Fan, Hu, Yao, Niu, Zhang, Sugiyama and Wang, "Locally Estimated Global Perturbations are Better than Local Perturbations
for Federated Sharpness-aware Minimization", ICML 2024, Algorithm 1, https://arxiv.org/abs/2405.18890. One gradient per
step, unlike FedSAM. A site without an earlier global model trains without a perturbation.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply
from polyclinic.core.method import Request
from polyclinic.core.site import Site
from polyclinic.core.tree import Trees
from polyclinic.errors import ConfigError
from polyclinic.learning.batch import Batch
from polyclinic.learning.networks.functional import at
from polyclinic.learning.networks.model_tree import trainable
from polyclinic.learning.tasks.risk import trained
from polyclinic.methods.optimization.fedavg import FedAvg


@dataclass(frozen=True)
class FedLESAM(FedAvg):
    """FedAvg whose gradients are taken at ``w + ρ (w_last − w_t) / ‖w_last − w_t‖``.

    ``w_last`` is the global model that the site received the last time, and ``w_t`` the present one.

    Attributes:
        rho: ρ, the length of the perturbation; 0.01 to 0.5 in the paper.
    """

    rho: float = 0.05

    def __post_init__(self) -> None:
        if self.rho < 0:
            raise ConfigError(f"fedlesam: rho must be at least 0, not {self.rho:g}")

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start = request.trees["params"]
        here = tree.select(start, trained(self.task).__contains__)
        back = tree.sub(memory.get("last", here), here)
        length = tree.norm(back)
        shift = {name: leaf.to(site.device) for name, leaf in tree.scale(back, self.rho / (length + 1e-7)).items()}

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            moved = {name: p + shift[name] for name, p in trainable(model).items()}
            return at(model, moved, self.task.loss, batch)

        end = self.local.fit(self.task, start, site, request.round, loss=loss if length else None)
        return Reply({"update": self.update(end, start, site)}), {**memory, "last": here}
