"""q-fair federated learning.

Tian Li, Maziar Sanjabi, Ahmad Beirami and Virginia Smith, "Fair Resource Allocation in Federated Learning", ICLR 2020,
equation 2 and Algorithm 2 (q-FedAvg), https://arxiv.org/abs/1905.10497. As in the algorithm, sites count the same and L
is one over the learning rate. Running statistics move by the mean under the same weights.
"""

from dataclasses import dataclass

from polyclinic.core import tree
from polyclinic.core.method import Ask
from polyclinic.core.site import Site
from polyclinic.core.stats import Mean, Reply
from polyclinic.core.tree import Trees
from polyclinic.methods.fedavg import FedAvg
from polyclinic.tasks.local import Local
from polyclinic.tasks.risk import risk, trained
from polyclinic.tasks.task import Task


@dataclass(frozen=True)
class QFFL(FedAvg):
    """FedAvg whose sites count more, the worse the model is at them: Σ F_k^{q+1} / (q + 1) made small.

    Attributes:
        q: How much fairness counts; 0 is FedAvg with equal sites, and the larger, the nearer to the worst site alone.
    """

    uniform: bool = True
    q: float = 1.0

    def site_update(self, ask: Ask, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start, learned = ask.trees["params"], trained(self.task)
        loss = risk(self.task, start, site, ask.round) + 1e-10
        change = tree.sub(self.local.fit(self.task, start, site, ask.round), start)
        L = 1 / self.local.rate(ask.round)
        # Δw_k = L (w - w_k);  h_k = q F_k^{q-1} ‖Δw_k‖² + L F_k^q;  w ← w - Σ F_k^q Δw_k / Σ h_k
        square = L**2 * tree.norm(tree.select(change, learned.__contains__)) ** 2
        h = self.q * loss ** (self.q - 1) * square + L * loss**self.q
        step = {n: x * (L * loss**self.q / h) if n in learned else x for n, x in change.items()}
        return Reply({"update": Mean.of(step, h)}), memory


def q_ffl(task: Task, local: Local, *, q: float = 1.0, lr: float = 1.0) -> QFFL:
    """FedAvg whose sites count more, the worse the model is at them."""
    return QFFL(task, local, lr, q=q)
