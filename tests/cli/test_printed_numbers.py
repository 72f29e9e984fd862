"""Console, records, tracking tools and report show one number for one thing."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from polyclinic.cli.panel_table import number
from polyclinic.cli.progress import Display
from polyclinic.evaluation.costs import learning_curve
from polyclinic.evaluation.records.run_reader import read_run
from polyclinic.evaluation.run_evaluation import Options, evaluate
from polyclinic.report import formatting
from polyclinic.studies.config.study_config import parse
from polyclinic.studies.export.tracking import values
from polyclinic.studies.run.scheduler import run
from tests.support.small_runs import npz

STUDY = """
name = "numbers"
rounds = 2
[data]
path = "{path}"
kind = "npz"
patient = "patient"
sites = "site"
external = ["d"]
min_patients = 3
regression = {regression}
[task]
kind = "{kind}"
network = "mlp"
options = {{ width = 4, depth = 1 }}
[training]
lr = 0.01
[engine]
kind = "in-process"
[[methods]]
name = "fedavg"
"""


@pytest.fixture(params=["classification", "regression"], scope="module")
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run in which patients have different numbers of images, with an external site, and what it printed."""
    folder = tmp_path_factory.mktemp("numbers")
    rows, rng = np.arange(160), np.random.default_rng(1)
    patient = np.array([f"p{i % 4}-{(i // 4) ** 2 // 64:02}" for i in rows])
    labels = rng.integers(0, 2, 160) if request.param == "classification" else rng.normal(50, 20, 160)
    path = npz(folder, patient=patient, labels=labels)
    text = STUDY.format(path=path, kind=request.param, regression=str(request.param == "regression").lower())
    study, out = parse(text), io.StringIO()
    with Display(Console(file=out, width=200), study) as display:
        for event in run(study, text, folder / "run"):
            display.show(event)
    return folder / "run", out.getvalue()


def test_the_console_prints_the_numbers_of_the_report(done: tuple[Path, str]) -> None:
    path, printed = done
    found, result = read_run(path), evaluate(read_run(path), Options()).of("fedavg")
    assert found.info.sites[-1].role == "external"
    assert any(len(p) > len(set(p.patient)) for p in found.arms["fedavg", 0].values())
    metric = found.info.metric
    assert result.worst is not None
    assert result.macro.value is not None
    said = f"test {metric} {number(result.macro.value)}  worst site {result.worst[0]} {number(result.worst[1])}"
    assert said in printed
    curve = learning_curve(found, "fedavg", metric)
    assert f"round 2/2  {metric} {number(curve.values[-1])}  worst site" in printed


def test_the_records_hold_the_numbers_of_the_report(done: tuple[Path, str]) -> None:
    path, _ = done
    run_, result = read_run(path), evaluate(read_run(path), Options()).of("fedavg")
    tests = {line.site: line.metrics for line in run_.lines if line.kind == "test"}
    assert tests.keys() == result.sites.keys()
    tracked = {name: value for _, name, value in values(run_, "fedavg", 0, 0)}
    for site, estimates in result.sites.items():
        known = {name: e.value for name, e in estimates.items() if e.value is not None}
        assert {k: v for k, v in tests[site].items() if k != "loss"} == pytest.approx(known, abs=1e-12)
        assert tracked[f"test/{run_.info.metric}/{site}"] == known[run_.info.metric]


def test_a_resumed_run_prints_the_same(done: tuple[Path, str]) -> None:
    path, printed = done
    text, out = (path / "study.toml").read_text(), io.StringIO()
    with Display(Console(file=out, width=200), parse(text)) as display:
        for event in run(parse(text), text, path, resume=True):
            display.show(event)
    (first,) = [line for line in printed.splitlines() if " test " in line]
    (again,) = [line for line in out.getvalue().splitlines() if " test " in line]
    assert first == again
    assert json.loads((path / "run.json").read_text())["sites"][3]["name"] == "d"


def test_rounding_errors_do_not_change_what_is_printed() -> None:
    for value in (0.6425, 0.6425000000000001, 0.64249999999999996):
        assert number(value) == formatting.number(value) == number(0.6425)
