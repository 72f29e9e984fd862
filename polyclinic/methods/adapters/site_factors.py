"""What methods that see each site's adapters send: the change of all other tensors, and the factors of every site."""

from collections.abc import Mapping

import torch

from polyclinic.core import tree
from polyclinic.core.aggregates import PerSite, Reply, WeightedMean
from polyclinic.core.tree import Tree
from polyclinic.errors import ProtocolError
from polyclinic.learning.networks.adapters import is_factor

WEIGHT = "weight"


def reply_of(site: str, change: Tree, factors: Tree, weight: float) -> Reply:
    """Return the reply of a site.

    Args:
        site: The site's name.
        change: The change of the trained tensors; that of the factors of adapters is left out.
        factors: The factors.
        weight: The site's weight.
    """
    others = tree.select(change, lambda name: not is_factor(name))
    own = {**factors, WEIGHT: torch.tensor(weight, dtype=torch.float64)}
    return Reply({"update": WeightedMean.of(others, weight), "factors": PerSite({site: own})})


def shares_of(sites: Mapping[str, Tree], uniform: bool) -> dict[str, float]:
    """Return the share of each site in the mean, in name order.

    Raises:
        ProtocolError: If a weight is not a positive finite number.
    """
    weights = {name: _weight(name, sites[name]) for name in sorted(sites)}
    if uniform:
        weights = dict.fromkeys(weights, 1.0)
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def _weight(site: str, own: Tree) -> float:
    weight = float(own[WEIGHT]) if WEIGHT in own and own[WEIGHT].numel() == 1 else 0.0
    if not 0 < weight < float("inf"):
        raise ProtocolError(f"{site} sent the weight {weight}, which is not a positive finite number")
    return weight
