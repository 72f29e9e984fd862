"""Modules of users with unusual structure, trained by every method: layers with two names, shared and excluded tensors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from polyclinic.core.site import Site
from polyclinic.errors import ConfigError
from polyclinic.learning.networks.model_tree import first_names, inspect, params_of, trainable
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.catalog import METHODS
from polyclinic.methods.registry import Setting, build
from polyclinic.testing import check_method
from tests.conftest import Rows


class Classifier(nn.Module):
    """Two convolutions and a linear layer, which parts of it replace."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.head = nn.GroupNorm(2, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.norm(self.second(self.first(x).relu())).relu().mean((2, 3)))
        return found


class TwoNames(Classifier):
    """A layer that is listed twice."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList([self.first, self.second])

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.norm(self.body[1](self.first(x).relu())).relu().mean((2, 3)))
        return found


class SharedWeight(Classifier):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.third = nn.Conv2d(4, 4, 3, padding=1)
        self.third.weight = self.second.weight

    def forward(self, x: Tensor) -> Tensor:
        inside = self.third(self.norm(self.second(self.first(x).relu())))
        found: Tensor = self.head(inside.relu().mean((2, 3)))
        return found


class Excluded(Classifier):
    """A weight that does not train, a layer that is not used, and activations in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first.weight.requires_grad_(False)
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.norm(self.second(self.first(x).relu_())).relu_().mean((2, 3)))
        return found


class Normalized(Classifier):
    """Weights that are computed from other tensors, one of them from a power iteration."""

    def __init__(self) -> None:
        super().__init__()
        parametrizations.spectral_norm(self.first)
        parametrizations.weight_norm(self.second)


class Counting(Classifier):
    """A buffer that training changes, and one that is not part of the state."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("scratch", torch.ones(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += len(x)
        return super().forward(x)


class Recurrent(nn.Module):
    """Rows of an image as a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.head = nn.GRU(8, 6, batch_first=True), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.rows(x[:, 0])[0][:, -1])
        return found


MODULES: tuple[Callable[[], nn.Module], ...] = (TwoNames, SharedWeight, Excluded, Normalized, Counting, Recurrent)
LOOK_AHEAD = ("feddg", "apfl", "per-fedavg", "fedala", "fedsam", "mime", "harmofl", "iop-fl", "fisher-merging")
QUICK = {(module.__name__, method) for module in MODULES[:3] for method in LOOK_AHEAD}
PAIRS = [
    pytest.param(
        module,
        method,
        id=f"{module.__name__}-{method}",
        marks=() if (module.__name__, method) in QUICK else pytest.mark.slow,
    )
    for module in MODULES
    for method, of in METHODS.items()
    if not of.tasks or "classification" in of.tasks
]


def examples(seed: int) -> Rows:
    y = torch.arange(6) % 2
    rng = torch.Generator().manual_seed(seed)
    return Rows(torch.randn(6, 1, 8, 8, generator=rng) + y.view(-1, 1, 1, 1), y)


@pytest.mark.parametrize(("module", "method"), PAIRS)
def test_methods_train_it_and_leave_it_whole(module: Callable[[], nn.Module], method: str) -> None:
    task = Classification(Network.of(module, (1, 8, 8), 2))
    roles = ("train", "val", "test", "unlabeled", "public")
    sites = {
        f"site-{k}": Site(f"site-{k}", {role: examples(10 * k + i) for i, role in enumerate(roles)}) for k in range(3)
    }
    options: dict[str, dict[str, Any]] = {"iop-fl": {"passes": 1}, "lc-fed": {"head_steps": 1}}
    setting = Setting(task, LocalTraining(epochs=1, batch_size=4, lr=0.01), tuple(sites), rounds=3)
    try:
        built = build(method, setting, options.get(method, {}))
    except ConfigError as refusal:
        pytest.skip(f"refused before the first round: {refusal}")
    check_method(built, task.first(0), sites, server=Site("server", {"public": examples(0)}))


def test_a_tensor_that_the_network_excludes_does_not_train_and_is_sent() -> None:
    model = Excluded()
    assert "first.weight" not in trainable(model)
    assert "first.weight" in inspect(model).statistics
    assert "first.weight" in params_of(model)


def test_each_name_leads_to_the_one_that_is_sent() -> None:
    names = first_names(SharedWeight())
    assert names["third.weight"] == names["second.weight"] == "second.weight"
    assert names["third.bias"] == "third.bias"
    assert set(first_names(TwoNames()).values()) == params_of(TwoNames()).keys()
