"""Averages in which sites count by how well they have learned their own data, or by how badly.

Guan, Yap, Bozoki and Liu's survey (Pattern Recognition 151, 2024) describes an aggregation by Li and others for
COVID-19 in chest X-rays: weights come from the sites' training losses, and sites that do badly count less. The exact
formula was not at hand. We offer the two that fit the description, after the site's own training and over its own
training data: exp(-L_k) and 1 / L_k, divided by their sum. Both add up over sites, so nobody sees one site's loss.
"""

import math
from dataclasses import dataclass
from typing import Literal

from polyclinic.core import tree
from polyclinic.core.aggregates import Reply, WeightedMean
from polyclinic.core.method import Request
from polyclinic.core.site import Site
from polyclinic.core.tree import Trees
from polyclinic.learning.tasks.risk import risk
from polyclinic.methods.optimization.fedavg import FedAvg


@dataclass(frozen=True)
class LossWeighted(FedAvg):
    """FedAvg whose sites count more, the lower their training loss.

    A site whose labels are wrong cannot learn them and fades; so does one whose patients are harder to judge, which is
    not what fairness asks for (see ``q-ffl``). ``uniform`` leaves the number of examples out, as in the description.

    Attributes:
        form: ``exp``, exp(-L), or ``inverse``, 1 / L.
    """

    uniform: bool = True
    form: Literal["exp", "inverse"] = "exp"

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start = request.trees["params"]
        end = self.local.fit(self.task, start, site, request.round)
        loss = max(risk(self.task, end, site, request.round), 1e-12)
        trust = math.exp(-loss) if self.form == "exp" else 1 / loss
        return Reply({"update": WeightedMean.of(tree.sub(end, start), trust * self.site_weight(site))}), memory
