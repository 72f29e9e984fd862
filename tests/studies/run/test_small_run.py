"""What one small run writes and yields agrees with itself: events, records, journal, checkpoints and files."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from polyclinic.core import serialization as states
from polyclinic.core.audit_log import verify
from polyclinic.data.examples import DataError
from polyclinic.errors import ConfigError
from polyclinic.evaluation.records.run_reader import NotARun
from polyclinic.studies.config.study_config import parse
from polyclinic.studies.records.time_profile import RunTimes
from polyclinic.studies.run import scheduler
from polyclinic.studies.run.data_identity import DataChanged
from polyclinic.studies.run.resolved_study import resolve
from polyclinic.studies.run.run_directory import RunExists, Stopped, held, read_plan, read_tensors
from polyclinic.studies.run.run_lock import holder
from polyclinic.studies.run.scheduler import run, work_from
from polyclinic.testing import equal
from tests.support.small_runs import facts, go, npz, same, study

STUDY = """\
name = "small"
rounds = 3
seeds = [4, 1]

[data]
path = "{path}"
kind = "npz"
sites = "site"
external = ["d"]

[task]
network = "mlp"
options = {{ width = 4, depth = 1 }}

[training]
batch_size = 8
steps = 1

[evaluation]
interval = 2

[engine]
kind = "in-process"

[[methods]]
name = "fedavg"

