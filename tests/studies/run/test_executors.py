"""The loop over method runs gives the same events, notes and errors with each executor."""

import json
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from polyclinic.engines.ray import cluster
from polyclinic.errors import ConfigError
from polyclinic.studies.config.schema import MethodSpec
from polyclinic.studies.config.study_config import parse
from polyclinic.studies.run import scheduler
from polyclinic.studies.run.cluster_runs import SHARED, ClusterWorkers
from polyclinic.studies.run.events import Event, Job
from polyclinic.studies.run.executors import (
    ChildProcesses,
    Ended,
    Executor,
    MethodRunFailed,
    ended,
    run_here,
    run_jobs,
)
from polyclinic.studies.run.run_directory import Note, Stopped
from tests.support.small_runs import STUDY

CLUSTER = pytest.param("cluster", marks=[pytest.mark.slow, pytest.mark.deploy])
EACH = pytest.mark.parametrize("kind", ["this process", "children", CLUSTER])
OTHER_PROCESSES = pytest.mark.parametrize("kind", ["children", CLUSTER])


def job(label: str, seed: int = 0) -> Job:
    return Job(MethodSpec(name="fedavg", label=label), seed)


@dataclass
class Script:
    """Replaces the execution of method runs: the label of a method says what happens in its second round."""

    folder: Path

    def __call__(self, job: Job, note: Note) -> Generator[Event, None, None]:
        try:
            yield from self._rounds(job, note)
        finally:
            (self.folder / f"{job.name}-closed").touch()

    def _rounds(self, job: Job, note: Note) -> Iterator[Event]:
        yield job.event("arm", rounds=2)
        count = note("round", {**job.who, "round": 1})
        yield job.event("round", round=count, rounds=2, scores={"a": 0.5}, external=("b",), notes=("n",))
        first = not (self.folder / job.name).exists()
        (self.folder / job.name).touch()
        if job.method.called == "refuses":
            raise ConfigError("its settings are no good")
        if job.method.called == "fails":
            raise ZeroDivisionError("its arithmetic is no good")
        if job.method.called == "stops":
            raise Stopped("stopped as asked")
        if job.method.called == "dies" or (job.method.called == "dies-once" and first):
            os.kill(os.getpid(), signal.SIGKILL)
        yield job.event("tested", round=2, rounds=2, scores={"a": 0.25})


def script_from(recipe: str) -> tuple[Script, dict[str, Job]]:
    told = json.loads(recipe)
    jobs = [job(label, seed) for label, seed in told["jobs"]]
    return Script(Path(told["folder"])), {one.name: one for one in jobs}


@dataclass
class Journal:
    """Counts equal entries, as the journal of a run does."""

    entries: list[str] = field(default_factory=list)

    def __call__(self, event: str, details: dict[str, Any]) -> int:
        self.entries.append(json.dumps([event, details]))
        return self.entries.count(self.entries[-1])


Start = Callable[[str, Sequence[Job], Journal], Iterator[Event]]


@pytest.fixture(scope="module")
def on_cluster() -> Iterator[None]:
    """A cluster of this machine, to which this process is connected."""
    pytest.importorskip("ray", reason='needs pip install "polyclinic[ray]"')
    with cluster.connected("local", 2):
        yield


@pytest.fixture
def start(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Start]:
    """Execute method runs in this process, or by an executor of the given kind with two processes."""
    kept: list[Executor] = []  # so that nothing ends because it is collected as garbage

    def started(kind: str, jobs: Sequence[Job], journal: Journal) -> Iterator[Event]:
        if kind == "this process":
            return run_here(jobs, Script(tmp_path), journal)
        if kind == "children":
            kept.append(ChildProcesses(Script(tmp_path), journal, 2))
        else:
            request.getfixturevalue("on_cluster")
            recipe = json.dumps({"folder": str(tmp_path), "jobs": [(one.method.called, one.seed) for one in jobs]})
            kept.append(ClusterWorkers(script_from, recipe, tmp_path, journal, len(jobs), 2))
        return run_jobs(jobs, kept[-1])

    yield started
    kept.clear()


def nothing_left(folder: Path) -> bool:
    return not multiprocessing.active_children() and not (folder / SHARED).exists()


@EACH
def test_every_executor_yields_the_events_of_each_method_run_in_order(kind: str, start: Start, tmp_path: Path) -> None:
    jobs, journal = [job("a"), job("b"), job("a", 1)], Journal()
    found = list(start(kind, jobs, journal))
    for one in jobs:
        mine = [event for event in found if (event.label, event.seed) == (one.method.called, one.seed)]
        assert mine == [
            one.event("arm", rounds=2),
            one.event("round", round=1, rounds=2, scores={"a": 0.5}, external=("b",), notes=("n",)),
            one.event("tested", round=2, rounds=2, scores={"a": 0.25}),
        ]
    assert len(found) == 9
    assert Counter(journal.entries) == Counter(json.dumps(["round", {**one.who, "round": 1}]) for one in jobs)
    assert nothing_left(tmp_path)


