"""Export of a run's records to a tracking tool: MLflow, or event files of TensorBoard.

The run may be unfinished, and its folder is not changed. No data leave the machine unless the given address is that of
another machine. MLflow's telemetry is switched off.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from polyclinic.errors import MissingDependency, RunError
from polyclinic.evaluation.records.record_schema import arm_names
from polyclinic.evaluation.records.run_reader import Run, read_run

TOOLS = ("mlflow", "tensorboard")


class NotTracked(RunError, ValueError):
    """Records that cannot be exported. The message gives the reason."""


def track(run_dir: str | Path, to: str, where: str = "") -> str:
    """Export the records of a run: one MLflow run, or one folder of events, for each method run.

    Args:
        run_dir: The run folder.
        to: One of ``TOOLS``.
        where: For MLflow a tracking address, by default the file ``mlflow.db`` in the folder that contains the run
            folder; for TensorBoard a folder, by default ``tensorboard`` in the same place.

    Returns:
        The address or folder.

    Raises:
        NotARun: If the folder is not a run.
        NotTracked: If the tool is unknown or not installed, or already has these records.
    """
    if to not in TOOLS:
        raise NotTracked(f"no tool called {to!r}; there are {', '.join(TOOLS)}")
    run = read_run(run_dir)
    try:
        if to == "mlflow":
            return _mlflow(run, where or f"sqlite:///{run.path.resolve().parent / 'mlflow.db'}")
        return _tensorboard(run, Path(where) if where else run.path.resolve().parent / "tensorboard")
    except ImportError as error:
        raise MissingDependency("track", f"this needs {error.name}") from None


def values(run: Run, label: str, seed: int, fold: int) -> Iterator[tuple[int, str, float]]:
    """Yield (round, name, value) of one method run: scores by site, test scores, bytes, seconds, privacy."""
    for line in run.lines:
        if (line.method, line.seed, line.fold) != (label, seed, fold):
            continue
        if line.kind in ("scores", "test"):
            role = "test" if line.kind == "test" else line.role
            for name, value in line.metrics.items():
                if value is not None and value == value:
                    yield line.round, f"{role}/{name}/{line.site}", value
        elif line.kind == "round":
            yield line.round, "bytes/sent", float(sum(line.bytes_up.values()))
            yield line.round, "bytes/received", float(sum(line.bytes_down.values()))
            yield line.round, "seconds/round", line.wall
            for site, seconds in line.seconds.items():
                yield line.round, f"seconds/{site}", seconds
        elif line.kind == "privacy" and line.epsilon is not None and line.round is not None:
            yield line.round, f"epsilon/{line.site}", line.epsilon


def _facts(run: Run, label: str, seed: int, fold: int) -> Mapping[str, Any]:
    """Return the settings of a method run."""
    method = next(m for m in run.info.methods if m.label == label)
    chosen = next((c.values for c in run.chosen if (c.method, c.seed, c.fold) == (label, seed, fold)), {})
    folds = {"fold": fold} if run.info.folds else {}
    asked = {f"option.{key}": value for key, value in {**method.options, **chosen}.items()}
    return {"method": method.name or label, "seed": seed, **folds, "rounds": run.info.rounds, **asked}


def _tensorboard(run: Run, where: Path) -> str:
    from tensorboardX import SummaryWriter

    for label, seed, fold, name in arm_names(run.info):
        folder = where / run.path.resolve().name / name
        if list(folder.glob("events.*")):
            raise NotTracked(f"{folder} holds events already: remove it, or name another place")
        found = list(values(run, label, seed, fold))
        if not found:
            continue
        with SummaryWriter(str(folder)) as writer:
            facts = {key: str(value) for key, value in _facts(run, label, seed, fold).items()}
            writer.add_text("study", json.dumps({"study": run.info.name, "hash": run.info.hash, **facts}, indent=1))
            for round, key, value in found:
                writer.add_scalar(key, value, round)
    return str(where)


def _mlflow(run: Run, where: str) -> str:
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = os.environ["DO_NOT_TRACK"] = "true"
    from mlflow.entities import Metric, Param, RunTag
    from mlflow.tracking import MlflowClient

    client, named = MlflowClient(tracking_uri=where), run.path.resolve().name
    if client.get_experiment_by_name(named) is not None:
        raise NotTracked(f"{where} holds {named} already: delete that experiment, or name another place")
    experiment = client.create_experiment(named, artifact_location=str(run.path.resolve()))
    for label, seed, fold, name in arm_names(run.info):
        found = list(values(run, label, seed, fold))
        if not found:
            continue
        one = client.create_run(experiment, run_name=name)
        facts = {key: str(value)[:500] for key, value in _facts(run, label, seed, fold).items()}
        tags = {"study": run.info.name, "hash": run.info.hash, "simulated": run.info.data.simulated or "no"}
        parameters = [Param(key, value) for key, value in facts.items()]
        marks = [RunTag(key, value[:500]) for key, value in tags.items()]
        client.log_batch(one.info.run_id, params=parameters, tags=marks)
        for begin in range(0, len(found), 1000):  # the most that MLflow takes at once
            part = found[begin : begin + 1000]
            client.log_batch(one.info.run_id, [Metric(key, value, 0, round) for round, key, value in part])
        client.set_terminated(one.info.run_id)
    return where
