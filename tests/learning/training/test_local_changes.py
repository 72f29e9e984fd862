"""The change of a site's parameters: what training adds to the start, to the bit, for every kind of model."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from polyclinic.core import tree
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree
from polyclinic.data.examples import Examples
from polyclinic.learning.networks.model_tree import params_of
from polyclinic.learning.training.local import LocalTraining

NAMES = tuple(f"p{i}" for i in range(12))


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


@dataclass(frozen=True)
class Task:
    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return tied()

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])


class Halved(LocalTraining):
    """Training of a package with a ``fit`` of its own."""

    def fit(self, *given: Any, **options: Any) -> Tree:
        return tree.scale(super().fit(*given, **options), 0.5)


@pytest.mark.parametrize("local", [LocalTraining(batch_size=4, lr=0.1), Halved(batch_size=4, lr=0.1)])
def test_a_change_is_the_difference_of_what_fit_returns(local: LocalTraining) -> None:
    rng = torch.Generator().manual_seed(1)
    data = Examples(torch.randn(12, 4, generator=rng), torch.randint(0, 4, (12,), generator=rng), NAMES, NAMES)
    site, task = Site("a", {"train": data}), Task()
    start = params_of(task.model())
    kept = tree.copy(start)
    fitted = local.fit(task, start, site, 0)
    change = local.change(task, start, site, 0)
    assert change.keys() == fitted.keys()
    assert all(torch.equal(change[name], fitted[name] - start[name]) for name in fitted)
    assert any(float(leaf.abs().max()) > 0 for leaf in change.values())
    tree.scale_(change, 2.0)  # no one else uses it
    again = local.change(task, start, site, 0)
    assert all(torch.equal(2 * again[name], change[name]) for name in change)
    assert all(torch.equal(start[name], kept[name]) for name in start)
