"""Conversion between a reply and the single mean on which a pipeline works.

Each leaf of the joined mean is named ``kind/part/name``. The kinds are ``m``, the sum of a ``WeightedMean``; ``t`` and
``w``, the two sums of an ``ElementwiseMean``; and ``g``, one site's contribution to a ``PerSite``.
"""

import torch

from polyclinic.core.aggregates import ElementwiseMean, Reply, Stat, WeightedMean
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError


def join(reply: Reply, site: str, *, uniform: bool = False) -> WeightedMean:
    """Return all parts of the ``reply`` of ``site`` as one mean, with the weight of its first ``WeightedMean``.

    Args:
        reply: The reply of the method.
        site: Name of the sending site.
        uniform: Whether every weight must be 1, as privacy requires.

    Raises:
        ValueError: If a weight is not valid.
    """
    means = {part: stat.weight for part, stat in reply.parts.items() if isinstance(stat, WeightedMean)}
    weight = next(iter(means.values()), 1.0)
    if uniform and (heavy := {part: w for part, w in means.items() if w != 1.0}):
        raise ConfigError(
            f"the parts {heavy} must have weight 1, because the number of examples of a site is private: "
            "make the method uniform, for example FedAvg(..., uniform=True)"
        )
    if not weight > 0:
        raise ConfigError(f"the reply of site {site!r} has weight {weight}: the weight must be greater than 0")
    leaves: dict[str, torch.Tensor] = {}
    for part, stat in reply.parts.items():
        if "/" in part:
            raise ConfigError(f"the name of a part must not contain '/': {part!r}")
        if isinstance(stat, WeightedMean):
            named = {"m": stat.total}
        elif isinstance(stat, ElementwiseMean):
            named = {"t": stat.total, "w": stat.weight}
        else:
            named = {"g": stat.items[site]}
        for kind, own in named.items():
            leaves |= {f"{kind}/{part}/{name}": leaf for name, leaf in own.items()}
            # The leaf without a name transmits parts without leaves, and holds Σw if it differs from the first mean's.
            alone = kind == "m" and not uniform and part != next(iter(means))
            leaves[f"{kind}/{part}/"] = torch.tensor([means[part]] if alone else [])
    return WeightedMean(leaves, weight)


def split(joined: WeightedMean) -> Reply:
    """Return the additive parts of a reply from a ``joined`` mean, the inverse of ``join``."""
    leaves_of: dict[str, dict[str, dict[str, torch.Tensor]]] = {}
    for key, leaf in joined.total.items():
        kind, part, name = key.split("/", 2)
        leaves_of.setdefault(part, {}).setdefault(kind, {})[name] = leaf
    parts: dict[str, Stat] = {}
    for part, kinds in leaves_of.items():
        own = next(iter(kinds.values())).get("", torch.empty(0))
        leaves = {kind: {name: leaf for name, leaf in named.items() if name} for kind, named in kinds.items()}
        weight = float(own) if own.numel() else joined.weight
        parts[part] = WeightedMean(leaves["m"], weight) if "m" in leaves else ElementwiseMean(leaves["t"], leaves["w"])
    return Reply(parts)


def scaled(a: Tree, by: float) -> Tree:
    """Return ``by · a``, except for per-site leaves, which are not scaled."""
    return a if by == 1 else {name: leaf if name.startswith("g/") else leaf * by for name, leaf in a.items()}


def above(key: str, trees: Trees) -> dict[str, Tree]:
    """Prefix the names of ``trees`` with ``key/``."""
    return {f"{key}/{name}": t for name, t in trees.items()}


def below(key: str, trees: Trees) -> dict[str, Tree]:
    """Return the trees whose names begin with ``key/``, without that prefix. The inverse of ``above``."""
    start = f"{key}/"
    return {name.removeprefix(start): t for name, t in trees.items() if name.startswith(start)}


def escaped(trees: Trees) -> dict[str, Tree]:
    """Escape names of trees that could be confused with notes, so that pipelines can be nested."""
    return {f"~{name}" if name.startswith("~") else name: t for name, t in trees.items()}
