"""A run is the same to the bit whatever interrupts it, and its folder says what happened."""

import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polyclinic.core.audit_log import verify
from polyclinic.data.examples import DataError
from polyclinic.privacy.ledger import Ledger
from polyclinic.studies.config.diagnostics import BadStudy
from polyclinic.studies.config.study_config import parse
from polyclinic.studies.run.run_directory import RunExists, read_tensors
from tests.support.small_runs import facts, go, npz, opened_once, same, stopped_and_resumed, study, tensors


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("run")
    npz(folder)
    go(study(folder), folder / "in-process")
    return folder


def test_a_run_leaves_everything_a_result_depends_on(done: Path) -> None:
    path = done / "in-process"
    info = json.loads((path / "run.json").read_text())
    assert [m["label"] for m in info["methods"]] == ["local", "pooled", "cross", "fedbn", "scaffold", "private"]
    assert {s["name"]: s["role"] for s in info["sites"]} == {
        "a": "training",
        "b": "training",
        "c": "training",
        "d": "external",
    }
    assert parse((path / "study.toml").read_text()).hash == info["hash"]
    lines = facts(path)
    arms = {(m["label"], s) for m in info["methods"] for s in (0, 1)}
    for kind, per_arm in (("round", 4), ("sealed", 1)):
        assert sum(line["kind"] == kind for line in lines) == per_arm * len(arms)
    assert {line["opened"] for line in lines if line["kind"] == "sealed"} == {1}
    tested = {(line["method"], line["site"]) for line in lines if line["kind"] == "test"}
    assert {site for method, site in tested if method == "scaffold"} == {"a", "b", "c", "d"}
    assert {site for method, site in tested if method == "local"} == {"a", "b", "c"}
    up = {line["method"]: sum(line["bytes_up"].values()) for line in lines if line["kind"] == "round"}
    assert up["local"] == 0
    assert up["scaffold"] > up["private"] > up["fedbn"] > 0
    events = [e["event"] for e in verify(path / "journal.jsonl")]
    assert events[0] == "begun"
    assert events[-1] == "finished"
    assert events.count("test opened") == len(arms)


def test_validation_chooses_and_test_is_of_the_chosen_round(done: Path) -> None:
    lines = facts(done / "in-process")
    for method in ("fedbn", "pooled", "local"):
        scores: dict[int, list[float]] = {}
        for line in lines:
            if (line["kind"], line["method"], line["seed"]) == ("scores", method, 0) and line["site"] != "d":
                scores.setdefault(line["round"], []).append(line["metrics"]["auc"])
        best = max(scores, key=lambda r: (np.mean(scores[r]), -r))
        tested = {
            line["round"] for line in lines if (line["kind"], line["method"], line["seed"]) == ("test", method, 0)
        }
        assert tested == {best}


def test_worker_processes_give_the_same_run(done: Path) -> None:
    go(study(done, "workers"), done / "workers")
    assert same(done / "in-process", done / "workers")


@pytest.mark.slow
def test_a_run_stopped_anywhere_goes_on_to_the_same_bits(done: Path, tmp_path: Path) -> None:
    text = study(done)
    for stop_after in (1, 2, 7, 23, 40):
        path = tmp_path / f"stopped-{stop_after}"
        stopped_and_resumed(text, path, stop_after)
        assert same(done / "in-process", path), stop_after


