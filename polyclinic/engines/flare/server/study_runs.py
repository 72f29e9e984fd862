"""A study between hospitals: first a survey of what the sites' data are, then one run for each method and seed.

```
studies/<name>/
  study.toml    the study file, unchanged
  study.json    its arms, what they are to be run like, and which runs they became
```

The supervisor calls ``advance``: when the survey is in, the arms are complete, for a study file does not say what shape
an example has. All of it is one study before the people at the sites, who approve it once.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyclinic.engines.flare.protocol.paths import (
    ServerFolder,
    SetupError,
    name,
    private_folder,
    read_json,
    write_private,
)
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
) -> list[str]:
    """Takes up a study, and puts its survey into the queue; or its arms, where they say what an example is.

    Args:
        text: The study file. ``title``: what the study is called, and ``hash``: of everything a result depends on.
        arms: Each with ``label``, ``seed``, ``plan``, and ``external``, the sites that are only scored.
        how: The fields of an order that all of them share.
        sites: Those that train.

    Returns:
        The names of the runs that were queued.

    Raises:
        SetupError: Where there is such a study, or a site may not join.
        InvalidRunRequest: Where an arm cannot be built.
    """
    folder = home.path / "studies" / name(title, "a study's name")
    if (folder / "study.json").exists():
        raise SetupError(f"there is a study called {title!r} already: give this one another name with --name")
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
        asks = {**common, "mode": "survey", "external": outside}
        queued = [server_setup.order(home, _from_table(survey, survey_plan(sites), asks)).run]
    private_folder(folder)
    write_private(folder / "study.toml", text)
    write_private(folder / "study.json", json.dumps(table, indent=1))
    return queued


def advance(home: ServerFolder) -> None:
    """Queues the arms of every study whose survey is in."""
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
                if Queue(home).get(an.run) is None:  # a crash may have come between two of them
                    server_setup.order(home, an)
            table |= {"state": QUEUED}
        except (SetupError, InvalidRunRequest, ValueError) as error:
            table |= {"state": STOPPED, "why": str(error)}
            SharedJournal(home.path / "journal.jsonl").write("study stopped", {"study": title, "why": str(error)})
        write_private(home.path / "studies" / title / "study.json", json.dumps(table, indent=1))


def all_of(home: ServerFolder) -> dict[str, dict[str, Any]]:
    """Every study, by name."""
    return {path.parent.name: read_json(path) for path in sorted((home.path / "studies").glob("*/study.json"))}


def survey_of(home: ServerFolder, title: str) -> dict[str, Any]:
    """What the sites said of their data; empty where nobody was asked, or nothing came yet."""
    table = all_of(home).get(title, {})
    path = home.run(table["survey"]) / "survey.json" if table.get("survey") else Path()
    found: dict[str, Any] = read_json(path, default={}) if table.get("survey") else {}
    return found


def _orders(table: Mapping[str, Any], said: Mapping[str, Any]) -> list[RunRequest]:
    """The orders of all arms, once ``said`` by the sites is what an example is."""
    from polyclinic.engines.site_description import shape_of

    shape: dict[str, Any] = {}
    if said:
        inputs, outputs, _ = shape_of(said)
        shape = {"inputs": inputs, "outputs": outputs}
    elif table["survey"]:
        raise SetupError("no site said what its data are")
    return [_order(run, arm, {**shape, **arm["plan"]}, table["how"]) for run, arm in table["runs"].items()]


def _order(run: str, arm: Mapping[str, Any], plan: Mapping[str, Any], how: Mapping[str, Any]) -> RunRequest:
    return _from_table(run, plan, {**how, "label": arm["label"], "external": arm["external"]})


def _from_table(run: str, plan: Mapping[str, Any], fields: Mapping[str, Any]) -> RunRequest:
    return RunRequest.from_json(json.dumps({**fields, "run": run, "plan": dict(plan)}))


def _check(orders: Sequence[RunRequest]) -> None:
    for an in orders:
        try:
            an.build_plan().build_method()
        except (TypeError, ValueError) as error:
            raise InvalidRunRequest(f"{an.label}: {error}") from None


def _run(title: str, hash: str, index: int, arm: Mapping[str, Any]) -> str:
    """The name of an arm's run: which study, which method, which seed."""
    label = re.sub(r"[^a-z0-9-]", "-", arm["label"])
    return f"{title[:24]}-{hash[:6]}-{index + 1}-{label[:20]}-{arm['seed']}"[:63].strip("-")
