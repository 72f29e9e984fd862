"""A package with a network, a loss, a metric and an augmentation: written as a skeleton, installed, run, hashed, and refused unless allowed."""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from polyclinic.cli import run as commands
from polyclinic.core import extensions
from polyclinic.engines.policy.site_policy import parse as parse_policy
from polyclinic.errors import ConfigError
from polyclinic.evaluation import own_metrics
from polyclinic.evaluation.records.run_reader import read_run
from polyclinic.evaluation.run_evaluation import evaluate
from polyclinic.learning.networks import architectures
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.own_loss import with_loss
from polyclinic.methods.plugins import packages_in
from polyclinic.report.report_builder import build_report
from polyclinic.studies.config.diagnostics import BadStudy
from polyclinic.studies.config.new_plugin import write_plugin
from polyclinic.studies.config.study_config import parse
from polyclinic.studies.run.deployment import NotElsewhere, method_runs
from polyclinic.studies.run.scheduler import run
from tests.conftest import blobs
from tests.support.local_deployment import TRAINING, order
from tests.support.plugin_package import installed
from tests.support.small_runs import npz

STUDY = """\
name = "own"
rounds = 2
[data]
path = "{path}"
kind = "npz"
sites = "site"
[task]
network = "{network}"
loss = "{loss}"
[evaluation]
metric = "{metric}"
[augmentation]
own = ["{augmentation}"]
[training]
batch_size = 8
[engine]
kind = "in-process"
[[methods]]
name = "fedavg"
[[methods]]
name = "fedper"
"""


def forget() -> None:
    """Forget the packages that were found."""
    for cache in (extensions._loaded, architectures._foreign, own_metrics._metric):
        cache.cache_clear()