@EACH
@pytest.mark.parametrize("label", ["refuses", "fails"])
def test_every_executor_ends_with_the_message_of_an_error(kind: str, label: str, start: Start, tmp_path: Path) -> None:
    jobs, journal = [job(label), *(job("later", seed) for seed in range(6))], Journal()
    with pytest.raises((ConfigError, ZeroDivisionError, MethodRunFailed, RuntimeError), match="no good") as error:
        list(start(kind, jobs, journal))
    usual = {"refuses": ConfigError, "fails": ZeroDivisionError}[label]
    other = {"refuses": MethodRunFailed, "fails": RuntimeError}[label]
    assert type(error.value) is (usual if kind == "this process" else other)
    assert len(journal.entries) < len(jobs), "no method run begins after the error"
    assert nothing_left(tmp_path)


@EACH
def test_every_executor_stops_after_the_method_runs_that_have_begun(kind: str, start: Start, tmp_path: Path) -> None:
    jobs, journal = [job("stops"), job("stops", 1), job("later"), job("later", 1)], Journal()
    found: list[Event] = []
    with pytest.raises(Stopped, match="stopped as asked"):
        found.extend(start(kind, jobs, journal))
    assert {event.label for event in found} == {"stops"}
    assert nothing_left(tmp_path)


@EACH
def test_every_executor_ends_its_method_runs_when_the_caller_leaves(kind: str, start: Start, tmp_path: Path) -> None:
    jobs, journal = [job("a", seed) for seed in range(4)], Journal()
    events = start(kind, jobs, journal)
    assert isinstance(events, Generator)
    next(events)
    events.close()
    assert len(journal.entries) < len(jobs)
    assert kind != "this process" or (tmp_path / f"{jobs[0].name}-closed").exists()
    assert nothing_left(tmp_path)


@OTHER_PROCESSES
def test_a_method_run_whose_process_dies_is_repeated(kind: str, start: Start, tmp_path: Path) -> None:
    jobs, journal = [job("dies-once"), job("a")], Journal()
    found = list(start(kind, jobs, journal))
    assert Counter(event.label for event in found if event.what == "tested") == {"dies-once": 1, "a": 1}
    assert max(event.round for event in found if event.what == "round") == 2, "the journal has its first round twice"
    assert nothing_left(tmp_path)


@OTHER_PROCESSES
def test_a_method_run_whose_process_dies_three_times_ends_the_run(kind: str, start: Start, tmp_path: Path) -> None:
    jobs, journal = [job("dies")], Journal()
    with pytest.raises(MethodRunFailed, match=r"of a method run.* died 3 times; is there enough memory\?"):
        list(start(kind, jobs, journal))
    assert len(journal.entries) == 3
    assert nothing_left(tmp_path)


DISTRIBUTED = [
    # kind, parallel, further keys, method runs, workers, whether workers share whole method runs
    ("ray", "auto", {}, 8, 4, True),
    ("ray", "auto", {}, 7, 4, False),
    ("ray", "arms", {}, 1, 4, True),
    ("ray", "sites", {}, 8, 4, False),
    (
        "ray",
        "auto",
        {"attack.name": "sign-flip", "attack.attackers": 1},
        1,
        4,
        True,
    ),  # an attack is not distributed by sites
    ("workers", "auto", {}, 8, 4, True),
    ("workers", "auto", {}, 7, 4, False),
    ("workers", "auto", {}, 8, 1, False),
    ("workers", "arms", {}, 1, 4, True),
    ("workers", "sites", {}, 8, 4, False),
    ("workers", "auto", {"deadline": 60.0}, 8, 4, False),
    ("in-process", "auto", {}, 8, 4, False),
]


@pytest.mark.parametrize(("kind", "parallel", "keys", "jobs", "workers", "whole"), DISTRIBUTED)
def test_when_workers_share_whole_method_runs(
    kind: str,
    parallel: str,
    keys: dict[str, Any],
    jobs: int,
    workers: int,
    whole: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scheduler, "possible", lambda: True)  # this process may have threads
    table = {"engine.kind": kind} | ({"engine.parallel": parallel} if kind != "in-process" else {}) | keys
    study = parse(STUDY.format(path="a.npz", engine=kind), changes=table)
    assert scheduler._whole_arms(study, jobs, workers) is whole


def test_how_a_method_run_ended_has_its_message() -> None:
    assert ended(job("fedavg"), Stopped("after round 3")) == Ended(job("fedavg"), "stopped", "after round 3")
    assert ended(job("fedavg"), ConfigError("no such key")) == Ended(job("fedavg"), "refused", "no such key")
    failed = ended(job("fedavg"), ZeroDivisionError("its arithmetic"))
    assert failed.outcome == "failed"
    assert failed.text.endswith("ZeroDivisionError: its arithmetic\n")
