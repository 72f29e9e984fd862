"""A study from Python, with a data set, a network and a loss of one's own, to tables and a module.

The program of the README, to a report, is in ``tests/docs/test_pages.py``.
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import polyclinic as pc
from polyclinic.core import extensions
from polyclinic.data.examples import DataError
from polyclinic.data.sources.datasets import Datasets
from polyclinic.errors import ConfigError, RunError
from polyclinic.learning.networks.architectures import Architecture
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.python_studies import ResultTable
from polyclinic.testing import Broken, check_network


class MyNet(nn.Module):
    def __init__(self, outputs: int = 2) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2))
        self.out = nn.Linear(16, outputs)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.out(self.body(x).flatten(1))
        return found


class Hospital(torch.utils.data.Dataset[Any]):
    """Images of 8 x 8 pixels, brighter where the label is 1; two images of each patient."""

    def __init__(self, seed: int, n: int = 80) -> None:
        rng = torch.Generator().manual_seed(seed)
        self.y = torch.arange(n).div(2, rounding_mode="floor") % 2
        self.x = torch.randn(n, 1, 8, 8, generator=rng) + self.y.view(-1, 1, 1, 1)
        self.patients = [f"{seed}-{i // 2}" for i in range(n)]

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.x[i], int(self.y[i])


def my_loss(scores: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(scores, target, label_smoothing=0.1)


def my_metric(scores: Any, target: Any) -> float:
    return float((scores.argmax(1) == target).mean())


def my_augmentation(image: Tensor, target: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    return image + 0.1 * torch.randn(image.shape, generator=rng), target


def test_a_study_of_data_sets_a_network_a_loss_a_metric_and_an_augmentation(tmp_path: Path) -> None:
    sites = {"lyon": Hospital(0), "kiel": Hospital(1), "oslo": Hospital(2)}
    seen: list[Any] = []

    def study() -> Any:
        return pc.experiment(
            "mine",
            sites,
            patients={name: data.patients for name, data in sites.items()},
            network=pc.network(MyNet, head="out."),
            loss=pc.loss(my_loss),
            evaluation={"metric": pc.metric(my_metric, label="Mine")},
            augmentation={"own": [pc.augmentation(my_augmentation)]},
            methods=["local", "fedavg", "fedper", "fedbn", {"name": "fedprox", "mu": 0.01}],
            rounds=2,
            training={"lr": 0.1},
            out=tmp_path,
            progress=seen.append,
        )

    result = study()
    rows = {row["method"]: row for row in result.compare()}
    assert set(rows) == {"local", "fedavg", "fedper", "fedbn", "fedprox"}
    metric = result.evaluation.metric
    assert (metric.label, metric.name.split("-")[0]) == ("Mine", "local:my_metric")
    assert rows["fedavg"][metric.name] > 0.55
    assert rows["fedavg"][metric.name] == result.evaluation.of("fedavg").means["accuracy"].value
    assert "fedavg" in str(result.compare())
    assert "<td>fedavg</td>" in result.compare()._repr_html_()
    assert len(result.curves()) == 5 * 2 * 3
    assert {row["round"] for row in result.curves()} == {1, 2}
    model = result.model("fedavg")
    assert isinstance(model, MyNet)
    assert not model.training
    assert [event.what for event in seen].count("tested") == 5
    seen.clear()
    again = study()  # continues a finished run: nothing is trained again
    assert again.folder == result.folder
    assert "round" not in [event.what for event in seen]
    with pytest.raises(RuntimeError, match=r"fedbn keeps body.1.bias, .* at each site, so that there is no one model"):
        result.model("fedbn")
    with pytest.raises(RuntimeError, match=r"no such model\. The methods are local, fedavg"):
        result.model("krum")


def test_a_table_is_a_pandas_frame_where_pandas_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    table = ResultTable(({"site": "lyon", "auc": 0.9}, {"site": "kiel", "auc": 0.8}))
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=list))
    assert table.frame() == list(table.rows)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(RunError, match="a data frame needs pandas, which is not installed: pip install pandas"):
        table.frame()


def test_the_head_of_a_network_of_one_size_is_its_last_layer() -> None:
    name = pc.network(lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), name="plain")
    assert Network(name, (4,), 2).parts.head == ("2.",)


def test_networks_state_their_parts() -> None:
    with pytest.raises(ConfigError, match=r"head = 'fc.': no tensor's name begins so. They begin with body., out."):
        pc.network(MyNet, head="fc.")
    with pytest.raises(ConfigError, match="needs 1 arguments"):
        pc.network(lambda width: MyNet(), head="out.")
    name = pc.network(lambda inputs, outputs: MyNet(outputs), head="out.", name="shaped")
    assert name.startswith("local:shaped-")
    assert isinstance(extensions.load("networks", name).build((1, 8, 8), 3).out, nn.Linear)
    assert pc.network(MyNet, head="out.") == pc.network(MyNet, head="out.")


@pytest.mark.parametrize(
    ("items", "task", "shape"),
    [
        ([(torch.zeros(1, 4, 4), 1), (torch.zeros(1, 4, 4), 0)], "classification", (2, 1, 4, 4)),
        ([{"image": torch.zeros(1, 4, 4), "label": torch.zeros(1, 4, 4).long()}] * 2, "segmentation", (2, 1, 4, 4)),
        (
            [{"img": torch.zeros(1, 4, 4).numpy(), "seg": torch.ones(4, 4).long().numpy()}] * 2,
            "segmentation",
            (2, 1, 4, 4),
        ),
        ([(torch.zeros(5), 0.5), (torch.zeros(5), 1.5)], "regression", (2, 5)),
        ([(torch.zeros(5), torch.tensor([0.0, 1.0]))] * 2, "multilabel", (2, 5)),
    ],
)
def test_items_of_usual_forms_are_read(items: list[Any], task: str, shape: tuple[int, ...]) -> None:
    source = Datasets("toy", {"a": items}, None)
    assert source.task == task
    found = source.examples(["a/1", "a/0"])
    assert tuple(found.inputs.shape) == shape
    assert found.ids == ("a/1", "a/0")
    assert source.table().columns["site"] == ("a", "a")
    assert source.fingerprint == Datasets("other", {"a": items}, None).fingerprint
    assert source.fingerprint != Datasets("toy", {"b": items}, None).fingerprint


@pytest.mark.parametrize(
    ("sites", "patients", "message"),
    [
        ({}, None, "no site has a data set"),
        ({"a": []}, None, "a: its data set is empty"),
        ({"a": [(torch.zeros(2), 0)]}, {"a": [1, 2]}, "a: 2 patients for 1 items"),
        ({"a": [(torch.zeros(2), 0)]}, {"a": [1], "b": [1]}, "patients: the site 'b' has no data set"),
        ({"a": [torch.zeros(2)]}, None, "a, item 0: it is a Tensor, not a pair of input and target"),
        ({"a": [{"scan": 1, "truth": 2}]}, None, "its keys are scan, truth: name those of input and target with keys="),
        ({"a": [(torch.zeros(2), 0), (torch.zeros(3), 0)]}, None, "the inputs of all items must have one shape"),
        ({"a": [(1.0, 0)]}, None, "its input is one number"),
    ],
)
def test_items_and_patients_that_do_not_fit_are_refused(sites: Any, patients: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        _ = Datasets("toy", sites, patients).fingerprint


def test_patients_must_be_stated(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="patients"):
        pc.experiment("x", {"a": Hospital(0)}, network="mlp", out=tmp_path)  # type: ignore[call-arg]


class Noisy(MyNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.randn_like(x))


class Unused(MyNet):
    def __init__(self, outputs: int = 2) -> None:
        super().__init__(outputs)
        self.extra = nn.Linear(2, 2)


class Mixing(MyNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - super().forward(x).mean(0)


@pytest.mark.parametrize(
    ("net", "how", "message"),
    [
        (MyNet, {}, ""),
        (Noisy, {}, "predictions repeat themselves to the bit"),
        (Unused, {}, "every parameter affects the prediction, and extra.weight"),
        (Mixing, {}, "examples do not affect each other"),
        (MyNet, {"head": ("fc.",)}, "tensors of the head begin with fc."),
        (MyNet, {"encoder": ("enc.",)}, "tensors of the encoder begin with enc."),
        (MyNet, {"head": ("",)}, "the head is not the whole network"),
        (lambda outputs: MyNet(outputs + 1), {}, r"a prediction has the shape \[b, outputs, ...\], not \(4, 3\)"),
    ],
)
def test_check_network_finds_broken_promises(net: Any, how: dict[str, Any], message: str) -> None:
    architecture = Architecture(lambda inputs, outputs: net(outputs), **{"head": ("out.",), "summary": "", **how})
    if not message:
        check_network(architecture, (1, 8, 8))
        return
    with pytest.raises(Broken, match=message):
        check_network(architecture, (1, 8, 8))