@pytest.mark.parametrize("engine", ["in-process", pytest.param("workers", marks=pytest.mark.slow)])
def test_a_run_killed_anywhere_goes_on_to_the_same_bits(engine: str, done: Path, tmp_path: Path) -> None:
    text, path = study(done, engine), tmp_path / "killed"
    finished: int | None = 1
    for attempt in range(40):
        child = multiprocessing.get_context("fork").Process(
            target=lambda: go(text, path, resume=(path / "run.json").exists())
        )
        child.start()
        if attempt < 3:  # let it begin, then kill it at a moment that is different every time
            deadline = time.monotonic() + 30
            seen = _length(path)
            while child.is_alive() and _length(path) <= seen + 500 and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.03 * attempt)
            child.kill()
        child.join(timeout=120)
        if (finished := child.exitcode) == 0:
            break
    assert finished == 0
    x, y = tensors(done / "in-process"), tensors(path)
    assert x.keys() == y.keys()
    assert all(torch.equal(x[k], y[k]) for k in x)
    assert opened_once(done / "in-process") == opened_once(path)
    sealed = {(f["method"], f["seed"]): f["opened"] for f in facts(path) if f["kind"] == "sealed"}
    events = [e for e in verify(path / "journal.jsonl") if e["event"] == "test opened"]
    assert all(sum((e["method"], e["seed"]) == arm for e in events) == times for arm, times in sealed.items())
    assert sum(e["event"] == "resumed" for e in verify(path / "journal.jsonl")) >= 1


def _length(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("records.jsonl"))


def test_a_finished_run_is_not_run_again(done: Path) -> None:
    before = (done / "in-process" / "records.jsonl").read_bytes()
    with pytest.raises(RunExists, match="--resume continues it"):
        go(study(done), done / "in-process")
    events = go(study(done), done / "in-process", resume=True)
    assert [e.what for e in events] == ["data"] + ["tested"] * 12
    assert events[-1].scores
    assert (done / "in-process" / "records.jsonl").read_bytes() == before


def test_a_cohort_is_asked_and_no_more(done: Path, tmp_path: Path) -> None:
    text = (
        study(done).replace("rounds = 4", "rounds = 6\nsites_per_round = 2").split("[[methods]]")[0]
        + '[[methods]]\nname = "fedavg"\n'
    )
    go(text, tmp_path / "cohort")
    asked = [line["asked"] for line in facts(tmp_path / "cohort") if line["kind"] == "round"]
    assert all(len(names) == 2 and "d" not in names for names in asked)
    assert len({tuple(names) for names in asked}) > 1


