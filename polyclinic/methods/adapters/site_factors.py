"""What methods that see each site's adapters send: the change of all other tensors, and the factors of every site."""

from collections.abc import Mapping

import torch

from polyclinic.core import tree
from polyclinic.core.aggregates import WEIGHT, PerSite, PerSiteUniform, Reply, WeightedMean, require_weight
from polyclinic.core.tree import Tree
from polyclinic.learning.networks.adapters import is_factor


def reply_of(site: str, change: Tree, factors: Tree, weight: float, kind: type[PerSite] = PerSiteUniform) -> Reply:
    """Return the reply of a site.

    Args:
        site: The site's name.
        change: The change of the trained tensors; that of the factors of adapters is left out.
        factors: The factors.
        weight: The site's weight.
        kind: ``PerSite`` if the factors of sites have different ranks.
    """
    others = tree.select(change, lambda name: not is_factor(name))
    own = {**factors, WEIGHT: torch.tensor(weight, dtype=torch.float64)}
    return Reply({"update": WeightedMean.of(others, weight), "factors": kind({site: own})})


def shares_of(sites: Mapping[str, Tree], uniform: bool) -> dict[str, float]:
    """Return the share of each site in the mean, in name order. A site of weight 0 has none.

    Raises:
        Weightless: If no site has a weight above 0.
    """
    stated = require_weight(PerSite(sites).stated_weights())
    weights = {name: 1.0 if uniform else stated[name] for name in sorted(sites) if stated.get(name, 0.0) > 0}
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}
