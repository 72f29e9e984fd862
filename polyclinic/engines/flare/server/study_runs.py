"""Studies between hospitals: a survey of the sites' data, then one run for each method and seed.

```
studies/<name>/
  study.toml    the study file, unchanged
  run-plan.toml the plan that it names, from which the study is read again
  study.json    its method runs, their common fields, and the names of the queued runs
```

The supervisor calls ``advance``. Once the survey is complete the plans can be completed, because a study file does not
state the shape of an example. People at the sites review and approve all runs as one study.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyclinic.core.atomic import write_private
from polyclinic.engines.flare.protocol.paths import ServerFolder, SetupError, name, private_folder, read_json
from polyclinic.engines.flare.protocol.run_request import (
    OF_DATA,
    PLACEHOLDER,
    InvalidRunRequest,
    RunRequest,
    survey_plan,
)
from polyclinic.engines.flare.protocol.shared_journals import SharedJournal
from polyclinic.engines.flare.server import server_setup
from polyclinic.engines.flare.server.job_queue import FINISHED, OVER, Queue

SURVEY, QUEUED, STOPPED = "survey", "queued", "stopped"


def put(
    home: ServerFolder,
    text: str,
    title: str,
    hash: str,
    arms: Sequence[Mapping[str, Any]],
    how: Mapping[str, Any],
    sites: Sequence[str],
    plan: bytes | None = None,
) -> list[str]:
    """Add a study and queue its survey, or its method runs directly if their plans state the shape of an example.

    Args:
        text: The study file. ``title``: name of the study. ``hash``: of everything a result depends on.
        arms: The method runs, each with ``label``, ``seed``, ``plan``, and ``external``, the sites that are only
            scored.
        how: The fields of a run request that all of them share.
        sites: The sites that train.
        plan: The plan that the study names, if any.

    Returns:
        The names of the runs that were queued.

    Raises:
        SetupError: If a study of this name exists, or a site may not join.
        InvalidRunRequest: If a method run cannot be built.
    """
    folder = home.path / "studies" / name(title, "a study's name")
    if (folder / "study.json").exists():
        raise SetupError(f"a study named {title!r} already exists: give this one another name with --name")
    listed = [{"label": arm["label"], "plan": dict(arm["plan"]), "external": list(arm["external"])} for arm in arms]
    common = {**how, "study": {"name": title, "hash": hash, "arms": listed}}
    known = all(key in arm["plan"] for arm in arms for key in OF_DATA)
    runs = {_run(title, hash, i, arm): dict(arm) for i, arm in enumerate(arms)}
    survey = f"{title[:40]}-{hash[:6]}-survey"
    table: dict[str, Any] = {"how": common, "runs": runs, "survey": "" if known else survey, "why": ""}
    table["state"] = QUEUED if known else SURVEY
    if known:
        _check([_order(run, arm, arm["plan"], common) for run, arm in runs.items()])
        queued = [server_setup.order(home, an).run for an in _orders(table, {})]
    else:
        _check([_order(run, arm, {**PLACEHOLDER, **arm["plan"]}, common) for run, arm in runs.items()])
        outside = sorted({site for arm in arms for site in arm["external"]})
        fields = {**common, "mode": "survey", "external": outside}
        queued = [server_setup.order(home, _from_table(survey, survey_plan(sites), fields)).run]
    private_folder(folder)
    write_private(folder / "study.toml", text)
    if plan is not None:
        write_private(folder / "run-plan.toml", plan)
    write_private(folder / "study.json", json.dumps(table, indent=1))
    return queued


def advance(home: ServerFolder) -> None:
    """Queue the method runs of every study whose survey is complete."""
    for title, table in all_of(home).items():
        if table["state"] != SURVEY:
            continue
        entry = Queue(home).get(table["survey"])
        if entry is None or entry.state not in OVER:
            continue
        try:
            if entry.state != FINISHED:
                raise SetupError(f"its survey {entry.state}: {entry.why}")
            for an in _orders(table, survey_of(home, title)):
                if Queue(home).get(an.run) is None:  # a crash may have occurred between two of them
                    server_setup.order(home, an)
            table |= {"state": QUEUED}
        except (SetupError, InvalidRunRequest, ValueError) as error:
            table |= {"state": STOPPED, "why": str(error)}
            SharedJournal(home.path / "journal.jsonl").write("study stopped", {"study": title, "why": str(error)})
        write_private(home.path / "studies" / title / "study.json", json.dumps(table, indent=1))


def all_of(home: ServerFolder) -> dict[str, dict[str, Any]]:
    """Return every study, by name."""
    return {path.parent.name: read_json(path) for path in sorted((home.path / "studies").glob("*/study.json"))}


def survey_of(home: ServerFolder, title: str) -> dict[str, Any]:
    """Return the sites' data descriptions; empty if there was no survey or it is not complete."""
    table = all_of(home).get(title, {})
    path = home.run(table["survey"]) / "survey.json" if table.get("survey") else Path()
    descriptions: dict[str, Any] = read_json(path, default={}) if table.get("survey") else {}
    return descriptions


def _orders(table: Mapping[str, Any], descriptions: Mapping[str, Any]) -> list[RunRequest]:
    """Return the run requests of all method runs, given the sites' data descriptions from the survey."""
    from polyclinic.engines.site_description import shape_of

    shape: dict[str, Any] = {}
    if descriptions:
        inputs, outputs, _ = shape_of(descriptions)
        shape = {"inputs": inputs, "outputs": outputs}
    elif table["survey"]:
        raise SetupError("no site described its data")
    return [_order(run, arm, {**shape, **arm["plan"]}, table["how"]) for run, arm in table["runs"].items()]


def _order(run: str, arm: Mapping[str, Any], plan: Mapping[str, Any], how: Mapping[str, Any]) -> RunRequest:
    return _from_table(run, plan, {**how, "label": arm["label"], "external": arm["external"]})


def _from_table(run: str, plan: Mapping[str, Any], fields: Mapping[str, Any]) -> RunRequest:
    return RunRequest.from_json(json.dumps({**fields, "run": run, "plan": dict(plan)}))


def _check(orders: Sequence[RunRequest]) -> None:
    for an in orders:
        try:
            server_setup.check_buildable(an.build_plan())
        except (TypeError, ValueError) as error:
            raise InvalidRunRequest(f"{an.label}: {error}") from None


def _run(title: str, hash: str, index: int, arm: Mapping[str, Any]) -> str:
    """Return the name of a run: study, method and seed."""
    label = re.sub(r"[^a-z0-9-]", "-", arm["label"])
    return f"{title[:24]}-{hash[:6]}-{index + 1}-{label[:20]}-{arm['seed']}"[:63].strip("-")
