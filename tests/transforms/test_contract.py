"""One table of every transform: a method sent through it is a method that keeps all promises."""

from typing import Any

import pytest

from polyclinic.core.pipeline import Transform
from polyclinic.methods.fedavg import FedAvg
from polyclinic.methods.scaffold import scaffold
from polyclinic.tasks.classification import Classification
from polyclinic.tasks.local import Local
from polyclinic.tasks.networks import Network
from polyclinic.testing import check_transform
from polyclinic.transforms import table
from tests.conftest import little_sites

TASK = Classification(Network("cnn", (1, 8, 8), 2, (("width", 4), ("depth", 2), ("norm", "group"))))
LOCAL = Local(epochs=1, batch_size=8, lr=0.05)
NEEDS: dict[str, Any] = {"clip": {"bound": 1.0}, "adaptive-clip": {"start": 1.0}, "gaussian": {"multiplier": 1.0},
                         "top-k": {"fraction": 0.1}}  # fmt: skip


@pytest.mark.parametrize("name", table.TRANSFORMS)
@pytest.mark.parametrize("method", ["fedavg", "scaffold"])
def test_promises(name: str, method: str) -> None:
    transform = table.build({"name": name, **NEEDS.get(name, {})})
    before: list[Transform] = [table.build({"name": "clip", "bound": 1.0})] if name == "gaussian" else []
    inner = FedAvg(TASK, LOCAL, uniform=True) if method == "fedavg" else scaffold(TASK, LOCAL, 2)
    check_transform(inner, *before, transform, params=TASK.first(0), sites=little_sites(count=2))


def test_every_line_of_the_table_can_be_made_and_described() -> None:
    for entry in table.TRANSFORMS.values():
        made = table.build({"name": entry.name, **NEEDS.get(entry.name, {})})
        assert isinstance(made, table.maker(entry))
        assert set(NEEDS.get(entry.name, {})) == {
            key for key, option in table.options(entry).items() if table.default(option) is ... and key != "parts"
        }
        assert table.types(entry).keys() >= table.options(entry).keys()
    with pytest.raises(ValueError, match=r'no transform is called "top_k". Did you mean "top-k"'):
        table.entry("top_k")
