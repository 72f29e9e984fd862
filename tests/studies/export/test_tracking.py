"""Records handed on to MLflow and TensorBoard are the records, number for number; the run folder stays as it was."""

import sys
from pathlib import Path
from typing import Any

import pytest

from polyclinic.errors import MissingDependency
from polyclinic.evaluation.records.record_schema import arm_names
from polyclinic.evaluation.records.run_reader import Run, read_run
from polyclinic.studies.export.tracking import NotTracked, track, values
from tests.support.synthetic_run import write_run


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "made-1", methods=("local", "fedavg"), seeds=(0,))


def test_every_number_of_the_records_is_there(path: Path) -> None:
    run = read_run(path)
    found = {(n, name): value for n, name, value in values(run, "fedavg", 0, 0)}
    for line in run.curves:
        if line.method == "fedavg":
            for name, value in line.metrics.items():
                assert found[line.round, f"val/{name}/{line.site}"] == value
    for r in (r for r in run.rounds if r.method == "fedavg"):
        assert found[r.round, "bytes/sent"] == sum(r.bytes_up.values())


def test_tensorboard_reads_what_was_written(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX", reason="the extra 'track' is not installed")
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    track(path, "tensorboard", str(tmp_path / "events"))
    assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == before
    run = read_run(path)
    for label, seed, fold, name in arm_names(run.info):
        assert _events(tmp_path / "events" / "made-1" / name) == _expected(run, label, seed, fold)
    with pytest.raises(NotTracked, match="holds events already"):
        track(path, "tensorboard", str(tmp_path / "events"))


def _expected(run: Run, label: str, seed: int, fold: int) -> dict[tuple[int, str], Any]:
    return {(n, name): pytest.approx(value, rel=1e-6) for n, name, value in values(run, label, seed, fold)}


def _events(folder: Path) -> dict[tuple[int, str], float]:
    """The scalars of TensorBoard's event files: records of length, checksum, protobuf, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for file in folder.glob("events.*"):
        raw, at = file.read_bytes(), 0
        while at < len(raw):
            length = int.from_bytes(raw[at : at + 8], "little")
            event = Event.FromString(raw[at + 12 : at + 12 + length])
            at += 16 + length
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    found[event.step, value.tag] = value.simple_value
    return found


@pytest.mark.slow
def test_mlflow_reads_what_was_written(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="the extra 'track' is not installed")
    from mlflow.tracking import MlflowClient

    where = f"sqlite:///{tmp_path / 'mlflow.db'}"
    track(path, "mlflow", where)
    client, run = MlflowClient(tracking_uri=where), read_run(path)
    experiment = client.get_experiment_by_name("made-1")
    arms = {r.info.run_name: r for r in client.search_runs([experiment.experiment_id])}
    assert set(arms) == {name for *_, name in arm_names(run.info)}
    one = arms["fedavg-seed0"]
    assert one.data.params["method"] == "fedavg"
    expected = [(n, v) for n, name, v in values(run, "fedavg", 0, 0) if name == "val/auc/lyon"]
    history = client.get_metric_history(one.info.run_id, "val/auc/lyon")
    assert sorted((m.step, m.value) for m in history) == expected
    with pytest.raises(NotTracked, match="already"):
        track(path, "mlflow", where)


def test_what_is_missing_is_told(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotTracked, match="there are mlflow, tensorboard"):
        track(path, "wandb")
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(MissingDependency, match="polyclinic\\[track\\]"):
        track(path, "tensorboard", str(tmp_path / "events"))
