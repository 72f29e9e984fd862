"""Private heads over a shared encoder, for sites with different organs, modalities or classes.

Parekh, Lai, Braverman, Leal, Rowe, Pillai and Jacobs, "Cross-Domain Federated Learning in Medical Imaging", 2021,
https://arxiv.org/abs/2112.10001: sites with different organs or modalities average the encoder and keep the rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from polyclinic.core.aggregates import Reply
from polyclinic.core.method import Request
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError
from polyclinic.learning.tasks.task import InEncoder, Not, Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.personalization.partial_personalization import Personal


@dataclass(frozen=True)
class PrivateHeads(Personal):
    """The encoder is shared; all other layers stay at the site, which may have fewer classes than others.

    Attributes:
        classes: Number of the network's outputs that a site uses, as pairs with its name; all for sites without a pair.
    """

    classes: tuple[tuple[str, int], ...] = ()

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        used = dict(self.classes).get(site.name)
        if used and "own" not in memory:
            memory = {**memory, "own": limited(request.trees["own"], used)}
        return super().site_update(request, memory, site)


def limited(own: Tree, used: int) -> Tree:
    """Return a head with the first ``used`` classes: the bias of the others is too low for them to be learned."""
    last = [name for name in own if name.endswith("bias")][-1]
    bias = torch.where(torch.arange(len(own[last])) < used, own[last], -1e4)
    return {**own, last: bias}


def private_heads(
    task: Task, local: LocalTraining, sites: Sequence[str], *, classes: tuple[int, ...] = (), uniform: bool = False
) -> PrivateHeads:
    """Compose FedAvg of the encoder with heads that stay at the sites.

    Args:
        classes: Number of classes of each site, in the order of the sites' names; all if empty.
        uniform: Whether all sites have equal weight, instead of in proportion to their training examples.
    """
    if classes and len(classes) != len(sites):
        raise ConfigError(
            f"private-heads: classes has {len(classes)} numbers and there are {len(sites)} sites: give one each"
        )
    if wrong := [c for c in classes if not 1 < c <= task.network.outputs]:
        raise ConfigError(f"private-heads: {wrong[0]} classes at a site, where the network has {task.network.outputs}")
    pairs = tuple(zip(sorted(sites), classes, strict=False))
    return PrivateHeads(FedAvg(task, local, uniform=uniform), Not(InEncoder(task)), pairs)
