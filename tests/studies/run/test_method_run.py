"""One method run: which round is tested, when training ends, what the sites are given, and what is recorded of them."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

from polyclinic.core import serialization as states
from polyclinic.core.audit_log import verify
from polyclinic.core.rounds import TooFewReplies
from polyclinic.core.site import Compute
from polyclinic.data.federation import federate
from polyclinic.engines import step_file
from polyclinic.engines.plan import Plan, build_method
from polyclinic.learning.tasks import task_evaluation
from polyclinic.studies.config.study_config import parse
from polyclinic.studies.records.checkpoint import Checkpoint
from polyclinic.studies.run import method_run, round_progress
from polyclinic.studies.run.events import cores
from polyclinic.studies.run.resolved_study import resolve
from polyclinic.studies.run.run_directory import MethodRunFolder, read_tensors, statistics_file
from polyclinic.studies.run.scheduler import run
from tests.studies.run.test_planning import registry
from tests.support.known import known
from tests.support.small_runs import facts, npz

STUDY = """\
name = "one"
rounds = {rounds}
seeds = [5]
{top}
[data]
path = "{path}"
kind = "npz"
sites = "site"
external = ["d"]
{data}
[task]
network = "mlp"
options = {{ width = 4, depth = 1 }}
[training]
batch_size = 8
steps = 1
[evaluation]
{evaluation}
[engine]
kind = "{kind}"
{engine}
"""
Script = Mapping[int, Mapping[str, float | None]]
PEAK: Script = {  # of the training sites round 2 is the best one, and of all sites round 5
    1: {"a": 0.5, "b": 0.5, "c": 0.5, "d": 0.1},
    2: {"a": 0.9, "b": 0.6, "c": 0.9, "d": 0.1},
    3: {"a": 0.84, "b": None, "c": 0.84, "d": 0.2},  # b keeps its score
    4: {"a": 0.7, "b": 0.7, "c": 0.7, "d": 0.9},
    5: {"a": 0.79, "b": 0.79, "c": 0.79, "d": 1.0},
    6: {"a": 0.6, "b": 0.6, "c": 0.6, "d": 0.1},
}


def study(folder: Path, methods: Sequence[str], rounds: int = 6, **parts: str) -> str:
    lines = dict.fromkeys(("top", "data", "evaluation", "engine"), "") | {"kind": "in-process"} | parts
    text = STUDY.format(path=npz(folder), rounds=rounds, **lines)
    return text + "".join(f'[[methods]]\nname = "{name}"\n' for name in methods)


def scripted(script: Script, metric: str = "auc") -> Callable[..., Any]:
    """``evaluate`` with scores on validation data by round and site from ``script``; the sites have their usual ones."""
    real, rounds = task_evaluation.evaluate, len(script)

    def evaluate(method: Any, federation: Any, state: Any, asked: Sequence[str], job: str = "score/val") -> Any:
        found = real(method, federation, state, asked, job)
        if job != "score/val":
            return found
        following = method.request(state)
        scores = script[rounds if following is None else following.round]
        wanted = {site: scores[site] for site in found}
        return {
            site: {
                **({} if value is None else {metric: torch.tensor(value, dtype=torch.float64)}),
                "n": torch.tensor(4),
            }
            for site, value in wanted.items()
        }

    return evaluate


def ran(text: str, path: Path, stop: int = 0) -> Path:
    """Run a study; with ``stop``, it is interrupted after that round of its first method, and resumed."""
    events = run(parse(text), text, path)
    for event in events:
        if stop and (event.what, event.round) == ("round", stop):
            events.close()
    if stop:
        list(run(parse(text), text, path, resume=True))
    return path


def rounds_tested(path: Path) -> dict[str, set[int]]:
    """The rounds that were tested, by method."""
    rounds: dict[str, set[int]] = {}
    for fact in facts(path):
        if fact["kind"] == "test":
            rounds.setdefault(fact["method"], set()).add(fact["round"])
    return rounds


@pytest.mark.parametrize("stop", [0, 4])
def test_baselines_end_when_they_no_longer_improve_at_the_sites_that_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """Of the metric of the study, on the latest scores of each site, also if the run was interrupted."""
    script = {r: {s: None if x is None else 1 - x for s, x in of.items()} for r, of in PEAK.items()}
    monkeypatch.setattr(method_run, "evaluate", scripted(script, "loss"))
    text = study(tmp_path, ["local", "pooled", "fedavg"], evaluation='patience = 2\nmetric = "loss"')
    path = ran(text, tmp_path / "run", stop)
    assert rounds_tested(path) == {"local": {2}, "pooled": {2}, "fedavg": {2}}
    last = {f["method"]: f["round"] for f in facts(path) if f["kind"] == "round"}
    assert last == {"local": 4, "pooled": 4, "fedavg": 6}
    ends = [e for e in verify(path / "journal.jsonl") if e["event"] == "no improvement"]
    assert [(e["method"], e["seed"], e["round"], e["best"]) for e in ends] == [("local", 5, 4, 2), ("pooled", 5, 4, 2)]
    for name in ("local", "fedavg"):
        end = states.load(path / "arms" / f"{name}-seed5" / "checkpoint.safetensors")
        assert (end.round, end.best_round, end.done) == (last[name], 2, True)
        assert end.best_score == pytest.approx(0.2)


@pytest.mark.parametrize("stop", [0, 2])
@pytest.mark.parametrize(("select", "round"), [("best", 2), ("last", 6)])
def test_the_best_or_the_last_round_is_tested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int, select: str, round: int
) -> None:
    monkeypatch.setattr(method_run, "evaluate", scripted(PEAK))
    text = study(tmp_path, ["fedavg"], evaluation=f'select = "{select}"')
    path = ran(text, tmp_path / "run", stop)
    assert rounds_tested(path) == {"fedavg": {round}}
    best = states.load(path / "arms" / "fedavg-seed5" / "best.safetensors")
    assert (best.round, best.best_round, best.done) == (round, round, False)
    assert best.best_score == pytest.approx(0.8 if round == 2 else 0.6)
    assert [f["opened"] for f in facts(path) if f["kind"] == "sealed"] == [1]


def test_scores_in_the_records_are_those_of_the_predictions(tmp_path: Path) -> None:
    """By scikit-learn; and each prediction is that of its patient in the split of the seed."""
    text = study(tmp_path, ["fedavg", "pooled"], rounds=2)
    path = ran(text, tmp_path / "run")
    data, numbers = federate(parse(text).data, 5), resolve(parse(text), text).numbers
    for name in ("fedavg", "pooled"):
        leaves = read_tensors(path / "arms" / f"{name}-seed5" / "predictions.safetensors")
        known_ = read_tensors(path / "arms" / f"{name}-seed5" / "validation.safetensors")
        lines = {f["site"]: f for f in facts(path) if (f["kind"], f["method"]) == ("test", name)}
        assert lines.keys() == set("abcd")
        for site, line in lines.items():
            for found, role in ((leaves, "test"), (known_, "val")):
                if role in data.sites[site]:
                    patients = [numbers[patient] for patient in data.sites[site][role].patients]
                    assert found[f"{site}/patient"].tolist() == patients
            target, score = leaves[f"{site}/target"].numpy(), leaves[f"{site}/score"].numpy().astype(np.float64)
            assert line["n"] == len(target) > 3
            assert line["metrics"]["auc"] == pytest.approx(roc_auc_score(target, score[:, 1]))
            assert line["metrics"]["accuracy"] == pytest.approx((score.argmax(1) == target).mean())
            assert line["metrics"]["loss"] == pytest.approx(
                log_loss(target, score / score.sum(1, keepdims=True)), rel=1e-3
            )


def test_a_table_keeps_how_its_rows_are_scaled(tmp_path: Path) -> None:
    table = registry(tmp_path)
    text = study(tmp_path, ["fedavg"], rounds=1).replace(f'path = "{tmp_path}/small.npz"\nkind = "npz"', "")
    given = f'kind = "table"\npath = "{table["path"]}"\nlabel = "y"\ncategories = ["kind"]\n'
    text = text.replace('external = ["d"]\n', given)
    path = ran(text, tmp_path / "run")
    statistics = federate(parse(text).data, 5).statistics
    assert statistics.keys() == set("abc")
    folder = path / "arms" / "fedavg-seed5"
    assert {site: known(statistics_file(folder, site)).read_text() for site in "abc"} == {
        site: fit.text() for site, fit in statistics.items()
    }


def test_pages_see_the_sites_that_are_asked_and_their_steps_until_the_method_run_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(round_progress, "INTERVAL", 0.0)
    monkeypatch.setattr(step_file, "INTERVAL", 0.0)
    text = study(tmp_path, ["fedavg"], rounds=2).replace("steps = 1", "steps = 3")
    folder = tmp_path / "run" / "arms" / "fedavg-seed5"
    events = run(parse(text), text, tmp_path / "run")
    while next(events).what != "round":
        pass
    now = json.loads((folder / round_progress.NAME).read_text())
    assert (now["round"], now["asked"], sorted(now["arrived"])) == (1, ["a", "b", "c"], ["a", "b", "c"])
    (steps,) = step_file.read(folder)
    assert (steps["site"], steps["round"], steps["done"], steps["total"]) == ("c", 1, 3, 3)
    list(events)
    assert not (folder / round_progress.NAME).exists()
    assert step_file.read(folder) == []


@pytest.mark.parametrize(
    ("top", "says"),
    [
        ("min_replies = 3", "2 of 3 required replies. b: failed: MemoryError"),
        ("deadline = 1e-9", "0 of 1 required replies. a: no answer within 1e-09 s; b: failed"),
    ],
)
def test_a_round_needs_the_replies_that_the_study_wants_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, top: str, says: str
) -> None:
    from polyclinic.methods.optimization.fedavg import FedAvg

    real = FedAvg.site_update

    def failing(self: Any, request: Any, memory: Any, site: Any) -> Any:
        if site.name == "b":
            raise MemoryError
        return real(self, request, memory, site)

    monkeypatch.setattr(FedAvg, "site_update", failing)
    text = study(tmp_path, ["fedavg"], rounds=1, top=top)
    with pytest.raises(TooFewReplies, match=says):
        ran(text, tmp_path / "run")
    entries = [e["event"] for e in verify(tmp_path / "run" / "journal.jsonl")]
    assert "budget used up" not in entries
    assert "ended by the attack" not in entries


def test_no_round_needs_more_replies_than_sites_are_asked(tmp_path: Path) -> None:
    text = study(tmp_path, ["fedavg"], rounds=3, top="min_replies = 3\nsites_per_round = 2")
    asked = [f["asked"] for f in facts(ran(text, tmp_path / "run")) if f["kind"] == "round"]
    assert [len(sites) for sites in asked] == [2, 2, 2]
    assert {site for sites in asked for site in sites} <= set("abc")


class Built(Exception):
    """What an engine was built with, in place of the engine."""


@pytest.mark.parametrize("method", ["fedavg", "pooled"])
@pytest.mark.parametrize(
    ("kind", "keys"), [("in-process", ""), ("workers", "workers = 3"), ("workers", ""), ("ray", "workers = 2")]
)
def test_every_engine_has_the_same_sites(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, keys: str, method: str
) -> None:
    """With the study's threads and seed. All training data are in one place if the method needs them there."""

    def build(*arguments: Any) -> None:
        raise Built(*arguments)

    for name in ("InProcess", "Workers", "RaySites"):
        monkeypatch.setattr(method_run, name, partial(build, name))
    keys = f"threads = 2\nchannels_last = true\n{keys}"
    text = study(tmp_path, [method], data='public = ["c"]', kind=kind, engine=keys)
    resolved = resolve(parse(text), text)
    (job,) = resolved.jobs
    engine = resolved.study.engine.model_copy(update={"gpus": 0.5})
    wanted = resolved.study.model_copy(update={"engine": engine})
    folder = MethodRunFolder(tmp_path / "arm", lambda event, details: 1, tmp_path / "stop")
    built = resolved.methods[job.name]
    one = method_run.MethodRun(wanted, "hash", job, built, resolved.splits[0], folder, resolved.numbers)
    before = Checkpoint(None, {"a": {"kept": {}}}, 1, 0, 0, 0.0, False)
    with pytest.raises(Built) as caught:
        one._engine(before)
    name, *arguments = caught.value.args
    data = resolved.splits[0]
    held = {"public": data.public}
    if kind == "ray":
        assert (name, arguments[0], Plan.from_json(arguments[1])) == ("RaySites", build_method, built.plan)
        sites, *rest = arguments[2:]
        assert rest == [before.memory, 5, 2, held, 0.5, None]
    else:
        first, sites, *rest = arguments
        assert first is built.method
        processes = [3 if "workers" in keys else min(len(sites), cores())] if kind == "workers" else []
        assert (name, rest) == (
            "Workers" if kind == "workers" else "InProcess",
            [before.memory, {}, 5, *processes, held, folder.path],
        )
    expected = {site: dict(roles) for site, roles in data.sites.items()}
    assert {site: set(roles) for site, roles in expected.items()} == {
        "a": {"train", "val", "test", "public"},
        "b": {"train", "val", "test", "public"},
        "d": {"test"},
    }
    if method == "pooled":
        expected = {site: {r: e for r, e in roles.items() if r != "train"} for site, roles in expected.items()}
        expected["pooled"] = {role: examples for role, examples in sites["pooled"].data.items()}
        assert len(expected["pooled"]["train"]) == sum(len(data.sites[site]["train"]) for site in "ab")
    assert {name: dict(site.data) for name, site in sites.items()} == expected
    assert {(site.seed, site.device, site.compute) for site in sites.values()} == {(5, "cpu", Compute(2, True, False))}
    assert all(site.name == name for name, site in sites.items())
