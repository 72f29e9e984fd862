"""A study of survival from its file to its report, on simulated patients."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from polyclinic.data.config import DataSpec
from polyclinic.data.federation import federate
from polyclinic.data.simulation.phantoms import SurvivalPhantom
from polyclinic.engines.plan import Plan
from polyclinic.engines.site_description import describe
from polyclinic.errors import DataError
from polyclinic.evaluation.baselines.constant_baseline import CONSTANT, with_constant
from polyclinic.evaluation.records.predictions import Cases
from polyclinic.evaluation.records.run_reader import NotARun, read_run
from polyclinic.evaluation.run_evaluation import Options, evaluate
from polyclinic.evaluation.survival_metrics import times_of
from polyclinic.report.context import ReportContext
from polyclinic.report.page_blocks import tables_of
from polyclinic.report.sections.survival import _observed, survival_section
from polyclinic.statistics.survival import survival_curve
from polyclinic.studies.config.diagnostics import BadStudy
from polyclinic.studies.config.study_config import parse
from polyclinic.studies.run.deployment import method_runs
from polyclinic.studies.run.scheduler import run

TEXT = """
name = "s"
rounds = 2
[data]
kind = "survival-phantom"
subjects = [60, 40, 40]
features = 4
external = ["hospital-3"]
split = [0.4, 0.3, 0.3]
[task]
kind = "survival"
network = "mlp"
options = { width = 4 }
cuts = [6, 18, 30]
[training]
batch_size = 16
lr = 0.5
[engine]
kind = "in-process"
[[methods]]
name = "local"
[[methods]]
name = "fedavg"
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("survival") / "run"
    for _ in run(parse(TEXT), TEXT, folder):
        pass
    return folder


def test_predictions_hold_time_event_and_the_times_of_scores(finished: Path) -> None:
    found = load_file(finished / "arms" / "fedavg-seed0" / "predictions.safetensors")
    assert found["hospital-1/score"].shape == (18, 3)
    assert found["hospital-1/target"].shape == (18, 2)
    assert (found["hospital-1/times"] == [6, 18, 30]).all()
    assert (np.diff(found["hospital-1/score"], axis=1) <= 0).all()
    outcome = read_run(finished).info
    assert (outcome.task, outcome.metric, outcome.higher_is_better, outcome.classes) == (
        "survival",
        "c_index",
        True,
        (),
    )
    assert [sum(s.classes["test"]) for s in outcome.sites] == [18, 12, 40]


def test_the_constant_is_the_curve_of_validation_patients(finished: Path) -> None:
    result = evaluate(read_run(finished), Options())
    assert result.constant is not None
    assert result.constant.label == CONSTANT
    assert result.constant.macro.value == 0.5
    known = read_run(finished).validation["fedavg", 0]["hospital-1"].target
    assert known is not None
    want = survival_curve(known[:, 0], known[:, 1], np.ones((1, len(known))), times_of(known))[0]
    got = with_constant(read_run(finished)).arms[CONSTANT, 0]["hospital-1"].score
    assert got is not None
    np.testing.assert_allclose(got[0], want)


def section(folder: Path, options: Options = Options()) -> tuple[str, dict[str, str]]:
    """The texts of the section on survival, and its tables as CSV."""
    result = read_run(folder)
    page = ReportContext(result, evaluate(result, options))
    assert page.first is not None
    found = survival_section(page, page.first)
    assert found is not None
    texts = [str(getattr(block, "text", "")) + str(getattr(block, "note", "")) for block in found.blocks]
    return " ".join(texts), {table.name: table.csv() for table in tables_of(found.blocks)}


def test_the_report_shows_curves_of_no_small_group(finished: Path) -> None:
    """Hospital-2 has 12 test patients, too few for a minimum of 15."""
    text, tables = section(finished)
    assert "Not shown" not in text
    assert "hospital-2" in tables["survival_sites"]
    text, tables = section(finished, Options(min_cell=15))
    assert "Not shown, with fewer than 15 test patients: hospital-2." in text
    assert "hospital-1" in tables["survival_sites"]
    assert "hospital-2" not in tables["survival_sites"]


def test_a_curve_ends_where_fewer_than_ten_patients_are_observed() -> None:
    months = np.r_[np.arange(1.0, 13), 40, 41]
    target = np.column_stack([months, np.ones(14), np.tile([2.0, 6, 30], (14, 1))])
    cases = Cases(np.arange(14), np.zeros((14, 3)), target, {}, 14)
    value, low, _ = _observed([cases], np.array([2.0, 6, 30]), 10, 0.95)
    assert np.isfinite(value).tolist() == [True, False, False]  # 13, 9 and 2 patients are observed just before
    assert np.isfinite(low).tolist() == [True, False, False]


