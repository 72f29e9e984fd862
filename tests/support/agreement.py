"""Comparison of a method's step with the same step written again, with PyTorch's own optimizers."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from polyclinic.core.site import Site
from polyclinic.core.tree import Tree
from polyclinic.learning.networks.model_tree import load, params_of
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from tests.conftest import little_sites
from tests.methods.test_features_of_networks import NETWORKS

KINDS = (
    "cnn, batch",
    pytest.param("cnn, group, 3-D", marks=pytest.mark.slow),
    pytest.param("vit", marks=pytest.mark.slow),
)
"""Networks with batch normalization in 2-D, group normalization in 3-D, and a transformer."""


def agree(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], most: float = 1e-5) -> None:
    """Assert that both trees have the same names, and that no element differs by more than ``most``."""
    assert found.keys() == wanted.keys()
    gaps = {name: float((leaf.double() - wanted[name].double()).abs().max()) for name, leaf in found.items()}
    assert max(gaps.values()) <= most, {name: gap for name, gap in gaps.items() if gap > most}


def place(kind: str, classes: int = 2) -> tuple[Classification, dict[str, Site]]:
    """A task with the network ``kind``, and three sites for it."""
    network = replace(NETWORKS[kind][0], outputs=classes)
    return Classification(network), little_sites(network.inputs, classes=classes)


def minibatches(local: LocalTraining, site: Site, round: int = 0, slot: str = "") -> Iterator[tuple[Tensor, Tensor]]:
    """The minibatches that ``LocalTraining.fit`` takes."""
    rng = site.rng(round, "train", "train", slot)
    torch.randint(2**62, (), generator=rng)  # what `seeded` draws
    yield from local.batches(site.data["train"], rng)


def ready(task: Task, params: Tree) -> nn.Module:
    """A new model with ``params``, in training mode."""
    return load(task.model(), params).train()


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
