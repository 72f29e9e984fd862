"""FLTrust: updates weighed by a trusted one.

Xiaoyu Cao, Minghong Fang, Jia Liu and Neil Zhenqiang Gong, "FLTrust: Byzantine-robust Federated Learning via Trust
Bootstrapping", NDSS 2021, equations 2 to 4, https://arxiv.org/abs/2012.13995.

The paper's server has a small clean data set of its own. A server of hospitals often has none, so that one site, whose
data everyone trusts, may take its place; it then decides what every other site may contribute.
"""

from dataclasses import dataclass

from polyclinic.core.tree import Tree
from polyclinic.errors import ConfigError
from polyclinic.methods.robust.rules.aggregation_rule import Rule, Updates, Verdict


@dataclass(frozen=True)
class FLTrust(Rule):
    """Each update counts by its cosine with a trusted one, and is scaled to that one's length.

    Attributes:
        root: Whose update is trusted: a site's name, or ``server`` for one trained on the server's own data.
    """

    root: str = "server"

    def aggregate(self, updates: Updates, last: Tree) -> Verdict:
        """Σ t_i (‖g_0‖ / ‖g_i‖) g_i / Σ t_i with t_i = max(0, cos(g_i, g_0))

        The trusted update counts among the others where it is a site's, and not where it is the server's.
        """
        if self.root not in updates.sites:
            raise ConfigError(
                f"fltrust trusts the update of {self.root!r}, which is not here: without it there is no telling"
            )
        zero = updates.sites.index(self.root)
        norms = updates.norms.clamp_min(1e-300)
        trust = (updates.gram[zero] / (norms * norms[zero])).clamp_min(0.0)
        if self.root == "server":
            trust[zero] = 0.0
        total = trust.sum()
        if not total > 0:  # nobody agrees with the trusted update: stay where we are
            return Verdict(updates.blend(trust), dict.fromkeys(updates.sites, 0.0))
        shares = dict(zip(updates.sites, (trust / total).tolist(), strict=True))
        return Verdict(updates.blend(trust / total * norms[zero] / norms), shares)