def test_a_model_of_order_has_no_probabilities(tmp_path: Path) -> None:
    text = TEXT.replace("cuts =", 'hazards = "proportional"\ncuts =').replace('[[methods]]\nname = "local"\n', "")
    for _ in run(parse(text), text, tmp_path / "run"):
        pass
    assert "This model ranks patients and predicts no probabilities" in section(tmp_path / "run")[0]
    found = evaluate(read_run(tmp_path / "run")).of("fedavg").sites["hospital-1"]
    assert found["c_index"].value is not None
    assert found["ibs"].value is None


@pytest.mark.parametrize(
    ("key", "change", "words"),
    [
        ("times", lambda a: a[:, ::-1].copy(), "must be the same two or more ascending times"),
        ("target", lambda a: a * np.array([-1, 1]), "must be a time above 0 and an event"),
        ("target", lambda a: a + np.array([0, 2]), "has events other than 0 and 1"),
        ("score", lambda a: a[:, :2].copy(), "must have one column, or one for each of the times"),
        ("score", lambda a: a + 1.5, "must contain probabilities between 0 and 1"),
        ("score", lambda a: a * np.nan, "values that are not finite"),
    ],
)
def test_a_strange_file_is_no_run(
    finished: Path, tmp_path: Path, key: str, change: Callable[[Any], Any], words: str
) -> None:
    arm = tmp_path / "run" / "arms" / "fedavg-seed0"
    arm.mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_bytes((finished / "run.json").read_bytes())
    leaves = load_file(finished / "arms" / "fedavg-seed0" / "predictions.safetensors")
    leaves[f"hospital-1/{key}"] = change(leaves[f"hospital-1/{key}"]).astype(np.float32)
    save_file(leaves, arm / "predictions.safetensors")
    with pytest.raises(NotARun, match=words):
        read_run(tmp_path / "run")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("cuts = [6, 18, 30]\n", "", "survival needs cuts"),
        ("cuts = [6, 18, 30]", "cuts = [18, 6]", "must ascend"),
        ("cuts = [6, 18, 30]", "cuts = [6]", "at least 2"),
        ("cuts = [6, 18, 30]", "cuts = [6, 18]\ncenter = 3.0", "center is not for survival"),
        ('kind = "survival"\n', "", "cuts is not for classification"),
        ('"fedavg"', '"fedirm"', "fedirm is for classification, not for survival"),
    ],
)
def test_bad_studies_are_refused_with_their_key(old: str, new: str, words: str) -> None:
    with pytest.raises(BadStudy, match=words):
        parse(TEXT.replace(old, new))


def test_other_studies_keep_their_hash() -> None:
    """The keys of survival enter the hash only if they are set."""
    text = TEXT.replace("cuts = [6, 18, 30]\n", "").replace('kind = "survival"\n', "")
    text = text.replace("survival-phantom", "roi-phantom").replace('external = ["hospital-3"]\n', "")
    text = text.replace("subjects = [60, 40, 40]\nfeatures = 4\n", "")
    assert parse(text).hash == "fdc0a632d0542cb82d2e20055c3a35e144eb600fcd261f342c2b33b2174ff8a9"


def test_private_training_of_hazards_and_not_of_ranks() -> None:
    private = '[training]\nprivate = { noise = 1.0, unit = "patient" }'
    text = TEXT.replace("[training]", private).replace('[[methods]]\nname = "local"\n', "").replace("0.5\n", "0.1\n")
    cox = text.replace("cuts =", 'hazards = "proportional"\ncuts =')
    with pytest.raises(BadStudy, match='set hazards = "discrete"'):
        for _ in run(parse(cox), cox, Path("never")):
            pass


def test_hospitals_that_run_it_are_asked_for_the_studys_outputs() -> None:
    """The network's outputs follow from the cuts, not from the sites' data; counts of events below min_cell are hidden."""
    (arm, *_), _ = method_runs(parse(TEXT.replace('[[methods]]\nname = "local"\n', "")), ["hospital-1", "hospital-3"])
    assert arm["plan"]["outputs"] == 3
    assert "inputs" not in arm["plan"]
    assert Plan.from_json(json.dumps({"inputs": [4], **arm["plan"]})).build_task().network.outputs == 3
    data = federate(DataSpec(kind="survival-phantom", subjects=[60, 12]), 0)  # type: ignore[call-arg]
    found = describe(data.sites["hospital-2"], "survival", min_cell=5)
    assert found["roles"]["test"]["classes"] == [None, None]
    assert describe(data.sites["hospital-1"], "survival", min_cell=5)["roles"]["train"]["classes"] == [12, 24]


def test_training_without_an_event_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, site = SurvivalPhantom((60, 40, 40), 4)._drawn
    monkeypatch.setattr(SurvivalPhantom, "_drawn", (x, y * np.array([1, 0], np.float32), site))
    with pytest.raises(DataError, match="contain no event, so survival cannot be learned"):
        for _ in run(parse(TEXT), TEXT, Path("never")):
            pass
