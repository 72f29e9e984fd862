"""Averages in which a site's weight depends on its training loss.

Guan, Yap, Bozoki and Liu's survey (Pattern Recognition 151, 2024) describes an aggregation by Li and others for
COVID-19 in chest X-rays: weights come from the sites' training losses, and sites with a high loss have less weight. The
exact formula was not available. Both forms that fit the description are implemented, with the loss on the site's
training data after its own training: ``exp(−L_k)`` and ``1 / L_k``, normalized. Both are sums over sites, so that the
loss of a single site remains hidden under secure summation.
"""

import math
from dataclasses import dataclass
from typing import Literal

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.method import Capabilities, Request
from polyclinic.core.site import Site
from polyclinic.core.tree import Trees
from polyclinic.learning.tasks.risk import risk
from polyclinic.methods.optimization.fedavg import FedAvg


@dataclass(frozen=True)
class LossWeighted(FedAvg):
    """FedAvg whose sites have more weight, the lower their training loss.

    A site with wrong labels loses weight, but so does one with difficult patients, contrary to fairness (see
    ``q-ffl``).

    Attributes:
        form: ``exp``, exp(−L), or ``inverse``, 1 / L.
        uniform: Whether the number of examples is ignored, as in the description.
    """

    uniform: bool = True
    form: Literal["exp", "inverse"] = "exp"

    capabilities = Capabilities(uniform=False)

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start = request.trees["params"]
        end = self.local.fit(self.task, start, site, request.round)
        loss = max(risk(self.task, end, site, request.round), 1e-12)
        trust = math.exp(-loss) if self.form == "exp" else 1 / loss
        return Reply({"update": WeightedMean.of(tree.sub(end, start), trust * self.site_weight(site))}), memory
