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
from polyclinic.learning.networks.model_tree import changes_of, params_of
from polyclinic.learning.training.gradient_memory import take_gradients
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


@pytest.mark.parametrize("large", [0, 2**16])
@pytest.mark.parametrize("local", [LocalTraining(batch_size=4, lr=0.1), Halved(batch_size=4, lr=0.1)])
def test_a_change_is_the_difference_of_what_fit_returns(
    local: LocalTraining, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polyclinic.learning.training.gradient_memory.LARGE", large)
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


def test_gradients_are_overwritten_only_if_no_one_else_has_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polyclinic.learning.training.gradient_memory.LARGE", 24)
    model = nn.ParameterDict({name: nn.Parameter(torch.zeros(2, 3)) for name in "abcdefgh"})
    model["i"] = nn.Parameter(torch.zeros(5))
    model["i"].grad = torch.ones(5)  # small
    both = torch.ones(2, 2, 3)
    model["a"].grad, model["b"].grad = both[0], both[1]  # one memory
    model["c"].grad = torch.ones(3, 2).T  # another layout
    model["d"].grad = torch.ones(2, 3, requires_grad=True)
    model["e"].grad = torch.ones(4, 3)[:2]  # part of a larger memory
    model["f"].grad = torch.ones(2, 3)
    model["g"].grad = model["h"].grad = torch.ones(2, 3)
    own = model["f"].grad
    taken = take_gradients(model)
    assert list(taken) == ["f"]
    assert taken["f"] is own
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        model["f"].fill_(3.0)
    for found in (params_of(model, taken), changes_of(model, taken, params_of(model))):
        assert found["f"] is own
        assert found["a"].data_ptr() != model["a"].data_ptr()
    assert float(own.abs().max()) == 0


def test_a_gradient_that_a_hook_has_kept_does_not_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polyclinic.learning.training.gradient_memory.LARGE", 0)
    rng = torch.Generator().manual_seed(1)
    data = Examples(torch.randn(12, 4, generator=rng), torch.randint(0, 4, (12,), generator=rng), NAMES, NAMES)
    site, task, kept = Site("a", {"train": data}), Task(), list[tuple[torch.Tensor, torch.Tensor]]()

    def keep(name: str, gradient: torch.Tensor) -> torch.Tensor:
        kept.append((gradient, gradient.clone()))
        return gradient

    LocalTraining(batch_size=4, lr=0.1).fit(task, params_of(task.model()), site, 0, gradient_hook=keep)
    assert kept
    assert all(torch.equal(gradient, copy) for gradient, copy in kept)
