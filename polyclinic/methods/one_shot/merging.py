"""Merging of data vectors: the arithmetic, without messages or files.

The sum and the restoration of batch normalization are those of data vectors (see ``data_vectors``). TIES: Yadav, Tam,
Choshen, Raffel and Bansal, "TIES-Merging: Resolving Interference When Merging Models", NeurIPS 2023, Algorithm 1,
https://arxiv.org/abs/2306.01708. DARE: Yu, Yu, Yu, Huang and Li, "Language Models are Super Mario: Absorbing
Abilities from Homologous Models as a Free Lunch", ICML 2024, section 3, https://arxiv.org/abs/2311.03099. The lengths
by layer are an addition.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from polyclinic.core import tree
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree
from polyclinic.errors import ConfigError
from polyclinic.learning.batch import chunks
from polyclinic.learning.networks.model_tree import cached_model, live_batch_norms, params_of
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining


@dataclass(frozen=True)
class Merging:
    """How vectors become one model.

    Attributes:
        scale: λ; None to search it on labeled examples, or for 1 over the number of sites without any.
        ties: The fraction of each vector's largest entries that TIES keeps; 0 for the plain sum.
        by_layer: Whether each layer of the sum is rescaled to the mean norm of the sites', so that layers in which
            sites agree do not outgrow the others. λ is then relative to 1.
        tune: Epochs over the labeled examples at the end, at a tenth of the learning rate.
        dare: The fraction p of each vector's entries that DARE drops at random before anything else; the others are
            multiplied by 1/(1 - p). The entries depend on the site's name alone.
    """

    scale: float | None = None
    ties: float = 0.0
    by_layer: bool = False
    tune: int = 0
    dare: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.dare < 1:
            raise ConfigError(f"dare is the share of entries to drop, from 0 to less than 1, not {self.dare}")
        if not 0 <= self.ties <= 1:
            raise ConfigError(f"ties is the share of entries to keep, from 0 to 1, not {self.ties}")
        if self.scale is not None and not math.isfinite(self.scale):
            raise ConfigError(f"scale must be a finite number, not {self.scale}")

    def direction(self, vectors: Mapping[str, Tree]) -> Tree:
        """Return the direction that λ scales: ``Σ_j τ_j`` in name order, or what DARE, TIES or ``by_layer`` give."""
        ordered = [thinned(vectors[name], self.dare, name) if self.dare else vectors[name] for name in sorted(vectors)]
        merged = elected(ordered, self.ties) if self.ties else total(ordered)
        return lengths_of(merged, ordered) if self.by_layer else merged

    def scales(self, count: int) -> tuple[float, ...]:
        """Return the values of λ to try for ``count`` = K sites: 1/4K, 1/2K, 3/4K, 1/K, 2/K … 1; ¼ to 3/2 for means."""
        if self.ties or self.by_layer:
            return (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
        return tuple(j / count for j in (0.25, 0.5, 0.75, *range(1, count + 1)))

    def default(self, count: int) -> float:
        """Return λ without a search: that of the mean."""
        return 1.0 if self.ties or self.by_layer else 1.0 / count


def total(ordered: list[Tree]) -> Tree:
    """Return ``Σ_j τ_j``, from left to right."""
    summed = ordered[0]
    for one in ordered[1:]:
        summed = tree.add(summed, one)
    return summed


def elected(ordered: list[Tree], keep: float) -> Tree:
    """Apply TIES: trim each vector, elect each entry's sign by total magnitude, and average the entries that agree."""
    flat = torch.stack([trimmed(tree.flatten(one), keep) for one in ordered])
    sign = torch.sign(flat.sum(0))  # γ = sgn(Σ_j τ̂_j), which is the sign of the larger mass
    agree = (torch.sign(flat) == sign) & (sign != 0)
    mean = (flat * agree).sum(0) / agree.sum(0).clamp_min(1)  # over the sites that agree
    return tree.unflatten(mean, ordered[0])


def thinned(vector: Tree, drop: float, site: str) -> Tree:
    """Apply DARE: ``m ⊙ τ / (1 - p)`` with m 0 with probability p = ``drop``, drawn from the site's name."""
    seed = int.from_bytes(hashlib.blake2b(site.encode(), digest_size=8).digest(), "big") >> 1
    rng = torch.Generator().manual_seed(seed)

    def one(leaf: Tensor) -> Tensor:
        return leaf * (torch.rand(leaf.shape, generator=rng) >= drop) / (1 - drop)

    return {name: one(vector[name]) for name in sorted(vector)}


