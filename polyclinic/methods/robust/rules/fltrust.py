"""FLTrust: updates weighted by their agreement with a trusted one.

Xiaoyu Cao, Minghong Fang, Jia Liu and Neil Zhenqiang Gong, "FLTrust: Byzantine-robust Federated Learning via Trust
Bootstrapping", NDSS 2021, equations 2 to 4, https://arxiv.org/abs/2012.13995.

The paper's server has a small clean data set of its own. A server of hospitals often has none, so that one trusted site
may replace it; that site then limits the contribution of all others.
"""

from dataclasses import dataclass

from polyclinic.core.tree import Tree
from polyclinic.errors import ConfigError
from polyclinic.methods.robust.rules.aggregation_rule import Rule, Updates, Verdict


@dataclass(frozen=True)
class FLTrust(Rule):
    """Each update is weighted by its cosine with a trusted one, and scaled to that one's length.

    Attributes:
        root: The trusted update: a site's name, or ``server`` for one trained on the server's own data. In a study,
            empty for the first site in name order.
    """

    root: str = "server"

    def aggregate(self, updates: Updates, last: Tree) -> Verdict:
        """Aggregate by ``Σ t_i (‖g_0‖ / ‖g_i‖) g_i / Σ t_i`` with ``t_i = max(0, cos(g_i, g_0))``.

        The trusted update is part of the sum if it is a site's, but not if it is the server's.
        """
        if self.root not in updates.sites:
            raise ConfigError(f"fltrust needs the update of {self.root!r}, which is missing in this round")
        zero = updates.sites.index(self.root)
        norms = updates.norms.clamp_min(1e-300)
        trust = (updates.gram[zero] / (norms * norms[zero])).clamp_min(0.0)
        if self.root == "server":
            trust[zero] = 0.0
        total = trust.sum()
        if not total > 0:  # no update agrees with the trusted one: the model is unchanged
            return Verdict(updates.blend(trust), dict.fromkeys(updates.sites, 0.0))
        shares = dict(zip(updates.sites, (trust / total).tolist(), strict=True))
        return Verdict(updates.blend(trust / total * norms[zero] / norms), shares)
