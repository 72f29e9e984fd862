"""Gradient-masked averaging: coordinates on which sites disagree move less.

Irene Tenison, Sai Aravind Sreeramadas, Vaikkunth Mugunthan, Edouard Oyallon, Irina Rish and Eugene Belilovsky,
"Gradient Masked Averaging for Federated Learning", Transactions on Machine Learning Research, 2023, Algorithm 1,
https://arxiv.org/abs/2201.11986; after Parascandolo et al., "Learning explanations that are hard to vary", ICLR 2021.
Running statistics are not masked. Signs are summed, so that single updates remain hidden under secure summation.
"""

from dataclasses import dataclass

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.method import Request
from polyclinic.core.site import Site
from polyclinic.core.tree import Trees
from polyclinic.learning.tasks.risk import trained
from polyclinic.methods.optimization.fedavg import FedAvg, State


@dataclass(frozen=True)
class FedGMA(FedAvg):
    """FedAvg that scales each coordinate's mean change by the agreement of the sites on its sign.

    The mask is 1 if the agreement ``A = |Σ p_k sign(Δ_k)|`` is at least τ, else A.

    Attributes:
        threshold: τ, the agreement from which a coordinate moves by its whole mean change; 0 is FedAvg.
    """

    threshold: float = 0.4

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        reply, memory = super().site_update(request, memory, site)
        update, learned = reply.mean("update"), trained(self.task)
        signs = {name: leaf.sign() for name, leaf in update.total.items() if name in learned}
        return Reply({"update": update, "sign": WeightedMean.of(signs, update.weight)}), memory

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        change, signs = reply.mean("update").value, reply.mean("sign").value
        for name, sign in signs.items():
            agreement = sign.abs()  # A = |Σ p_k sign(Δ_k)|;  the mask is 1 where A ≥ τ, else A
            mask = agreement.where(agreement < self.threshold, 1.0)
            change = {**change, name: change[name] * mask}
        return State(state.round + 1, tree.shift(state.params, tree.scale(change, self.lr)))
