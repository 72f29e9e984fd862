"""Replies as one mean and back: what a pipeline works on.

Each leaf of the joined mean is called ``kind/part/name``. The kinds: ``m``, the sum of a ``WeightedMean``; ``t`` and
``w``, the two sums of a ``ElementwiseMean``; ``g``, what a ``PerSite`` keeps apart by site.
"""

import torch

from polyclinic.core.aggregates import ElementwiseMean, Reply, Stat, WeightedMean
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError


def join(reply: Reply, site: str, *, uniform: bool = False) -> WeightedMean:
    """All parts of the ``reply`` of ``site`` as one mean, of the weight of the first ``WeightedMean`` among them.

    Args:
        reply: What the method would have sent.
        site: Who sends it.
        uniform: Whether every weight must be 1, as privacy needs it.

    Raises:
        ValueError: Where a weight is not what it must be.
    """
    means = {part: stat.weight for part, stat in reply.parts.items() if isinstance(stat, WeightedMean)}
    weight = next(iter(means.values()), 1.0)
    if uniform and (heavy := {part: w for part, w in means.items() if w != 1.0}):
        raise ConfigError(
            f"the parts {heavy} must weigh 1, for how many examples a site has is private too: "
            "make the method uniform, for example FedAvg(..., uniform=True)"
        )
    if not weight > 0:
        raise ConfigError(f"what site {site!r} sends weighs {weight}: it must weigh more than 0")
    leaves: dict[str, torch.Tensor] = {}
    for part, stat in reply.parts.items():
        if "/" in part:
            raise ConfigError(f"a part's name must not contain '/': {part!r}")
        if isinstance(stat, WeightedMean):
            named = {"m": stat.total}
        elif isinstance(stat, ElementwiseMean):
            named = {"t": stat.total, "w": stat.weight}
        else:
            named = {"g": stat.items[site]}
        for kind, own in named.items():
            leaves |= {f"{kind}/{part}/{name}": leaf for name, leaf in own.items()}
            # The leaf without a name lets a part without leaves arrive, and holds Σw where it is not the first's.
            alone = kind == "m" and not uniform and part != next(iter(means))
            leaves[f"{kind}/{part}/"] = torch.tensor([means[part]] if alone else [])
    return WeightedMean(leaves, weight)


def split(joined: WeightedMean) -> Reply:
    """The inverse of ``join``, for what adds up."""
    found: dict[str, dict[str, dict[str, torch.Tensor]]] = {}
    for key, leaf in joined.total.items():
        kind, part, name = key.split("/", 2)
        found.setdefault(part, {}).setdefault(kind, {})[name] = leaf
    parts: dict[str, Stat] = {}
    for part, kinds in found.items():
        own = next(iter(kinds.values())).get("", torch.empty(0))
        leaves = {kind: {name: leaf for name, leaf in named.items() if name} for kind, named in kinds.items()}
        weight = float(own) if own.numel() else joined.weight
        parts[part] = WeightedMean(leaves["m"], weight) if "m" in leaves else ElementwiseMean(leaves["t"], leaves["w"])
    return Reply(parts)


def scaled(a: Tree, by: float) -> Tree:
    """``a`` by ``by``, except what is kept apart by site."""
    return a if by == 1 else {name: leaf if name.startswith("g/") else leaf * by for name, leaf in a.items()}


def above(key: str, trees: Trees) -> dict[str, Tree]:
    """The same trees, with ``key/`` before their names."""
    return {f"{key}/{name}": t for name, t in trees.items()}


def below(key: str, trees: Trees) -> dict[str, Tree]:
    """The trees whose names begin with ``key/``, without it. The inverse of ``above``."""
    start = f"{key}/"
    return {name.removeprefix(start): t for name, t in trees.items() if name.startswith(start)}


def escaped(trees: Trees) -> dict[str, Tree]:
    """Trees whose names cannot be taken for notes: pipelines may stand inside one another."""
    return {f"~{name}" if name.startswith("~") else name: t for name, t in trees.items()}
