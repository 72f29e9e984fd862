"""Status of a site, read from files that its processes write, and therefore correct after a process was killed.

``status.json`` is written by the site's supervisor, ``connection.json`` by FLARE's parent process,
``memory/<run>/status.json`` by a job process. Each names its process or contains a time that shows its age. Requires no
PyTorch.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from polyclinic.engines import step_file
from polyclinic.engines.flare import flare_processes
from polyclinic.engines.flare.client import site_setup
from polyclinic.engines.flare.client.reviews import WAITING, Reviews
from polyclinic.engines.flare.protocol.paths import SetupError, SiteFolder, read_json

SILENT_AFTER = 60.0
"""Seconds without a message from the server after which it counts as unreachable; FLARE sends one every ten."""


def read(home: SiteFolder) -> dict[str, Any]:
    """Return the status of the site in ``home``: ``well``, ``running``, ``server``, ``doing``, ``problems``,
    ``waiting``.

    Raises:
        SetupError: If the folder is not a site.
    """
    given = site_setup.settings(home)
    up = site_setup.is_up(home)
    connection = server(home, up) if "project" in given else {"state": "not joined"}
    doing, problems = runs(home)
    waiting = [review.what.run for review in Reviews(home.reviews).all() if review.state == WAITING]
    left_over = [] if up else flare_processes.working_in(home.kit)
    problems += [{"run": "", "problem": problem, "since": 0.0} for problem in keeper_problems(home, up)]
    return {
        "site": given["site"],
        "running": up,
        "processes_without_keeper": len(left_over),
        "server": connection,
        "doing": doing,
        "problems": problems,
        "waiting": waiting,
        "well": up and connection["state"] == "connected" and not problems,
    }


def server(home: SiteFolder, up: bool) -> dict[str, Any]:
    """Return whether the server can be reached, and whether it admits this site."""
    last = read_json(home.path / "connection.json", default={"heard": 0.0, "refused": ""})
    heard, started = float(last["heard"]), float(site_setup.status(home).get("started", 0.0))
    age = time.time() - heard
    if not up:
        state = "not connected"
    elif last["refused"]:
        state = "refused"
    elif 0 <= age < SILENT_AFTER:
        state = "connected"
    else:
        state = "connecting" if time.time() - started < SILENT_AFTER else "unreachable"
    return {"state": state, "heard": heard, "refused": last["refused"]}


def runs(home: SiteFolder) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the current work and the problems of each run."""
    doing, problems = list[dict[str, Any]](), list[dict[str, Any]]()
    for path in sorted((home.path / "memory").glob("*/status.json")):
        try:
            status = read_json(path)
            if status["doing"] and flare_processes.alive(status["pid"], status["birth"]):
                doing.append({"run": path.parent.name, **status["doing"], **_steps(path.parent, status["doing"])})
            if status["problem"] and not (path.parent / "ended").exists():
                problems.append({"run": path.parent.name, "problem": status["problem"], "since": status["since"]})
        except (SetupError, OSError, KeyError, TypeError):
            problems.append({"run": path.parent.name, "problem": f"{path} cannot be read", "since": 0.0})
    return doing, problems


def _steps(folder: Path, doing: dict[str, Any]) -> dict[str, int]:
    """Return ``done`` of ``total`` minibatches of the current work, if it has taken more than a second of training."""
    for steps in step_file.read(folder):
        if (steps["round"], steps["job"]) == (doing["round"], doing["job"]) and steps["total"] > 0:
            return {"done": steps["done"], "total": steps["total"]}
    return {}


def keeper_problems(home: SiteFolder, up: bool) -> Iterator[str]:
    """Yield problems of FLARE's process and of the site's supervisor."""
    last = site_setup.status(home)
    if up and time.time() - float(last.get("beat", 0.0)) > SILENT_AFTER:
        yield "its supervisor does not respond: polyclinic site stop, and start"
    if up and int(last.get("crashes", 0)) > 2:
        yield f"FLARE's process ended {last['crashes']} times in a row: see site.log"


class Conditions:
    """What people at a site are notified of: studies that wait for a decision, and problems that last."""

    def __init__(self, home: SiteFolder) -> None:
        self.home = home
        self._stamp: tuple[tuple[str, int], ...] | None = None
        self._waiting: dict[str, str] = {}

    def now(self) -> dict[str, str]:
        """Return a text for each condition, by a key that stays the same as long as it lasts."""
        given = site_setup.settings(self.home)
        site, found = given["site"], dict(self._waits(given["site"]))
        if "project" in given and server(self.home, True)["state"] in ("refused", "unreachable"):
            why = server(self.home, True)["refused"] or "no message for a minute"
            found["server"] = f"{site} is not connected to the server: {why}. polyclinic site diagnose says what to do."
        for problem in runs(self.home)[1]:
            key, about = f"problem {problem['run']}", f"{site}: {problem['run']}: {problem['problem']}"
            found[key] = f"{about}. polyclinic site status shows more."
        return found

    def _waits(self, site: str) -> dict[str, str]:
        """Return the studies that wait; the reviews are read again only if a file has changed."""
        paths = sorted(self.home.reviews.glob("*.json"))
        stamp = tuple((path.name, path.stat().st_mtime_ns) for path in paths)
        if stamp != self._stamp:
            self._stamp, self._waiting = stamp, {}
            for review in Reviews(self.home.reviews).all():
                if review.state == WAITING:
                    name = review.what.study.get("name") or review.what.run
                    self._waiting[f"waits {review.group}"] = (
                        f"The study {name} waits for a decision at {site} (request {review.what.hash[:16]}): "
                        f"polyclinic site review {name}"
                    )
        return self._waiting


def ago(then: float) -> str:
    """Return the time since ``then`` in words."""
    seconds = max(0.0, time.time() - then)
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
