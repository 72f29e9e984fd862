"""Several tasks at once: shared experts with private gates, and private heads over a shared encoder.

FMTL: Huang, Hu, Liu, Xue, Zhu, Song and Tan, "Federated Multi-Task Learning for Joint Diagnosis of Multiple Mental
Disorders on MRI Scans", IEEE Transactions on Biomedical Engineering 70(4):1137-1149, 2023: a feature extractor learned
by federated contrast, and a multi-gate mixture of experts whose experts are shared and whose gates and towers belong to
each disorder. The equations were not at hand: the contrast is the supervised one, added to the loss; the paper's
privacy noise is left to the transforms.

Private heads: Parekh, Lai, Braverman, Leal, Rowe, Pillai and Jacobs, "Cross-Domain Federated Learning in Medical
Imaging", 2021, https://arxiv.org/abs/2112.10001: sites with different organs or modalities average the encoder and keep
the rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from polyclinic.core.method import Ask
from polyclinic.core.site import Site
from polyclinic.core.stats import Reply
from polyclinic.core.tree import Tree, Trees
from polyclinic.methods.fedavg import FedAvg
from polyclinic.methods.personal import Personal, State
from polyclinic.tasks.experts import Gated, WithContrast, begin, gated
from polyclinic.tasks.local import Local
from polyclinic.tasks.task import InEncoder, Not, Task


@dataclass(frozen=True)
class FMTL(Personal):
    """Every site takes from shared experts what its own gate and tower need.

    Attributes:
        task: The study's task with a head of gated experts; what sites predict with.
    """

    task: Task

    def init(self, params: Tree) -> State:
        return super().init(begin(self.task, params))

    @property
    def predicts(self) -> Any:
        return self.task


@dataclass(frozen=True)
class InGate:
    """Whether a tensor lies in the gate or the tower of a network with gated experts."""

    network: Gated

    def __call__(self, name: str) -> bool:
        """Whether ``name`` does."""
        return self.network.private(name)


@dataclass(frozen=True)
class PrivateHeads(Personal):
    """The encoder is shared; what follows stays at the site, which may tell apart fewer classes than others.

    Attributes:
        classes: How many of the network's outputs a site uses, as pairs with its name; all where it is not named.
    """

    classes: tuple[tuple[str, int], ...] = ()

    def site_update(self, ask: Ask, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        used = dict(self.classes).get(site.name)
        if used and "own" not in memory:
            memory = {**memory, "own": limited(ask.trees["own"], used)}
        return super().site_update(ask, memory, site)


def limited(own: Tree, used: int) -> Tree:
    """A head that says only the first ``used`` classes: the bias of the others is so low that none is ever learned."""
    last = [name for name in own if name.endswith("bias")][-1]
    bias = torch.where(torch.arange(len(own[last])) < used, own[last], -1e4)
    return {**own, last: bias}


def fmtl(
    task: Task, local: Local, *, experts: int = 4, width: int = 32, contrast: float = 0.1, temperature: float = 0.1,
    uniform: bool = False,
) -> FMTL:  # fmt: skip
    """Shared experts, private gates and towers.

    Args:
        experts: How many experts there are.
        width: How wide each is.
        contrast: What the supervised contrast of representations counts.
        temperature: τ of the contrast.
        uniform: Whether every site counts the same, instead of in proportion to its examples.
    """
    mixed = gated(task, experts, width)
    learner = cast(Task, WithContrast(mixed, contrast, temperature))
    return FMTL(FedAvg(learner, local, uniform=uniform), InGate(cast(Gated, mixed.network)), mixed)


def private_heads(
    task: Task, local: Local, sites: Sequence[str], *, classes: tuple[int, ...] = (), uniform: bool = False
) -> PrivateHeads:
    """A shared encoder; ``classes`` says how many classes each site tells apart, in the order of the sites' names.

    Args:
        classes: How many classes each site tells apart, in the order of the sites' names; all where empty.
        uniform: Whether every site counts the same, instead of in proportion to its examples.
    """
    if classes and len(classes) != len(sites):
        raise ValueError(
            f"private-heads: classes has {len(classes)} numbers and there are {len(sites)} sites: give one each"
        )
    if wrong := [c for c in classes if not 1 < c <= task.network.outputs]:
        raise ValueError(f"private-heads: {wrong[0]} classes at a site, where the network has {task.network.outputs}")
    pairs = tuple(zip(sorted(sites), classes, strict=False))
    return PrivateHeads(FedAvg(task, local, uniform=uniform), Not(InEncoder(task)), pairs)