BAD: dict[str, tuple[dict[str, Any] | None, str]] = {
    "nan": ({"images": np.full((160, 8, 8), np.nan, np.float32)}, "NaN"),
    "one class": ({"labels": np.zeros(160, int)}, "class"),
    "no such file": (None, "small.npz"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_is_told_before_anything_runs(name: str, tmp_path: Path) -> None:
    changes, words = BAD[name]
    if changes is not None:
        npz(tmp_path, **changes)
    with pytest.raises(DataError, match=words):
        go(study(tmp_path), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_site_that_fails_is_left_out_and_named(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from polyclinic.methods.optimization.fedavg import FedAvg

    real = FedAvg.site_update

    def failing(self: Any, request: Any, memory: Any, site: Any) -> Any:
        if site.name == "b" and request.round == 1:
            raise MemoryError("out of memory")
        return real(self, request, memory, site)

    monkeypatch.setattr(FedAvg, "site_update", failing)
    text = study(done).split("[[methods]]")[0] + '[[methods]]\nname = "fedavg"\n'
    events = go(text, tmp_path / "failing")
    lost = next(e.lost for e in events if e.what == "round" and e.seed == 0 and e.round == 2)
    assert lost["b"].startswith("failed: Mem")
    quarantined = [line for line in facts(tmp_path / "failing") if line["kind"] == "quarantine"]
    assert {(line["site"], line["round"]) for line in quarantined} == {("b", 2)}


def test_a_wrong_combination_is_refused_before_anything_runs(done: Path, tmp_path: Path) -> None:
    text = study(done).replace("[training]", '[training]\noptimizer = "adam"')
    with pytest.raises(ValueError, match="plain SGD"):
        go(text, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert os.listdir(tmp_path) == []


PRIVATE = """
[privacy]
epsilon = {epsilon}
delta = 1e-3
unit = "record"

[[methods]]
name = "fedavg"
training = {{ private = {{ noise = 1.0, unit = "record" }} }}

[[methods]]
name = "fedavg"
label = "open"
"""


def test_privacy_is_paid_for_and_written_down(done: Path, tmp_path: Path) -> None:
    text = (
        study(done)
        .split("[[methods]]")[0]
        .replace("seeds = [0, 1]", "seeds = [0]")
        .replace("0.2 }", '0.0, norm = "group" }')
    )
    events = go(text + PRIVATE.format(epsilon=100.0), tmp_path / "private")
    spent = [line for line in facts(tmp_path / "private") if line["kind"] == "privacy"]
    assert {line["method"] for line in spent} == {"fedavg"}
    assert {line["site"] for line in spent} == {"a", "b", "c"}
    per_round = [line["epsilon"] for line in spent if line["site"] == "a"]
    assert len(per_round) == 4
    assert 0 < per_round[0] < per_round[1] < per_round[2]
    assert spent[-1]["by"] == "pld"
    whom = {(line["unit"], line["adjacency"], tuple(line["assumes"])) for line in spent}
    assert whom == {
        (
            "record",
            "add or remove one record",
            ("the number of records counts as public", "who is in a Poisson sample stays secret"),
        )
    }
    ledgers = {path.stem: Ledger(path) for path in (tmp_path / "private").glob("arms/fedavg-*/ledgers/*.jsonl")}
    assert all(ledgers[line["site"]].knows(line["ledger"]) for line in spent), (
        "a copy of the head, kept in another place"
    )
    assert len({line["ledger"] for line in spent}) == len(spent)
    for name in ("predictions", "validation"):  # which stay in the folder of the run, and cost nothing
        leaves = read_tensors(tmp_path / "private" / "arms" / "fedavg-seed0" / f"{name}.safetensors")
        assert {"a", "b", "c"} <= {key.partition("/")[0] for key in leaves}
    told = [e.epsilon for e in events if e.what == "round" and e.label == "fedavg"]
    assert told == [max(line["epsilon"] for line in spent if line["round"] == n) for n in (1, 2, 3, 4)]
    said = {e.protects for e in events if e.what == "round" and e.label == "fedavg"}
    assert said == {"per record (add or remove one record)"}
    assert all(e.epsilon is None and e.protects == "" for e in events if e.label == "open")
    entries = [e for e in verify(tmp_path / "private" / "journal.jsonl") if e["event"] == "round"]
    journal = [e["epsilon"]["a"] for e in entries if e["method"] == "fedavg"]
    assert journal == per_round
    assert {e.get("protects") for e in entries if e["method"] == "fedavg"} == said
    assert all("epsilon" not in e for e in entries if e["method"] == "open")


def test_a_used_up_budget_ends_training_and_the_model_of_then_is_tested(done: Path, tmp_path: Path) -> None:
    text = (
        study(done)
        .split("[[methods]]")[0]
        .replace("seeds = [0, 1]", "seeds = [0]")
        .replace("0.2 }", '0.0, norm = "group" }')
    )
    text = text.replace("rounds = 4", "rounds = 12")
    go(text + PRIVATE.format(epsilon=4.0), tmp_path / "private")
    lines = [line for line in facts(tmp_path / "private") if line["method"] == "fedavg"]
    rounds = max(line["round"] for line in lines if line["kind"] == "round")
    assert 1 <= rounds < 12
    assert all(line["epsilon"] <= 4.0 for line in lines if line["kind"] == "privacy")
    assert any(line["kind"] == "test" for line in lines)
    assert "budget used up" in [e["event"] for e in verify(tmp_path / "private" / "journal.jsonl")]


def test_methods_that_cannot_be_built_are_all_told_before_anything_runs(tmp_path: Path) -> None:
    npz(tmp_path)
    text = study(tmp_path).replace("uniform = true\n", "") + '[[methods]]\nname = "fedprox"\nmu = -1.0\n'
    with pytest.raises(BadStudy) as caught:
        go(text, tmp_path / "run")
    assert "write FedAvg(..., uniform=True)" in str(caught.value)
    assert "mu must be at least 0, not -1" in str(caught.value)
    assert "2 problems, nothing was run." in str(caught.value)
    assert not (tmp_path / "run").exists()
