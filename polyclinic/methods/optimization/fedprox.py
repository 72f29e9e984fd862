"""FedProx: a proximal term limits client drift.

Li, Sahu, Zaheer, Sanjabi, Talwalkar and Smith, "Federated Optimization in Heterogeneous Networks", MLSys 2020,
Algorithm 2 and equation 2. https://arxiv.org/abs/1812.06127.
"""

from dataclasses import dataclass, replace

from polyclinic.core.aggregates import Reply
from polyclinic.core.method import Request
from polyclinic.core.site import Site
from polyclinic.core.tree import Trees
from polyclinic.errors import ConfigError
from polyclinic.learning.training.local import Proximal
from polyclinic.methods.optimization.fedavg import FedAvg


@dataclass(frozen=True)
class FedProx(FedAvg):
    """FedAvg with the proximal term ``μ/2 · ‖w − w₀‖²`` in each site's loss, w₀ being the received model.

    Attributes:
        mu: μ, the weight of the proximal term; 0.001 to 1 in the paper.
    """

    mu: float = 0.01

    def __post_init__(self) -> None:
        if self.mu < 0:
            raise ConfigError(f"mu must be at least 0, not {self.mu:g}")

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        local = self.local.with_penalty(Proximal(self.mu))
        return FedAvg.site_update(replace(self, local=local), request, memory, site)