def trimmed(vector: Tensor, keep: float) -> Tensor:
    """Return ``vector`` [n] with all but its ``⌈keep · n⌉`` largest entries set to 0."""
    count = math.ceil(keep * len(vector))
    kept = torch.zeros_like(vector)
    index = vector.abs().topk(count).indices
    kept[index] = vector[index]
    return kept


def lengths_of(direction: Tree, ordered: list[Tree]) -> Tree:
    """Return ``direction`` with each tensor rescaled to the mean norm of the sites': ``d · mean_j ‖τ_j‖ / ‖d‖``."""

    def one(name: str, leaf: Tensor) -> Tensor:
        own = float(leaf.double().norm())
        mean = sum(float(vector[name].double().norm()) for vector in ordered) / len(ordered)
        return leaf * (mean / own) if own else leaf

    return {name: one(name, leaf) for name, leaf in direction.items()}


def random_like(vector: Tree, rng: torch.Generator) -> Tree:
    """Return a random vector with the tensor norms of ``vector``, as a control without information from data."""

    def one(leaf: Tensor) -> Tensor:
        drawn = torch.randn(leaf.shape, generator=rng)
        return drawn * (float(leaf.double().norm()) / max(float(drawn.double().norm()), 1e-300))

    return {name: one(leaf).to(leaf.dtype) for name, leaf in vector.items()}


def restored(task: Task, params: Tree, data: Any, device: str = "cpu", size: int = 64) -> Tree:
    """Return ``params`` with running statistics of batch normalization from ``data``, by forward passes alone.

    Targets are not used and no weight changes. Every statistic is the mean over batches of nearly equal size.
    """
    model = cached_model(task, params, device).eval()
    norms: list[Any] = [m for m in live_batch_norms(model) if m.track_running_stats]
    if not norms or not len(data):
        return params
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over batches
        norm.train()
    try:
        with torch.no_grad():
            for chunk in torch.arange(len(data)).tensor_split(-(-len(data) // size)):
                model(data[chunk][0].to(device))
        return params_of(model)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def loss_on(task: Task, params: Tree, data: Any, device: str = "cpu", size: int = 64) -> float:
    """Return the mean loss of ``params`` over all examples of ``data``; infinite if it is not a number."""
    model, summed = cached_model(task, params, device).eval(), 0.0
    with torch.no_grad():
        for chunk in chunks(data, size):
            x, y = data[chunk]
            summed += float(task.loss(model, (x.to(device), y.to(device)))) * len(chunk)
    mean = summed / len(data)
    return mean if math.isfinite(mean) else math.inf


def search(
    how: Merging, task: Task, base: Tree, vectors: Mapping[str, Tree], labeled: Any, device: str = "cpu"
) -> dict[float, float]:
    """Return the loss on ``labeled`` by λ, each after restoration on its inputs."""
    direction = how.direction(vectors)

    def loss(scale: float) -> float:
        moved = tree.shift(base, tree.scale(direction, scale))
        return loss_on(task, restored(task, moved, labeled, device), labeled, device)

    return {scale: loss(scale) for scale in how.scales(len(vectors))}


def merged(
    how: Merging,
    task: Task,
    base: Tree,
    vectors: Mapping[str, Tree],
    local: LocalTraining = LocalTraining(),
    labeled: Any = None,
    unlabeled: Any = None,
    site: Site = Site("server"),
) -> tuple[Tree, float]:
    """Return ``θ_pre + λ · direction``, restored, and λ. The order of ``vectors`` has no effect.

    Args:
        labeled: Determines λ and restores.
        unlabeled: Restores, if given.
        site: The site that runs this, for ``tune``.
    """
    scale, device = how.scale, site.device
    if scale is None and labeled is not None:
        losses = search(how, task, base, vectors, labeled, device)
        scale = min(losses, key=lambda s: (losses[s], s))
    elif scale is None:
        scale = how.default(len(vectors))
    params = tree.shift(base, tree.scale(how.direction(vectors), scale))  # θ_mix = θ_pre + λ Σ_j τ_j
    examples = unlabeled if unlabeled is not None else labeled
    if examples is not None:
        params = restored(task, params, examples, device)
    if how.tune and labeled is not None:
        gentle = replace(local, epochs=how.tune, steps=None, lr=local.lr / 10)
        params = gentle.fit(task, params, site, 0, data=labeled)
    return params, scale
