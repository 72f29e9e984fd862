"""Networks of which some layers are in another type: every method trains them, or refuses them before it runs."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polyclinic import python_studies
from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.engines.plan import Plan
from polyclinic.errors import ConfigError
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.methods.catalog import METHODS
from polyclinic.methods.tensor_types import NEEDS, precision_problem
from tests.conftest import finding_sites, little_sites
from tests.laws.test_methods import FEW_STEPS, LOCAL, held_by_server

PLACES = {
    "between": ("middle", torch.float64),
    "encoder": ("features", torch.float64),
    "head": ("head", torch.float64),
    "half": ("middle", torch.bfloat16),
}
"""The layers that are in another type."""
IMAGES = [n for n, e in METHODS.items() if not e.tasks or {"classification", "multilabel"} & {*e.tasks}]
SEQUENTIAL = ("split", "u-split")
"""Methods for networks of sequential layers only."""
QUICK = (*NEEDS, "fedavg", "scaffold", "fedbn", "moon", "fedrep", "feddf", "krum", "fedproto", "mime")


class Mixed(nn.Module):
    """Layers of which some are in another type, with a cast before each of them."""

    def __init__(self, channels: int, outputs: int, part: str, dtype: torch.dtype) -> None:
        """Create the network, in which ``part`` has the type ``dtype``."""
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(channels, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.middle = nn.Linear(6, 6)
        self.head = nn.Linear(6, outputs)
        getattr(self, part).to(dtype)
        self.types = {name: dtype if name == part else torch.float32 for name in ("features", "middle", "head")}

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits."""
        h = self.features(x.to(self.types["features"])).mean((2, 3))
        h = self.middle(h.to(self.types["middle"])).relu()
        z: Tensor = self.head(h.to(self.types["head"]))
        return z


def network(place: str) -> str:
    """The name of the network with other types at ``place``."""

    def mixed(inputs: tuple[int, ...], outputs: int) -> nn.Module:
        return Mixed(inputs[0], outputs, *PLACES[place])

    return python_studies.network(mixed, head="head.", encoder="features.", name=f"mixed-{place}")


def planned(name: str, place: str) -> tuple[Plan, dict[str, Site]]:
    several = bool(METHODS[name].tasks) and "classification" not in METHODS[name].tasks
    sites = finding_sites() if several else little_sites()
    plan = Plan(
        kind="multilabel" if several else "classification",
        network=network(place),
        inputs=(1, 8, 8),
        outputs=3 if several else 2,
        method=name,
        sites=tuple(sites),
        rounds=5,
        training={"epochs": LOCAL.epochs, "batch_size": LOCAL.batch_size, "lr": LOCAL.lr},
        options=FEW_STEPS.get(name, {}),
    )
    return plan, sites


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in IMAGES if n not in SEQUENTIAL]
)
def test_a_method_trains_other_types_or_is_refused_with_the_parameter(name: str, place: str) -> None:
    plan, sites = planned(name, place)
    part, dtype = PLACES[place]
    try:
        method = plan.build_method()
    except ConfigError as error:
        said = str(error)
        assert f"the parameter {part}." in said
        assert str(dtype).removeprefix("torch.") in said
        assert said.startswith(f"{name} needs ")
        return
    engine = InProcess(method, sites, server_data=held_by_server(sites))
    state: Any = method.init(plan.build_task().first(0))
    for step in train(method, engine, state, rounds=3):
        assert not step.lost, step.lost


def test_each_need_is_refused_somewhere() -> None:
    """A method whose need no network shows could be left out of the table."""
    refused = set()
    for place in PLACES:
        task = Classification(Network(network(place), (1, 8, 8), 2))
        refused |= {name for name in NEEDS if precision_problem(name, task)}
    assert refused == set(NEEDS)


def test_networks_in_single_precision_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polyclinic.methods.tensor_types._tensors", lambda *_: pytest.fail("tried"))
    task = Classification(Network("cnn", (1, 8, 8), 2, (("width", 4), ("depth", 2))))
    assert {precision_problem(name, task) for name in NEEDS} == {""}
