"""Comparison of a method's step with the same step written again, with PyTorch's own optimizers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyclinic.core.site import Site
from polyclinic.core.tree import Tree
from polyclinic.learning.networks.model_tree import load, params_of
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.segmentation import Segmentation
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from tests.conftest import little_sites, segmentation_sites
from tests.methods.test_features_of_networks import NETWORKS

QUICK = ("cnn, batch", "cnn, group, 3-D")
KINDS = tuple(
    kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow)
    for kind in ("cnn, batch", "cnn, batch, 3-D", "cnn, group", "cnn, group, 3-D", "vit", "vit, 3-D")
)
"""Networks with batch normalization, with group normalization, and a transformer, each in two and three dimensions."""


UNETR = (("feature_size", 4), ("hidden_size", 12), ("mlp_dim", 24), ("num_heads", 2))
MASK_NETWORKS = {
    f"{name}{after}": Network(of, (1, *[16] * dims), 2, options)
    for name, of, options in (
        ("unet, batch", "unet", (("width", 2), ("norm", "batch"))),
        ("unet, group", "unet", (("width", 8), ("norm", "group"))),
        ("unetr", "unetr", UNETR),
    )
    for dims, after in ((2, ""), (3, ", 3-D"))
}
MASK_KINDS = tuple(
    kind if kind == "unet, batch" else pytest.param(kind, marks=pytest.mark.slow) for kind in MASK_NETWORKS
)
"""Networks for segmentation: a U-Net with batch or group normalization, and UNETR, each in 2-D and 3-D."""


def agree(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], most: float = 1e-5) -> None:
    """Assert that both trees have the same names, and that no element differs by more than ``most``."""
    assert found.keys() == wanted.keys()
    gaps = {name: float((leaf.double() - wanted[name].double()).abs().max()) for name, leaf in found.items()}
    assert max(gaps.values()) <= most, {name: gap for name, gap in gaps.items() if gap > most}


def largest_gap(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The largest absolute difference of two trees."""
    return max(float((leaf - other[name]).abs().max()) for name, leaf in one.items())


def place(kind: str, classes: int = 2) -> tuple[Classification, dict[str, Site]]:
    """A task with the network ``kind``, and three sites for it."""
    network = replace(NETWORKS[kind][0], outputs=classes)
    return Classification(network), little_sites(network.inputs, classes=classes)


def place_of_masks(kind: str) -> tuple[Segmentation, dict[str, Site]]:
    """A task of segmentation with the network ``kind``, and three sites for it."""
    network = MASK_NETWORKS[kind]
    return Segmentation(network), segmentation_sites(dims=len(network.inputs) - 1)


def minibatches(
    local: LocalTraining, site: Site, round: int = 0, slot: str = "", data: Any = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """The minibatches that ``LocalTraining.fit`` takes, of the training examples unless others are given."""
    rng = site.rng(round, "train", "train", slot)
    torch.randint(2**62, (), generator=rng)  # what `seeded` draws
    yield from local.batches(site.data["train"] if data is None else data, rng)


def ready(task: Task, params: Tree) -> nn.Module:
    """A new model with ``params``, in training mode."""
    return load(task.model(), params).train()


def in_head(name: str) -> bool:
    """Whether a tensor of one of the networks in ``KINDS`` belongs to its head."""
    return name.startswith(("head.", "classification_head."))


def entering(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What enters the head, averaged over space or tokens, and the prediction, from one pass."""
    seen: list[Tensor] = []
    head = next(m for n, m in model.named_modules() if in_head(f"{n}."))
    hook = head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    z = model(x)
    hook.remove()
    h = seen[0]
    return (h.flatten(2).mean(2) if h.ndim > 2 else h), z


def statistics(model: nn.Module) -> Tree:
    """A copy of the running statistics."""
    return {name: leaf.clone() for name, leaf in model.named_buffers() if leaf.is_floating_point()}


def restore(model: nn.Module, kept: Tree) -> None:
    """Put running statistics back, after a pass that does not count."""
    for name, leaf in model.named_buffers():
        if name in kept:
            leaf.copy_(kept[name])


def change(model: nn.Module, start: Tree) -> Tree:
    """What the model has moved since ``start``."""
    return {name: leaf - start[name] for name, leaf in params_of(model).items()}


def learned(task: Task) -> list[str]:
    """The names of the parameters, without running statistics."""
    return [name for name, _ in task.model().named_parameters()]


Correct = Callable[..., Tensor]
"""A gradient by the name of its parameter, the gradient, and the parameter's value."""


def descent(
    task: Classification,
    start: Tree,
    site: Site,
    local: LocalTraining,
    round: int = 0,
    *,
    slot: str = "",
    correct: Correct | None = None,
    only: Callable[[str], bool] = lambda name: True,
) -> Tree:
    """PyTorch's SGD on the cross-entropy of the minibatches of ``LocalTraining.fit``: the model after them.

    Args:
        correct: Changes each gradient.
        only: Selects the parameters that are trained.
    """
    model = ready(task, start)
    named = [(name, p) for name, p in model.named_parameters() if only(name)]
    optimizer = torch.optim.SGD([p for _, p in named], local.lr, momentum=local.momentum)
    for x, y in minibatches(local, site, round, slot):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for name, p in named:
            if correct is not None and p.grad is not None:
                p.grad = correct(name, p.grad, p.detach())
        optimizer.step()
    return params_of(model)


def mean(trees: Sequence[Tree], weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    """The mean of trees, in double precision, with weights that need not sum to 1."""
    shares = torch.tensor(weights or [1.0] * len(trees), dtype=torch.float64)
    shares = shares / shares.sum()
    return {
        name: sum(share * leaves[name].double() for share, leaves in zip(shares, trees, strict=True)).float()  # type: ignore[union-attr]
        for name in trees[0]
    }


def sizes(sites: Mapping[str, Site]) -> list[float]:
    """The number of training examples of each site."""
    return [float(len(site.data["train"])) for site in sites.values()]


def full_gradient(task: Classification, params: Tree, site: Site) -> Tree:
    """The gradient of the mean loss of all training examples, in one pass in training mode; statistics are dropped."""
    model, (x, y) = ready(task, params), site.data["train"][torch.arange(len(site.data["train"]))]
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(F.cross_entropy(model(x), y), parameters, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, gradients, strict=True)}


def full_loss(task: Classification, params: Tree, site: Site) -> float:
    """The mean loss of all training examples, in evaluation mode."""
    x, y = site.data["train"][torch.arange(len(site.data["train"]))]
    with torch.no_grad():
        return float(F.cross_entropy(load(task.model(), params).eval()(x), y))
