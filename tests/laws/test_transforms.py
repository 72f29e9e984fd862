"""One table of every transform: a method sent through it is a method that keeps all promises."""

from typing import Any

import pytest

from polyclinic.compression import transform_table
from polyclinic.core.pipeline import Transform
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.optimization.fedavg import FedAvg
from polyclinic.methods.optimization.scaffold import Scaffold
from polyclinic.testing import check_transform
from tests.conftest import little_sites

TASK = Classification(Network("cnn", (1, 8, 8), 2, (("width", 4), ("depth", 2), ("norm", "group"))))
LOCAL = LocalTraining(epochs=1, batch_size=8, lr=0.05)
NEEDS: dict[str, Any] = {
    "clip": {"bound": 1.0},
    "adaptive-clip": {"start": 1.0},
    "gaussian": {"multiplier": 1.0},
    "top-k": {"fraction": 0.1},
}


@pytest.mark.parametrize("name", transform_table.TRANSFORMS)
@pytest.mark.parametrize("method", ["fedavg", "scaffold"])
def test_promises(name: str, method: str) -> None:
    transform = transform_table.build({"name": name, **NEEDS.get(name, {})})
    before: list[Transform] = [transform_table.build({"name": "clip", "bound": 1.0})] if name == "gaussian" else []
    inner = FedAvg(TASK, LOCAL, uniform=True) if method == "fedavg" else Scaffold(TASK, 2, LOCAL)
    check_transform(inner, *before, transform, params=TASK.first(0), sites=little_sites(count=2))


def test_every_line_of_the_table_can_be_made_and_described() -> None:
    for entry in transform_table.TRANSFORMS.values():
        made = transform_table.build({"name": entry.name, **NEEDS.get(entry.name, {})})
        assert isinstance(made, transform_table.maker(entry))
        assert set(NEEDS.get(entry.name, {})) == {
            key
            for key, option in transform_table.options(entry).items()
            if transform_table.default(option) is ... and key != "parts"
        }
        assert transform_table.types(entry).keys() >= transform_table.options(entry).keys()
    with pytest.raises(ValueError, match=r'unknown transform "top_k". Did you mean "top-k"'):
        transform_table.entry("top_k")
