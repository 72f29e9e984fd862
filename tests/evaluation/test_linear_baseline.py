"""The linear baselines in an evaluation and its report: results, and methods that are not above them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from polyclinic.evaluation.records.run_reader import read_run
from polyclinic.evaluation.run_evaluation import Evaluation, evaluate
from polyclinic.report.report_builder import build_report
from tests.support.synthetic_run import write_run

SITES = {"ada": ("training", 120, 0.5, 0.0, 0.0), "bo": ("training", 90, 0.5, 0.0, 0.0)}
LABELS = ("linear-local", "linear-pooled")


def made(path: Path, quality: float, patients: int | None = None, methods: Any = ("local", "fedavg")) -> Path:
    """A run whose linear baselines have the scores of FedAvg, moved towards the truth by ``quality``.

    Only for the first ``patients`` of each site, if given.
    """
    write_run(path, sites=SITES, seeds=(0,), methods=methods)
    for label in LABELS:
        arrays = load_file(path / "arms" / "fedavg-seed0" / "predictions.safetensors")
        for site in SITES:
            p = (1 - abs(quality)) * arrays[f"{site}/score"][:, 1]
            truth = arrays[f"{site}/target"] if quality > 0 else 1 - arrays[f"{site}/target"]
            p = p + abs(quality) * truth
            p[patients:] = arrays[f"{site}/score"][patients:, 1] if patients is not None else p[patients:]
            arrays[f"{site}/score"] = np.stack([1 - p, p], 1).astype(arrays[f"{site}/score"].dtype)
        (path / "linear").mkdir(exist_ok=True)
        save_file(arrays, path / "linear" / f"{label}-seed0.safetensors")
    return path


def texts(result: Evaluation, label: str) -> list[tuple[int, str]]:
    return [(f.weight, f.text) for f in result.faults if f.method == label and "linear model" in f.text]


def test_a_method_below_both_is_flagged_first(tmp_path: Path) -> None:
    path = made(tmp_path / "r", 0.9)
    ((weight, text),) = texts(evaluate(read_run(path)), "fedavg")
    assert weight == 4
    assert text.startswith("has a worse AUC than a regularized linear model, mean over sites: 0.")
    assert "against 1.000 of one fitted at each site alone (worse); 0." in text
    assert text.endswith("against 1.000 of one fitted to all sites' data in one place (worse)")
    findings = json.loads((build_report(path).parent / "report.json").read_text())["findings"]
    assert "FedAvg has a worse AUC than a regularized linear model" in json.dumps(findings[:2])


def test_local_training_is_compared_with_the_model_of_the_site(tmp_path: Path) -> None:
    ((_, text),) = texts(evaluate(read_run(made(tmp_path / "r", 0.9))), "local")
    assert "each site alone" in text
    assert "one place" not in text


def test_training_in_one_place_is_compared_with_both_models(tmp_path: Path) -> None:
    """It is a baseline, too, but has the patients of all sites."""
    ((_, text),) = texts(evaluate(read_run(made(tmp_path / "r", 0.9, methods=("pooled", "fedavg")))), "pooled")
    assert "each site alone" in text
    assert "one place" in text


def test_a_small_difference_weighs_less(tmp_path: Path) -> None:
    ((weight, text),) = texts(evaluate(read_run(made(tmp_path / "r", 0.9, patients=4))), "fedavg")
    assert weight == 2
    assert text.endswith("(no difference shown)")


def test_a_method_above_or_equal_is_not_flagged(tmp_path: Path) -> None:
    assert texts(evaluate(read_run(made(tmp_path / "above", -0.9))), "fedavg") == []
    assert texts(evaluate(read_run(made(tmp_path / "equal", 0.0))), "fedavg") == []


def test_results_stand_in_the_report_and_in_no_comparison(tmp_path: Path) -> None:
    path = made(tmp_path / "r", 0.9)
    result = evaluate(read_run(path))
    assert [m.label for m in result.linear] == list(LABELS)
    assert all(m.macro.value == 1.0 for m in result.linear)
    assert set(result.comparisons) == {"local"}
    assert [m.label for m in result.methods] == ["local", "fedavg"]
    page = build_report(path).read_text()
    assert "Linear, local" in page
    assert "Linear, pooled" in page
    assert "fitted to convergence" in page


@pytest.mark.parametrize(
    ("inputs", "says"),
    [([1, 32, 32], "A linear baseline does not apply to images."), ([13], "This run has no linear baseline, which")],
)
def test_a_run_without_says_why(inputs: list[int], says: str, tmp_path: Path) -> None:
    write_run(tmp_path / "r", sites=SITES, seeds=(0,))
    file = tmp_path / "r" / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"inputs": inputs}))
    assert says in build_report(tmp_path / "r").read_text()
