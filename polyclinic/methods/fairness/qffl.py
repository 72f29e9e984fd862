"""q-fair federated learning.

Tian Li, Maziar Sanjabi, Ahmad Beirami and Virginia Smith, "Fair Resource Allocation in Federated Learning", ICLR 2020,
equation 2 and Algorithm 2 (q-FedAvg), https://arxiv.org/abs/1905.10497. As in the algorithm, all sites have equal
weight and L is one over the learning rate. Running statistics are updated by the mean with the same weights.
"""

from dataclasses import dataclass

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.method import Capabilities, Request
from polyclinic.core.site import Site
from polyclinic.core.tree import Trees
from polyclinic.learning.tasks.risk import risk, trained
from polyclinic.methods.optimization.fedavg import FedAvg


@dataclass(frozen=True)
class QFFL(FedAvg):
    """FedAvg that minimizes ``Σ F_k^{q+1} / (q + 1)``, so that sites with a higher loss have more weight.

    Attributes:
        q: The degree of fairness; 0 is FedAvg with equal weights, and large values approach minimizing the highest
            loss.
    """

    uniform: bool = True
    q: float = 1.0

    capabilities = Capabilities(uniform=False)

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start, learned = request.trees["params"], trained(self.task)
        loss = risk(self.task, start, site, request.round) + 1e-10
        change = self.local.change(self.task, start, site, request.round)
        L = 1 / self.local.rate(request.round)
        # Δw_k = L (w - w_k);  h_k = q F_k^{q-1} ‖Δw_k‖² + L F_k^q;  w ← w - Σ F_k^q Δw_k / Σ h_k
        square = L**2 * tree.norm(tree.select(change, learned.__contains__)) ** 2
        h = self.q * loss ** (self.q - 1) * square + L * loss**self.q
        step = {n: x * (L * loss**self.q / h) if n in learned else x for n, x in change.items()}
        return Reply({"update": WeightedMean.of(step, h)}), memory