[[methods]]
name = "local"
"""
RUNS = [("fedavg", 4), ("local", 4), ("fedavg", 1), ("local", 1)]


class Done:
    """A finished run, and the events that it yielded."""

    def __init__(self, root: Path) -> None:
        npz(root)
        self.root, self.text, self.path = root, STUDY.format(path=root / "small.npz"), root / "run"
        self.study = parse(self.text)
        self.events = list(run(self.study, self.text, self.path))
        self.journal = list(verify(self.path / "journal.jsonl"))

    def of(self, method: str, seed: int, kind: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (self.path / "records.jsonl").read_text().splitlines()]
        return [x for x in lines if (x["method"], x["seed"], x["kind"]) == (method, seed, kind)]

    def folder(self, method: str, seed: int) -> Path:
        return self.path / "arms" / f"{method}-seed{seed}"


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    return Done(tmp_path_factory.mktemp("small"))


def test_events_say_what_the_records_say(done: Done) -> None:
    first, *rest = done.events
    assert (first.what, first.label, first.rounds) == ("data", "", 0)
    expected = ["arm", "round", "round", "round", "tested"]
    assert [(e.label, e.seed, e.what) for e in rest] == [(m, s, what) for m, s in RUNS for what in expected]
    for method, seed in RUNS:
        mine = [e for e in rest if (e.label, e.seed) == (method, seed)]
        assert [e.round for e in mine] == [0, 1, 2, 3, 3]
        assert {e.rounds for e in mine} == {3}
        assert all(e.fold is None and e.epsilon is None and e.protects == "" and not e.lost for e in mine)
        rounds = done.of(method, seed, "round")
        assert [r["round"] for r in rounds] == [1, 2, 3]
        sums = [sum(r["bytes_up"].values()) + sum(r["bytes_down"].values()) for r in rounds]
        assert [e.bytes for e in mine] == [0, *sums, 0]
        assert (sum(rounds[0]["bytes_up"].values()) > 0) == (method == "fedavg")
        assert all(r["asked"] == ["a", "b", "c"] and r["lost"] == {} and r["wall"] > 0 for r in rounds)
        assert all(set(r["seconds"]) == {"a", "b", "c"} for r in rounds)
        scores: dict[int, dict[str, Any]] = {r: {} for r in (0, 1, 2, 3)}
        for line in done.of(method, seed, "scores"):
            assert line["role"] == "val"
            assert line["n"] > 0
            assert "n" not in line["metrics"]
            if line["site"] != "d":
                scores[line["round"]][line["site"]] = line["metrics"]["auc"]
        assert [len(scores[r]) for r in (1, 2, 3)] == [0, 3, 3], "scored every second round and at the end"
        assert [e.scores for e in mine[:-1]] == [scores[r] for r in (0, 1, 2, 3)]
        tests = {line["site"]: line["metrics"]["auc"] for line in done.of(method, seed, "test")}
        assert mine[-1].scores == tests
        assert set(tests) == ({"a", "b", "c", "d"} if method == "fedavg" else {"a", "b", "c"})
        assert mine[-1].external == (("d",) if method == "fedavg" else ())


def test_the_model_of_the_best_round_is_tested_on_each_patient_once(done: Done) -> None:
    data = dict(resolve(done.study, done.text).numbers)
    assert sorted(data.values()) == list(range(len(data)))
    assert [number for _, number in sorted(data.items())] == list(range(len(data)))
    for method, seed in RUNS:
        folder = done.folder(method, seed)
        means: dict[int, float] = {}
        for line in done.of(method, seed, "scores"):
            if line["site"] != "d":
                means[line["round"]] = means.get(line["round"], 0.0) + line["metrics"]["auc"]
        chosen = max(means, key=lambda r: (means[r], -r))
        end, best = (states.load(folder / f"{name}.safetensors") for name in ("checkpoint", "best"))
        assert end.done
        assert not best.done
        assert (end.round, end.best_round, best.round, best.best_round) == (3, chosen, chosen, chosen)
        assert end.best_score == pytest.approx(means[chosen] / 3)
        tests = done.of(method, seed, "test")
        assert {line["round"] for line in tests} == {chosen}
        (opened,) = (
            e for e in done.journal if e["event"] == "test opened" and (e["method"], e["seed"]) == (method, seed)
        )
        assert opened["round"] == chosen
        assert [line["opened"] for line in done.of(method, seed, "sealed")] == [1]
        leaves = read_tensors(folder / "predictions.safetensors")
        for line in tests:
            patients = leaves[f"{line['site']}/patient"].tolist()
            assert line["n"] == len(patients) > 0
            assert set(line["metrics"]) >= {"auc", "loss"}
        known = read_tensors(folder / "validation.safetensors")
        assert {name.split("/")[0] for name in known} == {name.split("/")[0] for name in leaves} - {"d"} | (
            {"d"} & {line["site"] for line in done.of(method, seed, "scores")}
        )
        for site in "abc":
            assert not set(known[f"{site}/patient"].tolist()) & set(leaves[f"{site}/patient"].tolist())
        model, plan = read_tensors(folder / "model.safetensors"), read_plan(folder / "model.safetensors")
        assert equal(model, dict(plan.build_method().shared_model(best.state)))
        with safe_open(folder / "model.safetensors", "pt") as file:
            meta = file.metadata()
        assert meta["study"] == done.study.hash
        assert (meta["method"], meta["round"]) == (method, str(chosen))
        assert (plan.seed, plan.method) == (seed, method)


def test_the_journal_has_each_step_and_the_folder_nothing_else(done: Done) -> None:
    info = json.loads((done.path / "run.json").read_text())
    per_run = [("round", 1), ("round", 2), ("round", 3), ("test opened", None)]
    expected = [
        (event, m, s, r if event == "round" else done.of(m, s, "test")[0]["round"])
        for m, s in RUNS
        for event, r in per_run
    ]
    assert [(e["event"], e["method"], e["seed"], e["round"]) for e in done.journal[1:-1]] == expected
    first, last = done.journal[0], done.journal[-1]
    assert (first["event"], first["study"], first["data"]) == (
        "begun",
        done.study.hash,
        info["data"]["fingerprint"],
    )
    assert last["event"] == "finished"
    assert all("protects" not in e and "epsilon" not in e for e in done.journal)
    assert (done.path / "study.toml").read_text() == done.text
    network = resolve(done.study, done.text).task.model()
    assert info["parameters"] == sum(p.numel() for p in network.parameters())
    top = {entry.name for entry in done.path.iterdir()}
    assert top == {".lock", "study.toml", "run.json", "journal.jsonl", "records.jsonl", "data.safetensors", "arms"}
    names = {"checkpoint", "best", "model", "predictions", "validation"}
    for method, seed in RUNS:
        assert {f.name for f in done.folder(method, seed).iterdir()} == {f"{name}.safetensors" for name in names}
    lines = [json.loads(line) for line in (done.path / "records.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys((x["method"], x["seed"]) for x in lines)) == RUNS


@pytest.mark.parametrize("stop_after", [3, 7])
def test_a_run_that_was_interrupted_resumes_where_it_was(done: Done, tmp_path: Path, stop_after: int) -> None:
    events = run(done.study, done.text, tmp_path / "run")
    seen = [next(events) for _ in range(stop_after)]
    events.close()
    resumed = list(run(done.study, done.text, tmp_path / "run", resume=True))
    assert same(tmp_path / "run", done.path)
    finished = [e.label for e in seen if e.what == "tested"]
    assert [e.what for e in resumed][1 : 1 + len(finished)] == ["tested"] * len(finished)
    goes_on = next(e for e in resumed if e.what == "arm")
    complete = [e.round for e in seen if e.what == "round" and e.label == goes_on.label]
    assert goes_on.round == max(complete, default=0)
    assert [e["event"] for e in verify(tmp_path / "run" / "journal.jsonl")].count("resumed") == 1


def test_a_finished_run_repeats_its_results_and_is_kept_unless_it_is_to_be_fresh(done: Done, tmp_path: Path) -> None:
    before = (done.path / "records.jsonl").read_bytes()
    again = list(run(done.study, done.text, done.path, resume=True))
    assert [e.what for e in again] == ["data"] + ["tested"] * 4
    tested = [e for e in done.events if e.what == "tested"]
    assert [(e.label, e.seed, e.round, e.rounds, e.external) for e in again[1:]] == [
        (e.label, e.seed, e.round, e.rounds, e.external) for e in tested
    ]
    assert [dict(e.scores) for e in again[1:]] == [dict(e.scores) for e in tested]
    assert (done.path / "records.jsonl").read_bytes() == before
    with pytest.raises(RunExists, match="--resume continues it, --fresh starts again"):
        list(run(done.study, done.text, done.path))
    (done.path / "old").mkdir()
    (done.path / "old" / "file").touch()
    (tmp_path / "kept").touch()
    (done.path / "link").symlink_to(tmp_path)
    list(run(done.study, done.text, done.path, fresh=True))
    assert not (done.path / "old").exists()
    assert not (done.path / "link").is_symlink()
    assert (tmp_path / "kept").exists()
    assert [e["event"] for e in verify(done.path / "journal.jsonl")].count("begun") == 1
    assert [f for f in facts(done.path) if f["kind"] == "test"] == [
        {k: v for k, v in json.loads(line).items() if k not in ("wall", "seconds")}
        for line in before.splitlines()
        if b'"kind":"test"' in line
    ]


def test_a_stop_file_ends_the_run_after_its_round(done: Done, tmp_path: Path) -> None:
    with held(tmp_path / "run") as folder:
        events = run(done.study, done.text, tmp_path / "run", folder=folder)
        while next(events).what != "round":
            pass
        (tmp_path / "run" / "stop").touch()
        assert folder.running
        with pytest.raises(Stopped, match="stop asked"):
            list(events)
        assert not folder.running
        assert holder(tmp_path / "run") == os.getpid()
    assert [e["event"] for e in verify(tmp_path / "run" / "journal.jsonl")] == ["begun", "round", "stopped"]
    assert not (tmp_path / "run" / "stop").exists()


def test_another_machine_builds_the_same_runs_from_the_recipe(done: Done, tmp_path: Path) -> None:
    resolved = resolve(done.study, done.text)
    with held(tmp_path) as folder:
        folder.begin(done.text, {}, False)
        recipe = scheduler._recipe(resolved, tmp_path, False)
        work, jobs = work_from(recipe)
        assert list(jobs) == [f"{m}-seed{s}" for m, s in RUNS]
        for name in reversed(jobs):  # in any order
            events = list(work(jobs[name], folder.note))
            assert events == [
                e for e in done.events if (e.label, e.seed) == (jobs[name].method.called, jobs[name].seed)
            ]
        folder.finish(list(jobs))
    assert facts(tmp_path) == facts(done.path)
    with pytest.raises(ConfigError, match="was changed on the command line"):
        work_from(json.dumps(json.loads(recipe) | {"study": "another"}))
    with pytest.raises(DataError, match="the data differ from those of the machine that started the run"):
        work_from(json.dumps(json.loads(recipe) | {"data": "another"}))
    before = os.getcwd()
    try:
        work_from(json.dumps(json.loads(recipe) | {"current": str(tmp_path)}))
        assert Path.cwd() == tmp_path.resolve()
        work_from(json.dumps(json.loads(recipe) | {"current": "/no/such/folder"}))
        assert Path.cwd() == tmp_path.resolve()
    finally:
        os.chdir(before)


def test_data_that_change_between_two_seeds_end_the_run(done: Done, tmp_path: Path) -> None:
    npz(tmp_path)
    text = STUDY.format(path=tmp_path / "small.npz")
    events = run(parse(text), text, tmp_path / "run")
    while (event := next(events)).what != "tested" or event.label != "local":
        pass
    npz(tmp_path, images=np.zeros((160, 8, 8), np.uint8))
    with pytest.raises(DataChanged, match="changed while the study was running: restore them and continue"):
        list(events)


def test_a_damaged_run_is_named_and_a_fresh_one_takes_its_place(done: Done, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(NotARun):
        list(run(done.study, done.text, tmp_path, resume=True))
    assert (tmp_path / "run.json").read_text() == "{"
    events = list(run(done.study, done.text, tmp_path, fresh=True))
    assert events == done.events
    assert same(tmp_path, done.path)


def test_a_cluster_is_given_all_that_its_workers_need(
    done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe is that of ``work_from``; the GPUs and the number of workers are those of the study."""
    given: list[Any] = []
    monkeypatch.setattr(scheduler, "ClusterWorkers", lambda *arguments: given.append(arguments))
    monkeypatch.chdir(tmp_path)
    resolved = resolve(done.study, done.text)
    ray = {"kind": "ray", "parallel": "arms", "workers": 3, "gpus": 0.5, "device": "cuda"}
    study = done.study.model_copy(update={"engine": done.study.engine.model_copy(update=ray)})
    resolved = dataclasses.replace(resolved, study=study)
    latest = (study.seeds[0], None, resolved.splits[0])
    work = scheduler._Work(resolved, study, Path("run"), latest, RunTimes(True))

    def note(event: str, details: dict[str, Any]) -> int:
        return 1

    scheduler._executor(work, 4, note)
    ((make, recipe, folder, *rest),) = given
    assert (make, folder) == (work_from, tmp_path / "run")
    assert rest == [note, 4, 3, 0.5, work.times.workers]
    assert json.loads(recipe) == {
        "text": done.text,
        "folder": str(tmp_path / "run"),
        "current": str(tmp_path),
        "study": done.study.hash,
        "data": resolved.splits[0].fingerprint,
        "device": "cuda",
        "profile": True,
    }


def test_a_study_that_selects_by_its_loss_has_a_report(tmp_path: Path) -> None:
    from polyclinic.cli.run import write_report
    from polyclinic.evaluation.records.run_reader import read_run
    from polyclinic.evaluation.run_evaluation import evaluate

    npz(tmp_path)
    text = study(tmp_path, **{"rounds = 4": "rounds = 1", "seeds = [0, 1]": "seeds = [0]"}) + (
        '[evaluation]\nmetric = "loss"\n'
    )
    go(text, tmp_path / "run")
    run = read_run(tmp_path / "run")
    found = evaluate(run).of("local")
    tested = {
        f["site"]: f["metrics"]["loss"]
        for f in facts(tmp_path / "run")
        if f["kind"] == "test" and f["method"] == "local"
    }
    assert tested
    for site, loss in tested.items():
        assert found.sites[site]["loss"].value == pytest.approx(loss, rel=1e-4)
    assert "Log loss" in (write_report(tmp_path / "run")).read_text()
