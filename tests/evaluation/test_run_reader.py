"""A run folder is read whole: every problem with its file and line, and what is missing from an unfinished one."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from polyclinic.evaluation.records.predictions import as_cases, by_patient, predictions_of, read_predictions, unit_of
from polyclinic.evaluation.records.record_schema import arm_names, rounded_up
from polyclinic.evaluation.records.run_reader import NotARun, Run, external_sites, read_info, read_run, training_sites
from tests.support.synthetic_run import SITES, write_run

TWO: Any = {k: SITES[k] for k in ("lyon", "osaka")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", sites=TWO, seeds=(0, 1), methods=("local", "fedavg"))


def add(folder: Path, *lines: dict[str, Any] | str) -> int:
    """Append records, and return the number of the last line."""
    file = folder / "records.jsonl"
    text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    file.write_text(file.read_text() + text)
    return len(file.read_text().splitlines())


def test_a_whole_run_lacks_nothing(folder: Path) -> None:
    run = read_run(folder)
    assert run.missing == ()
    assert run.unread == {}
    assert training_sites(run) == ["lyon"]
    assert external_sites(run) == ["osaka"]
    assert list(run.arms) == [(m, s) for s in (0, 1) for m in ("local", "fedavg")]
    assert list(run.arms["local", 0]) == ["lyon", "osaka"]
    assert list(run.validation["local", 0]) == ["lyon"]
    assert run.splits == {}
    assert run.linear == {}
    assert run.study == (folder / "study.toml").read_text()
    assert run.repeats == 2
    raw = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    for kind, read in (("round", run.rounds), ("scores", run.curves)):
        assert len(read) == sum(x["kind"] == kind for x in raw) > 0
    assert run.opened == {(m, s): 1 for m in ("local", "fedavg") for s in (0, 1)}
    files = {"study.toml", "run.json", "records.jsonl"} | {
        f"arms/{m}-seed{s}/predictions.safetensors" for m in ("local", "fedavg") for s in (0, 1)
    }
    assert set(run.digests) == files
    assert run.digests["run.json"] == hashlib.sha256((folder / "run.json").read_bytes()).hexdigest()
    (folder / "arms" / "local-seed0" / "model.safetensors").write_bytes(b"a model")
    added = set(read_run(folder).digests) - files
    assert added == {"arms/local-seed0/model.safetensors"}


def test_what_an_unfinished_run_lacks_is_listed(folder: Path) -> None:
    arm = folder / "arms" / "fedavg-seed1"
    (arm / "predictions.safetensors").unlink()
    (folder / "study.toml").unlink()
    (folder / "records.jsonl").rename(arm / "records.jsonl")
    add(arm, '{"kind":"rou')
    run = read_run(folder)
    assert ("fedavg", 1) not in run.arms
    assert len(run.rounds) > 0
    assert run.study == ""
    records, torn, predictions, study = run.missing
    assert records == "records.jsonl, what happened round by round, which its arms still hold"
    assert torn.startswith("the last line of records.jsonl (line ")
    assert predictions == "no test predictions yet of fedavg (seed 1)"
    assert study == "study.toml, the study as run"
    (arm / "records.jsonl").unlink()
    assert read_run(folder).missing[0] == "records.jsonl, what happened round by round"


def test_every_problem_is_told_with_its_file_and_line(folder: Path) -> None:
    file = folder / "records.jsonl"
    last = add(folder, "", "  \n", "[1]\n", '{"kind": "round", "method": "x", "seed": 0}\n', "{oops\n", '{"no": 1}\n')
    (folder / "arms" / "local-seed0" / "predictions.safetensors").write_bytes(b"x")
    with pytest.raises(NotARun) as caught:
        read_run(folder)
    first, second, third, fourth, fifth, count = str(caught.value).splitlines()
    assert first.startswith(f'{file}:{last - 3}: not a JSON record (a record is an object with a "kind")')
    assert second == f"{file}:{last - 2}: round: is missing"
    assert third.startswith(f"{file}:{last - 1}: not a JSON record (Expecting")
    assert fourth.startswith(f"{file}:{last}: not a JSON record (a record is an object")
    assert "local-seed0/predictions.safetensors: not a safetensors file" in fifth
    assert count == f"5 problems in {folder}; nothing was written."
    (folder / "run.json").write_text(json.dumps(json.loads((folder / "run.json").read_text()) | {"task": "x"}))
    with pytest.raises(NotARun, match=r"run\.json: task: must be one of .*\n1 problem in .*run\.json; nothing"):
        read_info(folder)


def test_kinds_of_records_of_other_versions_are_counted(folder: Path) -> None:
    add(folder, {"kind": "new", "x": 1}, {"kind": "new"}, {"kind": "newer"})
    assert read_run(folder).unread == {"new": 2, "newer": 1}


def test_a_folder_that_is_no_run_names_those_in_it(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(NotARun, match="no such folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(NotARun, match="It contains these run folders: run"):
        read_run(tmp_path)
    with pytest.raises(NotARun, match="`polyclinic run` writes run folders"):
        read_run(folder / "arms")


def test_refusals_openings_spending_and_standings_are_those_of_the_records(folder: Path) -> None:
    who = {"method": "fedavg", "seed": 0}
    lost = next(r for r in read_run(folder).rounds if r.method == "fedavg" and r.seed == 0 and r.round == 2)
    add(
        folder,
        lost.model_dump() | {"lost": {"lyon": "late"}},
        *({"kind": "quarantine", **who, "round": r, "site": s, "reason": "?"} for r, s in ((2, "lyon"), (3, "lyon"))),
        {"kind": "sealed", **who, "opened": 3},
        {"kind": "sealed", **who, "opened": 2},
        *(
            {"kind": "privacy", "method": "fedavg", "seed": seed, "site": site, "round": r, "epsilon": e}
            for seed, site, r, e in (
                (0, "osaka", 1, 9.0),
                (0, "osaka", 2, 1.0),
                (1, "osaka", 2, 2.0),
                (0, "lyon", 1, None),
                (1, "lyon", 1, 0.5),
            )
        ),
        {"kind": "trial", **who, "trial": 0, "values": {}, "score": None, "rounds": 1, "seconds": 1.0},
        {"kind": "chosen", **who, "values": {"lr": 1.0}, "by": "search"},
        {"kind": "standing", **who, "site": "lyon", "named": True, "hostile": False},
    )
    run = read_run(folder)
    assert [(q.round, q.site) for q in run.quarantined] == [(3, "lyon")]
    assert run.opened["fedavg", 0] == 3
    assert [(p.site, p.epsilon) for p in run.spent("fedavg")] == [("lyon", 0.5), ("osaka", 2.0)]
    assert run.spent("local") == ()
    assert (len(run.trials), len(run.chosen), len(run.standings)) == (1, 1, 1)


def test_folds_are_joined_if_all_are_there(folder: Path) -> None:
    info = json.loads((folder / "run.json").read_text()) | {"folds": 2, "folds_by": "patients"}
    (folder / "run.json").write_text(json.dumps(info))
    for method in ("local", "fedavg"):
        for seed in (0, 1):
            old = folder / "arms" / f"{method}-seed{seed}"
            leaves = load_file(old / "predictions.safetensors")
            for fold in (0, 1):
                new = folder / "arms" / f"{method}-seed{seed}-fold{fold}"
                new.mkdir()
                part = {k: v[fold::2] for k, v in leaves.items() if fold == 0 or not k.startswith("osaka")}
                save_file({k: np.ascontiguousarray(v) for k, v in part.items()}, new / "predictions.safetensors")
                save_file(leaves, new / "validation.safetensors")
    linear = folder / "linear"
    linear.mkdir()
    for fold in (0, 1):
        save_file(leaves, linear / f"linear-pooled-seed0-fold{fold}.safetensors")
    (folder / "arms" / "fedavg-seed1-fold1" / "predictions.safetensors").unlink()
    run = read_run(folder)
    assert run.repeats == 4
    assert list(run.arms) == [("local", 0), ("fedavg", 0), ("local", 1)]
    assert run.missing == ("no test predictions yet of fedavg (seed 1, fold 1)",)
    assert run.validation == {}
    assert set(run.splits) == {(m, s, f) for m in ("local", "fedavg") for s in (0, 1) for f in (0, 1)} - {
        ("fedavg", 1, 1)
    }
    whole = run.arms["local", 0]["lyon"]
    assert sorted(whole.patient) == list(range(63))
    assert len(run.arms["local", 0]["osaka"]) == 45
    assert whole.score is not None
    assert whole.score.shape == (63, 2)
    assert [name for *_, name in arm_names(run.info)][:3] == [
        "local-seed0-fold0",
        "fedavg-seed0-fold0",
        "local-seed0-fold1",
    ]
    assert list(run.linear) in ([("linear-pooled", 0)], [])
    assert isinstance(run, Run)


GOOD = {
    "a/patient": np.arange(4),
    "a/score": np.array([[0.2, 0.8]] * 4),
    "a/target": np.array([0, 1, 1, 0]),
}
SURVIVAL = GOOD | {
    "a/score": np.array([[0.9, 0.5]] * 4),
    "a/target": np.array([[1.0, 1], [2, 0], [3, 1], [4, 0]]),
    "a/times": np.array([[1.0, 2.0]] * 4),
}
FAULTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "missing": ("classification", {"a/target": None}, "a/target is missing"),
    "length": ("classification", {"a/target": np.zeros(3, int)}, "a/target has 3 rows, but a/patient has 4"),
    "patient": ("regression", {k: np.ones((4, 1)) for k in GOOD}, r"a/patient has shape \[4, 1\]"),
    "flat": ("classification", {"a/score": np.ones(4)}, r"a/score has shape \[4\]; it must be"),
    "nan": ("classification", {"a/score": np.array([[0.2, np.nan]] * 4)}, "contains 4 values that are not finite"),
    "column": ("classification", {"a/score": np.ones((4, 1))}, "one column; classification needs one for each class"),
    "class": ("classification", {"a/target": np.array([0, 1, 2, 0])}, "class numbers from 0 to 1"),
    "negative": ("classification", {"a/target": np.array([0, 1, -1, 0])}, "class numbers from 0 to 1"),
    "matrix": ("classification", {"a/target": np.zeros((4, 1), int)}, "class numbers from 0 to 1"),
    "high": ("classification", {"a/score": np.array([[0.2, 1.1]] * 4)}, "probabilities between 0 and 1"),
    "low": ("multilabel", {"a/score": -GOOD["a/score"], "a/target": np.zeros((4, 2))}, "probabilities between 0 and 1"),
    "labels": ("multilabel", {}, r"a/target has shape \[4\], but a/score has \[4, 2\]"),
    "metric": ("segmentation", {}, "a/auc is missing"),
    "times": ("survival", {"a/times": None}, "a/times is missing"),
    "zero": ("survival", {"a/target": np.array([[0.0, 1]] * 4)}, "a time above 0 and an event"),
    "event": ("survival", {"a/target": np.array([[1.0, 0.5]] * 4)}, "events other than 0 and 1"),
    "endless": ("survival", {"a/target": np.array([[np.inf, 1]] * 4)}, "a time above 0 and an event"),
    "columns": ("survival", {"a/target": np.ones((4, 3))}, "a time above 0 and an event"),
    "one time": ("survival", {"a/times": np.ones((4, 1))}, "the same two or more ascending times"),
    "descending": ("survival", {"a/times": np.array([[2.0, 1.0]] * 4)}, "the same two or more ascending times"),
    "own times": ("survival", {"a/times": np.array([[1.0, 2.0]] * 3 + [[1, 3]])}, "the same two or more ascending"),
    "from zero": ("survival", {"a/times": np.array([[0.0, 2.0]] * 4)}, "the same two or more ascending times"),
    "three": ("survival", {"a/score": np.full((4, 3), 0.5)}, "it must have one column, or one for each of the times"),
    "risk": ("survival", {"a/score": np.array([[0.5, 1.5]] * 4)}, "probabilities between 0 and 1"),
    "no risk": ("survival", {"a/score": np.full((4, 1), np.nan)}, "4 values that are not finite"),
    "stranger": ("classification", {"b/patient": np.arange(0)}, "site 'b' is not among the run's sites"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_predictions_that_cannot_be_evaluated_are_named(name: str, tmp_path: Path) -> None:
    task, changes, says = FAULTS[name]
    arrays = (SURVIVAL if task == "survival" else GOOD) | changes
    save_file({k: np.ascontiguousarray(v) for k, v in arrays.items() if v is not None}, tmp_path / "p")
    problems: list[str] = []
    read = read_predictions(tmp_path / "p", task, "auc", ["a"], problems)
    assert problems
    with pytest.raises(AssertionError, match=says):
        raise AssertionError(problems[0])
    assert ("a" in read) == (name == "stranger")


@pytest.mark.parametrize(
    ("task", "changes", "cases"),
    [
        ("classification", {}, 4),
        ("classification", {"a/silent": np.array([1, 0, 0, 1])}, 4),
        ("multilabel", {"a/target": np.zeros((4, 2))}, 4),
        ("regression", {"a/score": np.array([[7.0]] * 4), "a/target": np.ones((4, 1))}, 4),
        ("survival", {}, 4),
        ("survival", {"a/score": np.array([[-3.0]] * 4)}, 4),
        ("segmentation", {"a/auc": np.ones((4, 2))}, 4),
        ("classification", {k: v[:0] for k, v in GOOD.items()}, 0),
        ("classification", {"a/score": np.array([[-1e-7, 1 + 1e-7]] * 4)}, 4),
    ],
)
def test_good_predictions_are_read(task: str, changes: dict[str, Any], cases: int, tmp_path: Path) -> None:
    arrays = (SURVIVAL if task == "survival" else GOOD) | changes
    save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, tmp_path / "p")
    problems: list[str] = []
    read = read_predictions(tmp_path / "p", task, "auc", ["a"], problems)
    assert problems == []
    assert len(read.get("a", ())) == cases
    if cases:
        assert read["a"].silent == int(np.sum(changes.get("a/silent", 0)))
        assert len(as_cases(read["a"], regression=task in ("regression", "survival")).patient) == 4


def test_a_patients_images_are_one_case_whatever_their_order() -> None:
    rng = np.random.default_rng(0)
    patient = np.array([5, 2, 5, 9, 2, 5])
    score, target = rng.random((6, 2)), np.array([0, 0, 1, 0, 0, 0])
    one = by_patient(predictions_of({"patient": patient, "score": score, "target": target}, "classification"))
    assert one.patient.tolist() == [2, 5, 9]
    assert one.target.tolist() == [0, 1, 0], "positive if any image is"
    assert np.allclose(one.score, [score[patient == p].mean(0) for p in (2, 5, 9)])
    assert one.images == 6
    order = rng.permutation(6)
    again = by_patient(
        predictions_of({"patient": patient[order], "score": score[order], "target": target[order]}, "classification")
    )
    assert np.allclose(again.score, one.score)
    assert again.target.tolist() == one.target.tolist()
    amounts = predictions_of({"patient": patient, "score": score[:, :1], "target": score[:, 1:]}, "regression")
    assert np.allclose(by_patient(amounts, True).target[:, 0], [score[patient == p, 1].mean() for p in (2, 5, 9)])
    images = as_cases(predictions_of({"patient": patient, "score": score, "target": target}, "classification"), "image")
    assert images.patient.tolist() == [2, 2, 5, 5, 5, 9]
    assert images.target.tolist() == [0, 0, 0, 1, 0, 0]
    with pytest.raises(ValueError, match="unit 'site'"):
        as_cases(amounts, "site")


def test_each_image_is_a_case_if_no_rule_gives_a_patient_one_of_several_classes() -> None:
    def of(target: list[int], classes: int) -> Any:
        arrays = {"patient": np.array([0, 0, 1]), "score": np.ones((3, classes)), "target": np.array(target)}
        return predictions_of(arrays, "classification")

    assert unit_of([of([0, 0, 2], 3)], "classification", "patient") == "patient"
    assert unit_of([of([0, 0, 2], 3), of([0, 1, 2], 3)], "classification", "patient") == "image"
    assert unit_of([of([0, 1, 1], 2)], "classification", "patient") == "patient"
    assert unit_of([of([0, 1, 2], 3)], "multilabel", "patient") == "patient"
    assert unit_of([of([0, 0, 2], 3)], "classification", "image") == "image"


def test_values_of_masks_are_averaged_over_finite_ones_and_slices_are_one_volume() -> None:
    arrays = {
        "patient": np.array([0, 0, 1, 1]),
        "dice": np.array([0.5, np.nan, 0.2, 0.4]),
        "absent": np.array([0, 0, 1, 0]),
        "overlap": np.array([2.0, 0, 0, 1]),
        "predicted": np.array([3.0, 1, 0, 2]),
        "reference": np.array([3.0, 1, 0, 3]),
        "lesions": np.array([2.0, 0, 0, 1]),
        "lesions_found": np.array([1.0, 0, 0, 1]),
        "lesions_predicted": np.array([2.0, 0, 1, 1]),
        "lesions_false": np.array([1.0, 0, 1, 0]),
    }
    cases = by_patient(predictions_of(arrays, "segmentation"))
    assert np.isnan(cases.score).all()
    assert cases.score_for("dice")[:, 0].tolist() == pytest.approx([0.5, 0.4])
    assert cases.score_for("dice_empty")[:, 0].tolist() == pytest.approx([0.5, 0.7])
    assert cases.score_for("unknown") is cases.score
    assert cases.score_for("lesion_sensitivity")[:, 0].tolist() == pytest.approx([0.5, 1.0])
    assert cases.score_for("lesion_f1")[:, 0].tolist() == pytest.approx([0.5, 1.0])
    assert "overlap" not in cases.values
    volumes = by_patient(predictions_of(arrays | {"sliced": np.ones(4)}, "segmentation"))
    assert volumes.score_for("dice")[:, 0].tolist() == pytest.approx([2 * 2 / 8, 2 * 1 / 5])
    assert volumes.score_for("volume_error")[:, 0].tolist() == pytest.approx([0.0, 1 / 3])
    empty = {k: np.zeros(4) for k in ("dice", "overlap", "predicted", "reference", "sliced")} | {
        "patient": np.arange(4)
    }
    empty["predicted"] = np.array([0.0, 1, 0, 0])
    volumes = by_patient(predictions_of(empty, "segmentation"))
    assert volumes.score_for("dice_empty")[:, 0].tolist() == [1.0, 0.0, 1.0, 1.0]
    assert volumes.score_for("volume_error")[1, 0] == 1.0
    assert np.isnan(volumes.score_for("volume_error")[[0, 2, 3], 0]).all()


def test_epsilon_is_never_shown_smaller_than_it_is() -> None:
    assert [rounded_up(epsilon) for epsilon in (1.0, 1.001, 0.999, math.inf)] == ["1.00", "1.01", "1.00", "∞"]
