"""``polyclinic server status``: the state of the server, its sites, studies and runs."""

import time
from typing import Any

from polyclinic.cli.queue import line_of
from polyclinic.cli.rendering import document, line
from polyclinic.engines.flare import flare_processes
from polyclinic.engines.flare.protocol.paths import ServerFolder
from polyclinic.engines.flare.server import server_setup, study_runs
from polyclinic.engines.flare.server.job_queue import ACTIVE, OVER, Queue

SILENT_AFTER = 120.0
"""Seconds without a status after which a supervisor counts as not responding; it may wait 40 s for FLARE."""


def read(home: ServerFolder) -> dict[str, Any]:
    """Return the state of the server, its sites, studies and runs, from the files that their processes write."""
    given, last, queue = server_setup.settings(home), server_setup.status(home), Queue(home)
    up = server_setup.is_up(home)
    responds = up and time.time() - float(last.get("beat", 0.0)) < SILENT_AFTER
    sites = {
        site: {
            "connected": responds and site in last["sites"],
            "revoked": entry["revoked"],
            "expires": entry["expires"],
        }
        for site, entry in server_setup.sites(home).items()
    }
    state = "not running" if not up else last["state"] if responds else "does not respond"
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
    """Print the state.

    Raises:
        SystemExit: With JSON, if the server does not run or does not respond.
    """
    found = read(home)
    with document(as_json) as emit:
        emit({k: v for k, v in found.items() if k != "studies"})
        line(f"server   {found['project']} at {found['host']}:{found['port']} is {found['state']}")
        connected = ", ".join(site for site, one in found["sites"].items() if one["connected"]) or "none"
        revoked = [site for site, one in found["sites"].items() if one["revoked"]]
        without = f"; revoked: {', '.join(revoked)}" if revoked else ""
        line(f"sites    connected: {connected}, of {len(found['sites'])} admitted{without}")
        for title, study in found["studies"].items():
            over = sum(run in found["runs"] and found["runs"][run]["state"] in OVER for run in study["runs"])
            states = {
                study_runs.SURVEY: "surveys the sites' data",
                study_runs.QUEUED: f"{over} of {len(study['runs'])} runs have ended",
                study_runs.STOPPED: f"stopped: {study['why']}",
            }
            line(f"study    {title:24} {states[study['state']]}")
        queue = Queue(home)
        for run, entry in queue.all().items():
            line(line_of(queue, run, entry))
            for text in _about(found["runs"][run]):
                line(f"         {text}")
    if as_json and not found["well"]:
        raise SystemExit(1)


def _about(run: dict[str, Any]) -> list[str]:
    """Return which sites took part in a run's last round, and which did not."""
    lines = []
    if run["state"] == ACTIVE and not run["working"]:
        lines.append("its process has ended; a running supervisor starts another attempt")
    if run.get("asked"):
        lines.append(f"{len(run['trained'])} of {len(run['asked'])} sites that were asked took part in the last round")
    absent = {**run.get("missing", {}), **run.get("lost", {})}
    return [*lines, *(f"without {site}: {reason}" for site, reason in sorted(absent.items()))]
