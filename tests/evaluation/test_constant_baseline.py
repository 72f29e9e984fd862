"""Deliberately broken runs: the first finding of the report is the right one."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from polyclinic.evaluation.baselines.constant_baseline import CONSTANT, with_constant
from polyclinic.evaluation.records.run_reader import read_run
from polyclinic.evaluation.run_evaluation import evaluate
from polyclinic.evaluation.split_faults import Leak
from polyclinic.report.context import ReportContext
from polyclinic.report.sections.highlights import findings
from polyclinic.report.sections.test_results import methods_section
from tests.support.known import known
from tests.support.synthetic_run import write_run

SITES = {"ada": ("training", 40, 0.4, 0.0, 0.0), "bo": ("training", 30, 0.4, 0.2, 0.1)}


def made(path: Path, sites: Any = SITES, **how: Any) -> Path:
    return write_run(path, sites=sites, seeds=(0,), methods=("local", "fedavg"), **how)


def change(path: Path, of: Any, label: str = "fedavg") -> None:
    """Change the test and validation scores of a method by ``of(score, target)``."""
    for file in (path / "arms" / f"{label}-seed0").glob("*.safetensors"):
        tensors = load_file(file)
        for key in [k for k in tensors if k.endswith("/score")]:
            tensors[key] = np.ascontiguousarray(of(tensors[key], tensors[key.replace("score", "target")]), np.float32)
        save_file(tensors, file)


def context(path: Path) -> ReportContext:
    run = read_run(path)
    return ReportContext(run, evaluate(run))


def first(path: Path) -> str:
    return findings(context(path))[0].text


def two(p: Any) -> Any:
    return np.stack([1 - p, p], 1)


def test_a_sound_run_has_no_fault(tmp_path: Path) -> None:
    page = context(made(tmp_path / "r"))
    assert page.result.faults == ()
    assert findings(page)[0].text.startswith("The sites are simulated")


def test_a_collapsed_model(tmp_path: Path) -> None:
    path = made(tmp_path / "r")
    change(path, lambda s, y: np.full_like(s, 0.5))
    assert first(path) == "FedAvg predicts the same for every patient of a site."


def test_outputs_that_are_not_finite(tmp_path: Path) -> None:
    path = made(tmp_path / "r")
    change(path, lambda s, y: np.full_like(s, 0.5))
    file = path / "arms" / "fedavg-seed0" / "predictions.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "ada/silent": np.ones(40, np.int64)}, file)
    assert first(path).startswith("FedAvg (seed 0) diverged: its outputs are not finite for 40 of 70 test examples")


def test_a_model_that_ranks_the_wrong_way(tmp_path: Path) -> None:
    path = made(tmp_path / "r")
    change(path, lambda s, y: s[:, ::-1])
    text = first(path)
    assert text.startswith("FedAvg has a worse AUC than a constant prediction: 0.")
    assert "against 0.500, mean over sites (worse)" in text


def test_a_class_that_is_never_predicted(tmp_path: Path) -> None:
    path = made(tmp_path / "r")
    change(path, lambda s, y: two(0.35 + 0.1 * s[:, 1]))
    assert first(path) == "FedAvg never predicts malignant."


def test_probabilities_worse_than_the_base_rate(tmp_path: Path) -> None:
    """The ranking is right, the probabilities are far too high."""
    path = made(tmp_path / "r")
    change(path, lambda s, y: two(np.where(s[:, 1] < np.quantile(s[:, 1], 0.1), 0.45, 0.9 + 0.1 * s[:, 1])))
    assert first(path).startswith("FedAvg has a worse Brier score than the base rate: 0.")


def test_four_patients(tmp_path: Path) -> None:
    path = made(tmp_path / "r", sites={"ada": ("training", 4, 0.5, 0.0, 0.0)})
    assert first(path) == "The training sites have 4 test patients in all: nothing was tested."


def test_a_test_set_opened_twice(tmp_path: Path) -> None:
    path = made(tmp_path / "r")
    text = (path / "records.jsonl").read_text()
    assert '"seed": 0, "opened": 1' in text
    (path / "records.jsonl").write_text(text.replace('"seed": 0, "opened": 1', '"seed": 0, "opened": 2'))
    assert first(path).startswith("The sealed test set was opened more than once: Local (seed 0): 2 times and FedAvg")


def test_a_site_without_a_value_is_missing_from_the_mean(tmp_path: Path) -> None:
    path = made(tmp_path / "r", sites={**SITES, "cy": ("training", 20, 0.0, 0.0, 0.0)})
    assert first(path) == "The mean over sites is without cy, where AUC is undefined: all 20 cases are of one class."


def identity(**places: list[tuple[int, int, int, int]]) -> dict[str, np.ndarray]:
    """Hashes of names, inputs and targets, and numbers of patients."""
    return {key.replace("_", "/"): np.array(rows, np.int64) for key, rows in places.items()}


def test_a_split_that_leaks(tmp_path: Path) -> None:
    path = made(tmp_path / "r")
    change(path, lambda s, y: np.full_like(s, 0.5))  # a leak comes before a collapsed model
    apart = identity(ada_train=[(1, 11, 0, 1)], ada_test=[(2, 12, 0, 2)], bo_test=[(3, 13, 0, 3)])
    save_file(apart, path / "data.safetensors")
    assert evaluate(read_run(path)).leak is None
    patient = identity(ada_train=[(1, 11, 0, 1)], ada_test=[(2, 12, 0, 2)], bo_test=[(3, 13, 0, 1)])
    save_file(patient, path / "data.safetensors")
    assert first(path) == (
        "Test data and training or validation data overlap at bo: 1 patient occurs in both. "
        "The results below are therefore too good by an unknown amount."
    )
    image = identity(ada_val=[(1, 11, 0, 1)], ada_test=[(2, 11, 0, 2), (4, 14, 0, 4)], bo_public=[(5, 14, 0, 5)])
    save_file(image, path / "data.safetensors")
    assert "overlap at ada: 1 of 2 test examples occur in both, byte for byte." in first(path)
    (path / "data.safetensors").write_bytes(b"damaged")
    assert evaluate(read_run(path)).leak is None


def test_one_input_among_hundreds_is_named_and_not_first(tmp_path: Path) -> None:
    path = made(tmp_path / "r")
    change(path, lambda s, y: np.full_like(s, 0.5))
    rows = [(i, 100 + i, 0, i) for i in range(200)]
    save_file(identity(ada_train=[(900, 100, 0, 900)], ada_test=rows), path / "data.safetensors")
    texts = [f.text for f in findings(context(path))]
    assert texts[0] == "FedAvg predicts the same for every patient of a site."
    assert any("1 of 200 test examples occur in both" in text for text in texts)


def test_validation_and_test_patients_with_the_same_numbers(tmp_path: Path) -> None:
    """A run folder without the identity of its data, whose numbers are not those of single files."""
    path = made(tmp_path / "r")
    for name, start in (("predictions", 100), ("validation", 95)):
        file = path / "arms" / "fedavg-seed0" / f"{name}.safetensors"
        tensors = load_file(file)
        save_file({k: v + start if k.endswith("patient") else v for k, v in tensors.items()}, file)
    assert first(path).startswith("Test data and training or validation data overlap at ada and bo: 25 patients occur")


def test_validation_and_test_that_disagree(tmp_path: Path) -> None:
    path = made(tmp_path / "r", sites={"ada": ("training", 80, 0.4, 0.0, 0.0), "bo": ("training", 60, 0.4, 0.2, 0.1)})
    assert evaluate(read_run(path)).disagreement is None
    file = path / "arms" / "fedavg-seed0" / "predictions.safetensors"
    tensors = load_file(file)
    for site in SITES:
        y = tensors[f"{site}/target"]
        p = 0.45 + 0.1 * y + 0.2 * np.random.default_rng(0).normal(size=len(y))
        tensors[f"{site}/score"] = np.ascontiguousarray(two(np.clip(p, 0, 1)), np.float32)
    save_file(tensors, file)
    text = first(path)
    assert text.startswith("Validation and test results of FedAvg disagree: AUC 0.9")
    assert "excludes 0. Check how the split was made" in text


def test_values_of_masks_that_are_not_numbers(tmp_path: Path) -> None:
    path = made(tmp_path / "r", task="segmentation")
    file = path / "arms" / "fedavg-seed0" / "predictions.safetensors"
    tensors = load_file(file)
    tensors["bo/dice"][:4] = np.nan
    save_file(tensors, file)
    assert first(path) == "FedAvg has no Dice for 4 of 70 test images (bo 4), which are left out."


def test_a_curve_that_still_rises(tmp_path: Path) -> None:
    path = made(tmp_path / "r", simulated=None)
    lines = [json.loads(x) for x in (path / "records.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "scores" and line["method"] == "fedavg":
            line["metrics"]["auc"] = 0.5 + 0.02 * line["round"]
    (path / "records.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert (
        first(path) == "The validation AUC of FedAvg was best in the last round, 12: training may have been too short."
    )


@pytest.mark.parametrize("select", ["last", "best"])
def test_a_baseline_that_was_better_before(select: str, tmp_path: Path) -> None:
    path = made(tmp_path / "r")
    lines = [json.loads(x) for x in (path / "records.jsonl").read_text().splitlines()]
    last = max(line["round"] for line in lines if line["kind"] == "scores")
    for line in lines:
        if line.get("method") == "local" and line["kind"] == "scores":
            line["metrics"]["auc"] = 0.9 - 0.03 * abs(line["round"] - 4)
        if line.get("method") == "local" and line["kind"] == "test":
            line["round"] = last if select == "last" else 4
    (path / "records.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    texts = [f.text for f in findings(context(path))]
    found = [text for text in texts if text.startswith("Local training was tested after it had lost")]
    lost = f"{0.03 * (last - 4):.2f}"
    assert bool(found) == (select == "last")
    assert all(f"had lost {lost}" in text and "since round 4; FedAvg exceeds it by 0." in text for text in found)


@pytest.mark.parametrize("task", ["classification", "multilabel", "segmentation"])
def test_the_constant_is_in_the_table_of_methods(tmp_path: Path, task: str) -> None:
    path = made(tmp_path / "r", task=task)
    if task == "multilabel":
        info = json.loads((path / "run.json").read_text())
        for site in info["sites"]:
            site["classes"]["train"] = [30, 20, 10]  # positives of three labels
        (path / "run.json").write_text(json.dumps(info))
    page = context(path)
    table = next(b for b in methods_section(page).blocks if getattr(b, "name", "") == "methods")
    assert [row["method"] for row in table.rows] == ["Local", "FedAvg", "Constant"]
    assert known(page.result.constant).macro.value == pytest.approx({"segmentation": 0.0}.get(task, 0.5))
    assert CONSTANT not in page.result.comparisons


def test_the_constant_is_the_training_sites_frequencies(tmp_path: Path) -> None:
    run = read_run(made(tmp_path / "r"))
    found = known(evaluate(run).constant)
    target = known(run.arms["fedavg", 0]["ada"].target)
    p = 48 / 120  # of the training patients that run.json states for ada
    assert found.sites["ada"]["brier"].value == pytest.approx(np.mean((target - p) ** 2))
    assert found.sites["ada"]["accuracy"].value == pytest.approx(np.mean(target == 0))


def test_the_constant_of_an_external_site_is_the_frequencies_of_all_training_sites(tmp_path: Path) -> None:
    run = read_run(made(tmp_path / "r", sites={**SITES, "cy": ("external", 50, 0.9, 0.0, 0.0)}))
    found = with_constant(run).arms[CONSTANT, 0]
    p = (48 + 36) / (120 + 90)  # of the training patients of ada and bo
    assert known(found["cy"].score) == pytest.approx(np.tile([1 - p, p], (50, 1)))


def test_the_constant_curve_stays_at_its_last_value(tmp_path: Path) -> None:
    """After the last validation patient was seen, Kaplan and Meier's curve is not determined."""
    run = read_run(made(tmp_path / "r", task="survival"))
    assert known(run.arms["fedavg", 0]["ada"].score).shape[1] > 2
    times = known(run.validation["fedavg", 0]["ada"].target)[0, 2:]
    seen = {
        key: {site: replace(p, target=np.minimum(known(p.target), [times[1], 1, *times])) for site, p in sites.items()}
        for key, sites in run.validation.items()
    }
    curve = known(with_constant(replace(run, validation=seen)).arms[CONSTANT, 0]["ada"].score)[0]
    assert 0 < curve[1] < 1
    assert (curve[2:] == curve[1]).all()


