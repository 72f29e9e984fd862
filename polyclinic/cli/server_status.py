"""What ``polyclinic server status`` shows."""

import json
import time
from typing import Any

from polyclinic.cli.queue import line_of
from polyclinic.engines.flare import flare_processes
from polyclinic.engines.flare.protocol.paths import ServerFolder
from polyclinic.engines.flare.server import server_setup, study_runs
from polyclinic.engines.flare.server.job_queue import ACTIVE, OVER, Queue

SILENT_AFTER = 120.0
"""Seconds after which a supervisor that has written nothing does not respond; it may wait 40 s for FLARE."""


def read(home: ServerFolder) -> dict[str, Any]:
    """How the server is, its sites, its studies and its runs, from the files that their processes write."""
    given, said, queue = server_setup.settings(home), server_setup.status(home), Queue(home)
    up = server_setup.is_up(home)
    responds = up and time.time() - float(said.get("beat", 0.0)) < SILENT_AFTER
    sites = {
        site: {
            "connected": responds and site in said["sites"],
            "revoked": entry["revoked"],
            "expires": entry["expires"],
        }
        for site, entry in server_setup.sites(home).items()
    }
    state = "not running" if not up else said["state"] if responds else "does not respond"
    return {
        "project": given["project"],
        "host": given["host"],
        "port": given["port"],
        "state": state,
        "well": responds,
        "sites": sites,
        "studies": study_runs.all_of(home),
        "runs": {run: _run(queue.progress(run), entry) for run, entry in queue.all().items()},
    }


def _run(progress: dict[str, Any], entry: Any) -> dict[str, Any]:
    alive = bool(progress) and flare_processes.alive(progress["pid"], progress.get("birth", ""))
    known = ("round", "rounds", "waiting", "trained", "asked", "lost", "missing", "contributed")
    facts = {key: progress[key] for key in known if key in progress}
    return {"state": entry.state, "why": entry.why, "attempt": entry.attempt, "working": alive, **facts}


def show(home: ServerFolder, as_json: bool) -> None:
    """Prints it.

    Raises:
        SystemExit: With JSON, if the server does not run or does not respond.
    """
    found = read(home)
    if as_json:
        print(json.dumps({k: v for k, v in found.items() if k != "studies"}, indent=1))
        if not found["well"]:
            raise SystemExit(1)
        return
    print(f"server   {found['project']} at {found['host']}:{found['port']} is {found['state']}")
    seen = ", ".join(site for site, one in found["sites"].items() if one["connected"]) or "none"
    out = [site for site, one in found["sites"].items() if one["revoked"]]
    without = f"; revoked: {', '.join(out)}" if out else ""
    print(f"sites    {seen} connected, of {len(found['sites'])} admitted{without}")
    for title, study in found["studies"].items():
        over = sum(run in found["runs"] and found["runs"][run]["state"] in OVER for run in study["runs"])
        told = {
            study_runs.SURVEY: "asks the sites what their data are",
            study_runs.QUEUED: f"{over} of {len(study['runs'])} runs are over",
            study_runs.STOPPED: f"stopped: {study['why']}",
        }
        print(f"study    {title:24} {told[study['state']]}")
    queue = Queue(home)
    for run, entry in queue.all().items():
        print(line_of(queue, run, entry))
        for line in _about(found["runs"][run]):
            print(f"         {line}")


def _about(run: dict[str, Any]) -> list[str]:
    """Who took part in a run's last round, and who did not."""
    lines = []
    if run["state"] == ACTIVE and not run["working"]:
        lines.append("its process is gone; the supervisor begins another attempt, if it runs")
    if run.get("asked"):
        lines.append(f"{len(run['trained'])} of {len(run['asked'])} sites that were asked took part in the last round")
    gone = {**run.get("missing", {}), **run.get("lost", {})}
    return [*lines, *(f"without {site}: {reason}" for site, reason in sorted(gone.items()))]
