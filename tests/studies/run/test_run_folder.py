"""The folder of a run, its lock, signals, and processes side by side: each with whatever can go wrong."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from polyclinic.core.atomic import PREFIX, SUFFIX
from polyclinic.data.federation import Federated
from polyclinic.data.preprocessing.table_statistics import Statistics
from polyclinic.data.splits import Fold
from polyclinic.errors import IntegrityError, RunError
from polyclinic.studies.config.schema import MethodSpec
from polyclinic.studies.config.study_config import Study
from polyclinic.studies.run import method_run, run_lock
from polyclinic.studies.run.cancellation import STOPPED, stopping
from polyclinic.studies.run.events import Event, Job, cores
from polyclinic.studies.run.executors import DEATHS, ChildProcesses, MethodRunFailed, possible, run_jobs
from polyclinic.studies.run.run_directory import (
    Folder,
    MethodRunFolder,
    RunExists,
    RunHeld,
    Stopped,
    held,
    read_plan,
    read_tensors,
    statistics_file,
    write_statistics,
    write_tensors,
)
from tests.support.known import known


def test_a_deleted_run_is_gone_and_a_living_or_strange_folder_is_not(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with pytest.raises(RunError, match="contains no run"):
        run_lock.delete(path)
    with held(path) as folder:
        folder.begin("", {}, False)
        assert run_lock.holder(path) == os.getpid()
        with pytest.raises(RunError, match=f"a process works on this run. Stop it first: polyclinic stop {path}"):
            run_lock.delete(path)
        with pytest.raises(RunHeld, match=rf"process {os.getpid()} works on this run. Wait for it"):
            Folder(path).hold()
        assert run_lock.ask_to_stop(path) == os.getpid()
        assert (path / "stop").exists()
    assert not (path / "stop").exists()
    assert run_lock.holder(path) == run_lock.ask_to_stop(path) == 0
    assert not (path / "stop").exists()
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(RunError, match="contains no run"):
        run_lock.delete(tmp_path / "link")
    run_lock.delete(path)
    assert list(tmp_path.iterdir()) == [tmp_path / "link"]


def test_a_pipe_in_the_place_of_the_lock_blocks_nothing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".lock")
    assert run_lock.holder(tmp_path) == 0
    assert run_lock.holder(tmp_path / "nowhere") == 0


def test_a_folder_without_a_run_is_deleted_and_leftovers_are_removed(tmp_path: Path) -> None:
    with held(tmp_path / "empty"):
        assert (tmp_path / "empty" / ".lock").read_text() == str(os.getpid())
    assert not (tmp_path / "empty").exists()
    for place in ("run", "run/arms/a", "run/report"):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        (tmp_path / place / f"{PREFIX}x{SUFFIX}").touch()
    (tmp_path / "run" / "stop").touch()
    folder = Folder(tmp_path / "run")
    assert not run_lock.holder(folder.path)
    folder.hold()
    assert run_lock.holder(folder.path) == os.getpid()
    assert not [f for f in (tmp_path / "run").rglob("*") if f.is_file() and f.name != ".lock"]
    folder.close()
    assert not run_lock.holder(folder.path)
    assert (tmp_path / "run" / ".lock").read_text() == ""


def test_a_folder_that_nobody_holds_is_closed_without_a_trace(tmp_path: Path) -> None:
    Folder(tmp_path / "never").close()
    assert not (tmp_path / "never").exists()
    with held(tmp_path / "run") as folder:
        folder.begin("", {}, False)
    (tmp_path / "run" / "stop").touch()  # for the process that holds it next
    folder.close()
    assert (tmp_path / "run" / "stop").exists()


def test_a_run_begins_once_and_notes_count_equal_entries(tmp_path: Path) -> None:
    with held(tmp_path) as folder:
        assert not folder.begun
        folder.begin("a study", {"name": "x"}, False)
        assert folder.begun
        assert folder.running
        assert [folder.note("opened", {"seed": seed}) for seed in (1, 1, 2, 1)] == [1, 2, 1, 3]
    assert not folder.running
    folder = Folder(tmp_path)
    folder.hold()
    with pytest.raises(RunExists):
        folder.begin("another study", {}, False)
    folder.begin("another study", {}, True)
    assert (tmp_path / "study.toml").read_text() == "a study"
    assert json.loads((tmp_path / "run.json").read_text()) == {"name": "x"}
    assert folder.note("opened", {"seed": 1}) == 4
    folder.clear()
    assert [f.name for f in tmp_path.iterdir()] == [".lock"]
    folder.close()


def test_records_are_cut_appended_and_joined_in_order(tmp_path: Path) -> None:
    stop = tmp_path / "stop"
    for name in ("b", "a"):
        arm = MethodRunFolder(tmp_path / "arms" / name, lambda event, details: 1, stop)
        arm.close()
        arm.open(0)
        arm.record("round", of=name)
        length = arm.settle()
        assert length == (arm.path / "records.jsonl").stat().st_size
        arm.record("torn", of=name)
        arm.close()
        arm.open(length)
        arm.record("test", of=name)
        arm.settle()
        arm.close()
        lines = (arm.path / "records.jsonl").read_text().splitlines()
        assert [json.loads(line)["kind"] for line in lines] == ["round", "test"]
        arm.check_stop()
    stop.touch()
    with pytest.raises(Stopped, match=f"stopped as {stop} asked"):
        arm.check_stop()
    folder = Folder(tmp_path)
    folder.finish(["a", "b", "c"])
    assert not (tmp_path / "records.jsonl").exists(), "the records of c are missing"
    for name in "abc":
        (tmp_path / "arms" / name).mkdir(exist_ok=True)
        (tmp_path / "arms" / name / "records.jsonl").write_text(f'{{"of":"{name}"}}\n')
    folder.finish(["c", "a", "b"])
    assert (tmp_path / "records.jsonl").read_text() == '{"of":"c"}\n{"of":"a"}\n{"of":"b"}\n'
    assert not list(tmp_path.glob("arms/*/records.jsonl"))
    folder.finish(["c", "a", "b"])
    assert (tmp_path / "records.jsonl").stat().st_size == 33


def test_files_of_tensors_keep_shared_and_strided_values_and_name_their_plan(tmp_path: Path) -> None:
    x = torch.arange(6.0).reshape(2, 3)
    write_tensors(tmp_path / "m", {"x": x.T, "y": x, "z": x}, {"a": "1"})
    read = read_tensors(tmp_path / "m")
    assert torch.equal(read["x"], x.T)
    assert torch.equal(read["y"], x)
    assert torch.equal(read["z"], x)
    assert int.from_bytes((tmp_path / "m").read_bytes()[:8], "little") % 8 == 0
    for meta in ({"a": "1"}, None):
        write_tensors(tmp_path / "m", {"x": x}, meta)
        with pytest.raises(IntegrityError, match="carries no plan, so its network is unknown"):
            read_plan(tmp_path / "m")


def test_inputs_are_described_once_unless_sites_differ(tmp_path: Path) -> None:
    def fit(words: str) -> Statistics:
        return cast(Statistics, SimpleNamespace(text=lambda: words))

    assert statistics_file(tmp_path) is None
    write_statistics(tmp_path, {})
    assert list(tmp_path.iterdir()) == []
    write_statistics(tmp_path, {"a": fit("same"), "b": fit("same")})
    assert statistics_file(tmp_path, "a") == statistics_file(tmp_path) == tmp_path / "inputs.toml"
    assert (tmp_path / "inputs.toml").read_text() == "same"
    (tmp_path / "inputs.toml").unlink()
    write_statistics(tmp_path, {"a": fit("one"), "b": fit("two")})
    assert statistics_file(tmp_path) is None
    assert known(statistics_file(tmp_path, "b")).read_text() == "two"
    assert statistics_file(tmp_path, "c") is None


def test_signals_stop_a_running_run_once_and_at_once_the_second_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with held(tmp_path) as folder:
        folder.begin("", {}, False)
        with stopping(folder) as signals:
            assert signals.code == STOPPED == 3
            signal.raise_signal(signal.SIGTERM)
            assert (tmp_path / "stop").exists()
            assert signals.code == 128 + signal.SIGTERM
            assert "stopping after the current round" in capsys.readouterr().err
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            assert signals.code == 128 + signal.SIGINT
    assert signal.getsignal(signal.SIGTERM) is before


def test_jobs_are_named_by_method_seed_and_fold() -> None:
    spec = MethodSpec(name="fedavg", label="mine")
    plain, folded = Job(spec, 3), Job(spec, 3, Fold(1, 5), trial=2)
    assert plain.who == {"method": "mine", "seed": 3}
    assert folded.who == {"method": "mine", "seed": 3, "fold": 1, "trial": 2}
    assert (plain.name, folded.name) == ("mine-seed3", "mine-seed3-fold1")
    assert plain.event("round", round=2) == Event("round", "mine", 3, round=2)
    assert folded.event("arm") == Event("arm", "mine", 3, fold=1)
    assert 1 <= cores() <= (os.cpu_count() or 1)


@pytest.mark.parametrize(
    ("fold", "sites"),
    [
        (None, "abx"),
        (Fold(0, 3), "abx"),
        (Fold(1, 3), "ab"),
        (Fold(0, 3, "sites"), "x"),
        (Fold(2, 3, "sites"), "x"),
    ],
)
def test_with_folds_each_patient_is_tested_in_one_of_them(fold: Fold | None, sites: str) -> None:
    assert method_run.tested_sites(("a", "b", "x"), ("x",), fold) == tuple(sites)


def test_sites_that_do_not_train_are_external_unless_each_is_left_out_in_turn() -> None:
    class Of:
        def __init__(self, **values: Any) -> None:
            vars(self).update(values)

    data = cast(Federated, Of(external=("x",)))
    assert method_run.external_in(["a", "x"], cast(Study, Of(folds=None)), data) == ("x",)
    assert method_run.external_in(["a", "x"], cast(Study, Of(folds="sites")), data) == ()


class Named(str):
    """The name of a method run, in place of the method run."""

    @property
    def name(self) -> str:
        return str(self)


def side_by_side(jobs: list[str], work: Any, note: Any, workers: int) -> Iterator[Event]:
    named: list[Any] = [Named(job) for job in jobs]
    return run_jobs(named, ChildProcesses(work, note, workers))


def works(folder: Path, act: Callable[[str, int, Any], Iterator[Event]]) -> Callable[[str, Any], Iterator[Event]]:
    """Work that counts, across processes, how often each job has begun."""

    def work(job: str, note: Any) -> Iterator[Event]:
        with open(folder / job, "a") as file:
            file.write("x")
        yield Event("arm", job, notes=("a note",), external=("x",))
        yield from act(job, (folder / job).stat().st_size, note)

    return work


def test_runs_side_by_side_yield_all_events_and_write_one_journal(tmp_path: Path) -> None:
    assert possible()
    notes: list[Any] = []

    def note(event: str, details: dict[str, Any]) -> int:
        notes.append((event, details))
        return 40 + len(notes)

    def act(job: str, times: int, note: Any) -> Iterator[Event]:
        assert torch.get_num_threads() == 1
        yield Event("tested", job, round=note("opened", {"job": job}), scores={"a": float(os.getpid())})

    events = list(side_by_side(["a", "b", "c", "d"], works(tmp_path, act), note, 2))
    tested = {e.label: e for e in events if e.what == "tested"}
    assert set(tested) == set("abcd")
    assert sorted(details["job"] for _, details in notes) == list("abcd")
    for job, event in tested.items():
        assert event.round == 41 + [details["job"] for _, details in notes].index(job)
    pids = {e.scores["a"] for e in tested.values()}
    assert len(pids) == 4
    assert os.getpid() not in pids
    assert all(e.notes == ("a note",) for e in events if e.what == "arm")


def test_a_process_that_dies_is_started_again_and_given_up_in_the_end(tmp_path: Path) -> None:
    def act(job: str, times: int, note: Any) -> Iterator[Event]:
        if job == "a" and times < DEATHS:
            os._exit(1)
        yield Event("tested", job)

    events = list(side_by_side(["a", "b"], works(tmp_path, act), lambda e, d: 1, 1))
    assert [e.label for e in events] == ["a"] * (DEATHS + 1) + ["b"] * 2
    (tmp_path / "a").unlink()

    def dying(job: str, times: int, note: Any) -> Iterator[Event]:
        os._exit(1)
        yield

    with pytest.raises(MethodRunFailed, match=f"died {DEATHS} times; is there enough memory"):
        list(side_by_side(["a"], works(tmp_path, dying), lambda e, d: 1, 2))
    assert (tmp_path / "a").stat().st_size == DEATHS


@pytest.mark.parametrize(
    ("error", "raised", "says"),
    [
        (Stopped("stopped as asked"), Stopped, "^stopped as asked$"),
        (RunError("a message"), MethodRunFailed, "^a message$"),
        (KeyError("x"), RuntimeError, r"(?s)Traceback.*KeyError: 'x'"),
    ],
)
def test_an_error_of_one_run_ends_all_of_them(
    tmp_path: Path, error: Exception, raised: type[Exception], says: str
) -> None:
    def act(job: str, times: int, note: Any) -> Iterator[Event]:
        if job == "a":
            raise error
        while True:
            if isinstance(error, Stopped):
                raise error
            time.sleep(0.01)
            yield Event("round", job)

    before = child_processes()
    with pytest.raises(raised, match=says) as caught:
        list(side_by_side(["a", "b", "c"], works(tmp_path, act), lambda e, d: 1, 2))
    assert caught.type is raised
    assert not (tmp_path / "c").exists()
    assert child_processes() <= before


def child_processes() -> set[str]:
    """The processes that this one has started and that have not ended."""
    return {child for task in Path("/proc/self/task").iterdir() for child in (task / "children").read_text().split()}
