"""FedAvg whose batch normalization is recomputed at a hospital that did not train: the baseline for unseen sites.

Federated averaging (McMahan et al., AISTATS 2017, https://arxiv.org/abs/1602.05629) with adaptive batch normalization
(Li, Wang, Shi, Hou and Liu, Pattern Recognition 2018, https://arxiv.org/abs/1603.04779). Methods that adapt to a new
hospital use its statistics too, so that without this baseline their gain over FedAvg may be that of the statistics.
"""

from dataclasses import dataclass

from polyclinic.core.method import Request
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.networks.batch_statistics import recomputed
from polyclinic.methods.optimization.fedavg import FedAvg


@dataclass(frozen=True)
class RecomputedStatistics(FedAvg):
    """FedAvg; a site without training examples predicts with running statistics of its own inputs, without labels."""

    def adapted_model(self, request: Request, memory: Trees, site: Site, role: str) -> Tree:
        params = self.site_model(request, memory)
        if len(site.data.get("train", ())):
            return params
        return recomputed(self.task, params, site.data[role], site.device)
