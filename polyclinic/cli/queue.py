"""The queue of `polyclinic server`: adding studies and single runs, waiting for them, and exporting results."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyclinic.cli.rendering import hint, line
from polyclinic.engines.flare.protocol.paths import ServerFolder, SetupError, read_json, read_small
from polyclinic.engines.flare.protocol.run_request import InvalidRunRequest, RunRequest
from polyclinic.engines.flare.server import sent_weights, server_setup, study_runs
from polyclinic.engines.flare.server.job_queue import FINISHED, OVER, Queue

REHEARSED = "  (a rehearsal on synthetic data, without a result)"


def table_of(path: Path) -> dict[str, Any]:
    """Read a study file or a run request.

    Raises:
        InvalidRunRequest: If it does not exist or is neither.
    """
    import tomllib

    try:
        table: Any = read_json(path) if path.suffix == ".json" else tomllib.loads(read_small(path))
    except FileNotFoundError:
        raise InvalidRunRequest(f"{path} does not exist") from None
    except IsADirectoryError:
        raise InvalidRunRequest(f"{path} is a folder: name a study file") from None
    except UnicodeDecodeError:
        raise InvalidRunRequest(f"{path} is not UTF-8: save it in that encoding") from None
    except tomllib.TOMLDecodeError as error:
        raise InvalidRunRequest(f"{path}: this is not TOML: {error}") from None
    if not isinstance(table, dict):
        raise InvalidRunRequest(f"{path} is neither a study nor a run request")
    return table


def queue_order(
    server: ServerFolder,
    path: Path,
    table: dict[str, Any],
    name: str,
    sites: tuple[str, ...],
    send_weights: bool = False,
) -> str:
    """Add a single run to the queue and return its name.

    Args:
        server: The server.
        path: The file of the run request. ``table``: its content.
        name: The name of the run; by default that in the file.
        sites: The sites, unless the file names them.
        send_weights: Whether the server sends the start weights to sites without them.
    """
    table["plan"] = {"sites": list(sites), **table["plan"]}
    if send_weights:
        table["weights"] = sent_weights.stated(table["plan"])
    table["run"] = name or table.get("run") or path.stem
    try:
        an = RunRequest.from_json(json.dumps(table))
    except InvalidRunRequest as error:
        raise InvalidRunRequest(f"{path}: {error}") from None
    server_setup.order(server, an)
    line(f"queued   {an.run}: {an.plan['method']} over {', '.join(an.plan['sites'])}, {an.plan['rounds']} rounds")
    return an.run


def queue_study(
    server: ServerFolder,
    path: Path,
    name: str,
    sites: tuple[str, ...],
    inputs: tuple[int, ...],
    outputs: int,
    send_weights: bool = False,
) -> list[str]:
    """Add a study to the queue and return the names of the runs that are queued at once.

    Args:
        server: The server.
        path: The study file.
        name: The name of the study; by default that in the file.
        sites: The sites.
        inputs: The shape of an example, without a survey. ``outputs``: the number of classes, labels or values.
        send_weights: Whether the server sends the start weights to sites without them.
    """
    from polyclinic.studies.config import study_config
    from polyclinic.studies.config.loader import plan_content
    from polyclinic.studies.run import deployment

    if bool(inputs) != (outputs > 0):
        raise InvalidRunRequest("give --inputs and --outputs together, or neither: then the sites are surveyed")
    study = study_config.read(path)
    shape = {"inputs": list(inputs), "outputs": outputs} if inputs else None
    arms, notes = deployment.method_runs(study, sites, shape)
    title, text = name or study.name, path.read_text(encoding="utf-8")
    how = deployment.how(study)
    if send_weights:
        how = {**how, "weights": sent_weights.stated(arms[0]["plan"])}
    queued = study_runs.put(
        server, text, title, study.hash, arms, how, arms[0]["plan"]["sites"], plan_content(text, path.parent)
    )
    for note in notes:
        line(f"note     {note}")
    labels = ", ".join(dict.fromkeys(arm["label"] for arm in arms))
    line(f"queued   {title}: {labels}; {len(arms)} runs of {study.rounds} rounds over {', '.join(sites)}")
    if not shape:
        hint(
            "first    the sites are surveyed for the shape of an example; a person at each site approves the study once"
        )
    return queued


def export_study(server: ServerFolder, title: str, study: Mapping[str, Any], out: Path) -> list[str]:
    """Write the run folder of a study and return the arms that are not finished."""
    from polyclinic.studies.config import study_config
    from polyclinic.studies.config.loader import plan_content
    from polyclinic.studies.run import deployment

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SetupError(f"{out} exists and is not empty: name a new folder")
    path, queue = server.path / "studies" / title / "study.toml", Queue(server)
    entries = {run: queue.get(run) for run in study["runs"]}
    arms = {
        run: {**arm, "plan": e.what.plan if (e := entries[run]) else arm["plan"]} for run, arm in study["runs"].items()
    }
    done = {run: server.run(run) for run, e in entries.items() if e and e.state == FINISHED}
    if not done:
        raise SetupError(f"no run of {title} has finished yet: `polyclinic server status` shows the progress")
    survey = study_runs.survey_of(server, title)
    text = path.read_text(encoding="utf-8")
    plan = plan_content(text, path.parent)
    missing = deployment.collect(study_config.read(path), text, title, arms, survey, done, out, plan)
    if missing:
        line(f"missing  {', '.join(missing)}: not finished; export again into another folder when they are")
    line(f"exported {title} to {out}")
    hint(f"next     polyclinic report {out}")
    return missing


def line_of(queue: Queue, run: str, entry: Any) -> str:
    """Return the progress of a run in one line."""
    status = queue.progress(run)
    progress = f"round {status['round']} of {status['rounds']}" if status else "not started"
    why = entry.why or "; ".join(f"{site}: {reason}" for site, reason in status.get("waiting", {}).items())
    if entry.state == FINISHED and why.startswith("without "):
        why = f"finished {why}"
    text = f"run      {run:24} {entry.state:10} {progress:18} {why}".rstrip()
    return f"{text}{REHEARSED if entry.what.rehearsal else ''}"


def wait_for(server: ServerFolder, queued: Sequence[str], title: str = "") -> dict[str, str]:
    """Wait until runs have ended, or all runs of the study ``title``; print their progress and return their states.

    Raises:
        SetupError: If the study stopped, or a run did not finish.
    """
    queue, before, runs = Queue(server), dict[str, str](), list(queued)
    while True:
        study = study_runs.all_of(server).get(title) if title else None
        if study:
            runs = [*([study["survey"]] if study["survey"] else []), *study["runs"]]
            if study["state"] == study_runs.STOPPED:
                raise SetupError(f"{title} stopped: {study['why']}")
        entries = {run: entry for run in runs if (entry := queue.get(run))}
        for run, entry in entries.items():
            if (text := line_of(queue, run, entry)) != before.get(run):
                hint(text)
                before[run] = text
        if len(entries) == len(runs) and all(entry.state in OVER for entry in entries.values()):
            if bad := [f"{run} {e.state}: {e.why}" for run, e in entries.items() if e.state != FINISHED]:
                raise SetupError("\n".join(bad))
            return {run: entry.state for run, entry in entries.items()}
        time.sleep(0.5)