def test_a_metric_that_no_case_has_is_undefined_and_not_zero(tmp_path: Path) -> None:
    """A distance of 0 would be the best; the constant, an empty mask, has no distance at all."""
    path = made(tmp_path / "r", task="segmentation")
    info = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps({**info, "metric": "hd95"}))
    evaluation = evaluate(read_run(path))
    assert not [fault for fault in evaluation.faults if "constant prediction" in fault.text]
    for file in path.glob("arms/*/predictions.safetensors"):
        save_file({k: v for k, v in load_file(file).items() if not k.endswith(("/nsd", "/volume_error"))}, file)
    for method in evaluate(read_run(path)).methods:
        for values in method.sites.values():
            assert known(values["hd95"].value) > 0
            assert values["nsd"].value is None
            assert values["volume_error"].value is None


def test_nearly_equal_test_images_are_named_if_the_study_searched_for_them(tmp_path: Path) -> None:
    path = made(tmp_path / "r")
    info = json.loads((path / "run.json").read_text())
    info["data"]["near_duplicates"] = {"bo": 3}
    (path / "run.json").write_text(json.dumps(info))
    assert first(path) == (
        "Test data and training or validation data overlap at bo: 3 test examples nearly equal a training or "
        "validation example. The results below are therefore too good by an unknown amount."
    )
    assert evaluate(read_run(path)).leak == Leak(0, 0, 70, ("bo",), 3)


@pytest.mark.parametrize(
    ("inputs", "outputs", "parameters", "words"),
    [
        ([90], 2, 100, "The network has 100 parameters, fewer than the 182 of a linear model of its 90 inputs"),
        ([90], 2, 182, ""),  # a linear model is no small network
        ([1, 64, 64], 2, 632, "The network has 632 parameters, which is few for images of 64 × 64 pixels"),
        ([1, 64, 64], 2, 1200, ""),
        ([1, 8, 8], 2, 632, ""),  # so are these images
        ([], 2, 10, ""),  # a run of another program does not say what its inputs are
    ],
)
def test_a_network_much_too_small(tmp_path: Path, inputs: list[int], outputs: int, parameters: int, words: str) -> None:
    path = made(tmp_path / "r")
    info = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps(info | {"inputs": inputs, "outputs": outputs, "parameters": parameters}))
    found = [f.text for f in findings(context(path)) if f.text.startswith("The network has")]
    assert [text.partition(":")[0] for text in found] == ([words] if words else [])
