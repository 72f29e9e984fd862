"""How a site is, from files that its processes write: it stays true when a process was killed.

``status.json`` is the keeper's, ``connection.json`` FLARE's parent process's, ``memory/<run>/status.json`` a job
process's. Each names its process, or holds a time that grows old. Nothing here needs PyTorch.
"""

import time
from collections.abc import Iterator
from typing import Any

from polyclinic.engines.flare import flare_processes
from polyclinic.engines.flare.client import site_setup
from polyclinic.engines.flare.client.reviews import WAITING, Reviews
from polyclinic.engines.flare.protocol.paths import SetupError, SiteFolder, read_json

SILENT_AFTER = 60.0
"""Seconds without a word from the server after which it counts as unreachable; FLARE asks every ten."""


def read(home: SiteFolder) -> dict[str, Any]:
    """How the site in ``home`` is: ``well``, ``running``, ``server``, ``doing``, ``problems``, ``waiting``.

    Raises:
        SetupError: If the folder is not a site.
    """
    given = site_setup.settings(home)
    up = site_setup.is_up(home)
    server = _server(home, up) if "project" in given else {"state": "not joined"}
    doing, problems = _runs(home)
    waiting = [review.what.run for review in Reviews(home.reviews).all() if review.state == WAITING]
    left_over = [] if up else flare_processes.working_in(home.kit)
    problems += [{"run": "", "problem": problem, "since": 0.0} for problem in _keeper_problems(home, up)]
    return {
        "site": given["site"],
        "running": up,
        "processes_without_keeper": len(left_over),
        "server": server,
        "doing": doing,
        "problems": problems,
        "waiting": waiting,
        "well": up and server["state"] == "connected" and not problems,
    }


def _server(home: SiteFolder, up: bool) -> dict[str, Any]:
    """Whether the server can be reached, and whether it lets this site take part."""
    said = read_json(home.path / "connection.json", default={"heard": 0.0, "refused": ""})
    heard, started = float(said["heard"]), float(site_setup.status(home).get("started", 0.0))
    age = time.time() - heard
    if not up:
        state = "not connected"
    elif said["refused"]:
        state = "refused"
    elif 0 <= age < SILENT_AFTER:
        state = "connected"
    else:
        state = "connecting" if time.time() - started < SILENT_AFTER else "unreachable"
    return {"state": state, "heard": heard, "refused": said["refused"]}


def _runs(home: SiteFolder) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What is being done, and what went wrong, by run."""
    doing, problems = list[dict[str, Any]](), list[dict[str, Any]]()
    for path in sorted((home.path / "memory").glob("*/status.json")):
        try:
            said = read_json(path)
            if said["doing"] and flare_processes.alive(said["pid"], said["birth"]):
                doing.append({"run": path.parent.name, **said["doing"]})
            if said["problem"] and not (path.parent / "ended").exists():
                problems.append({"run": path.parent.name, "problem": said["problem"], "since": said["since"]})
        except (SetupError, OSError, KeyError, TypeError):
            problems.append({"run": path.parent.name, "problem": f"{path} cannot be read", "since": 0.0})
    return doing, problems


def _keeper_problems(home: SiteFolder, up: bool) -> Iterator[str]:
    """What the keeper has noticed of FLARE's process, and whether it is alive itself."""
    said = site_setup.status(home)
    if up and time.time() - float(said.get("beat", 0.0)) > SILENT_AFTER:
        yield "its keeper does not respond: polyclinic site stop, and start"
    if up and int(said.get("crashes", 0)) > 2:
        yield f"FLARE's process ended {said['crashes']} times in a row: see site.log"


def ago(then: float) -> str:
    """How long ago ``then`` was, in words."""
    seconds = max(0.0, time.time() - then)
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