@pytest.fixture
def acme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The skeleton, installed as pip would, except that its files stay in place."""
    forget()
    folder = tmp_path / "acme"
    write_plugin(folder)
    installed(folder)
    monkeypatch.syspath_prepend(str(folder))
    for name in [name for name in sys.modules if name == "acme" or name.startswith("acme.")]:
        monkeypatch.delitem(sys.modules, name)
    return folder


PARTS = {"network": "acme-net", "loss": "acme-focal", "metric": "acme-kappa", "augmentation": "acme-speckle"}


def text(folder: Path, **parts: str) -> str:
    return STUDY.format(path=npz(folder), **{**PARTS, **parts})


def test_the_skeleton_passes_its_own_tests(acme: Path) -> None:
    tests = runpy.run_path(str(acme / "tests" / "test_plugin.py"))
    for name in ("test_the_network", "test_the_metric", "test_the_augmentation"):
        tests[name]()
    with pytest.raises(ConfigError, match="exists already"):
        write_plugin(acme)
    with pytest.raises(ConfigError, match="lowercase letters, digits and hyphens"):
        write_plugin(acme.parent / "Acme Net")


def test_a_study_runs_with_the_parts_of_a_package(acme: Path, tmp_path: Path) -> None:
    written = text(tmp_path)
    for _ in run(parse(written), written, tmp_path / "run"):
        pass
    assert len(list((tmp_path / "run" / "arms").glob("*/model.safetensors"))) == 2
    assert {"acme.losses", "acme.metrics", "acme.augmentations"} <= sys.modules.keys()
    found = read_run(tmp_path / "run")
    result = evaluate(found)
    assert (result.metric.name, result.metric.label) == ("acme-kappa", "Cohen's kappa")
    assert all(-1 <= scores.metrics["acme-kappa"] <= 1 for scores in found.curves)  # type: ignore[operator]
    assert "Cohen&#39;s kappa" in build_report(tmp_path / "run").read_text(encoding="utf-8").replace("’", "&#39;")
    # without the package, a run whose main metric it provides cannot be evaluated
    next(acme.glob("*.dist-info")).joinpath("entry_points.txt").write_text("")
    forget()
    with pytest.raises(ConfigError, match="the metric 'acme-kappa' of the run own is of a package, or a program"):
        evaluate(found)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"network": "acme-nett"}, 'Did you mean "acme-net"'),
        ({"loss": "focal"}, "no installed package provides a loss"),
        ({"metric": "acme-kapa"}, 'no metric is called "acme-kapa". Did you mean "acme-kappa"'),
        ({"metric": 'auc"\nmetrics = ["auc"] # "'}, 'metrics lists those of packages; "auc" is computed anyway'),
        ({"augmentation": "speckle"}, 'no installed package provides an augmentation called "speckle"'),
    ],
)
def test_unknown_names_are_refused(acme: Path, tmp_path: Path, parts: dict[str, str], message: str) -> None:
    with pytest.raises(BadStudy, match=message):
        parse(text(tmp_path, **parts))
    assert "acme" not in sys.modules


@pytest.mark.parametrize(
    "plan",
    [
        {"network": "acme-net", "network_options": {}},
        {"task": {"loss": "acme-focal"}},
        {"task": {"metrics": ["acme-kappa"]}},
        {"training": {**TRAINING, "augmentation": {"own": ["acme-speckle"]}}},
    ],
    ids=["network", "loss", "metric", "augmentation"],
)
def test_a_site_refuses_the_code_unless_its_policy_names_it(acme: Path, plan: dict[str, Any]) -> None:
    an = order(plan=plan)
    (package,) = an.packages
    assert package[:2] == ("acme", "0.1.0")
    before = an.method_hash
    (reason,) = parse_policy(b"").refusals(an.build_plan())
    assert reason.startswith("the plan needs the package acme 0.1.0, whose code the policy does not allow")
    assert "acme" not in sys.modules, "no code of the package was loaded"
    assert parse_policy(f"[allow]\npackages = ['acme@{package.hash}']".encode()).refusals(an.build_plan()) == []
    (acme / "acme" / "losses.py").write_text((acme / "acme" / "losses.py").read_text() + "# changed\n")
    assert order(plan=plan).method_hash != before
    assert parse_policy(f"[allow]\npackages = ['acme@{package.hash}']".encode()).refusals(an.build_plan()) != []


def test_own_names_of_polyclinic_cannot_be_replaced(acme: Path) -> None:
    info = next(acme.glob("*.dist-info"))
    (info / "entry_points.txt").write_text("[polyclinic.networks]\ncnn = acme.networks:NET\n")
    assert Network("cnn", (1, 8, 8), 2).architecture.summary == "small convolutional classifier"
    assert "acme" not in sys.modules
    assert packages_in({"network": "cnn", "method": "fedavg"}), "though it is not used, a site sees the package"


def test_a_package_that_provides_something_else_is_refused(acme: Path) -> None:
    info = next(acme.glob("*.dist-info"))
    (info / "entry_points.txt").write_text("[polyclinic.networks]\nacme-net = acme.networks:build\n")
    with pytest.raises(ConfigError, match=r"the network 'acme-net' of a.* package is a function, not an Architecture"):
        _ = Network("acme-net", (1, 8, 8), 2).architecture


def test_a_loss_returns_one_number() -> None:
    extensions.register("losses", "each", lambda scores, target: scores.sum(1))
    task = with_loss(Classification(Network("mlp", (4,), 2)), "local:each")
    x, y = blobs(0, 6, (4,))[torch.arange(6)]
    with pytest.raises(ConfigError, match=r"the loss 'local:each' returned \(6,\): return the mean"):
        task.loss(task.model(), (x, y))
    extensions.register("losses", "mean", lambda scores, target: (scores.sum(1) - target).square().mean())
    own = with_loss(Classification(Network("mlp", (4,), 2), label_smoothing=0.1), "local:mean")
    model = own.model()
    torch.testing.assert_close(own.loss(model, (x, y)), (model(x).sum(1) - y).square().mean())
    assert own.label_smoothing == 0.1
    assert own == with_loss(Classification(Network("mlp", (4,), 2), label_smoothing=0.1), "local:mean")
    with pytest.raises(ConfigError, match="another of the losses is registered as 'local:mean'"):
        extensions.register("losses", "mean", print)


def test_parts_of_a_program_do_not_leave_it(tmp_path: Path) -> None:
    name = extensions.register("losses", "here", lambda scores, target: scores.mean())
    study = parse(text(tmp_path, network="cnn", loss=name, metric="auc").replace('own = ["acme-speckle"]', ""))
    with pytest.raises(NotElsewhere, match="local:here is known to the program that runs the study only"):
        method_runs(study, ["a", "b"])


def test_the_command_writes_the_skeleton(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands.new(tmp_path / "mine", plugin=True)
    assert (tmp_path / "mine" / "mine" / "networks.py").is_file()
    assert "pip install -e" in capsys.readouterr().out
