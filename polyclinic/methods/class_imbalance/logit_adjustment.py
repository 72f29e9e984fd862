"""Losses that allow for the classes that a site has few examples of: balanced softmax, and FedLC.

Balanced softmax: Ren et al., "Balanced Meta-Softmax for Long-Tailed Visual Recognition", NeurIPS 2020, equation 4,
https://arxiv.org/abs/2007.10740. FedLC: Zhang, Li, Li, Xu, Wu, Ding and Wu, "Federated Learning with Label Distribution
Skew via Logits Calibration", ICML 2022, equation 8, https://arxiv.org/abs/2209.00189. Both change a logit by a function
of the number n_c of the site's examples of the class; a class without examples counts as 10⁻⁸ examples. Departure: as
in public code, FedLC's softmax is over all classes, whereas the paper's denominator omits the true class.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from polyclinic.core.aggregates import Reply
from polyclinic.core.method import Request
from polyclinic.core.site import Site
from polyclinic.core.tree import Trees
from polyclinic.errors import ConfigError
from polyclinic.learning.batch import Batch
from polyclinic.learning.objectives.distillation_loss import Said
from polyclinic.learning.tasks.data_sums import class_counts
from polyclinic.methods.optimization.fedavg import FedAvg

FEWEST = 1e-8


@dataclass(frozen=True)
class LogitAdjusted(FedAvg):
    """FedAvg whose sites train on ``z_c + τ log n_c`` (balanced softmax) or ``z_c − τ n_c^(−1/4)`` (FedLC).

    The adjustment is omitted for predictions, so that these are as if all classes were equally frequent.

    Attributes:
        rule: ``log`` or ``root``.
        tau: τ, the strength of the adjustment; 0 for FedAvg.
    """

    rule: Literal["log", "root"] = "log"
    tau: float = 1.0

    def __post_init__(self) -> None:
        if self.tau < 0:
            raise ConfigError(f"tau must be at least 0, not {self.tau:g}")

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start, shift = request.trees["params"], self.shift(site)

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            z = model(batch[0])
            return self.task.loss(Said(z + shift.to(z)), batch)

        end = self.local.fit(self.task, start, site, request.round, loss=loss)
        return Reply({"update": self.update(end, start, site)}), memory

    def shift(self, site: Site) -> Tensor:
        """Return what is added to the logits at ``site``: [C]."""
        counts = class_counts(site.data["train"], self.task.network.outputs).clamp_min(FEWEST)
        return self.tau * (counts.log() if self.rule == "log" else -(counts**-0.25))
