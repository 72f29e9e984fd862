"""State of a server, read from the files that its processes write. Requires no PyTorch."""

import time
from typing import Any

from polyclinic.engines.flare import flare_processes
from polyclinic.engines.flare.protocol.paths import ServerFolder
from polyclinic.engines.flare.server import server_setup, study_runs
from polyclinic.engines.flare.server.job_queue import Queue

SILENT_AFTER = 120.0
"""Seconds without a status after which a supervisor counts as not responding; it may wait 40 s for FLARE."""


def read(home: ServerFolder) -> dict[str, Any]:
    """Return the state of the server, its sites, studies and runs."""
    given, queue = server_setup.settings(home), Queue(home)
    state, well = state_of(home)
    return {
        "project": given["project"],
        "host": given["host"],
        "port": given["port"],
        "state": state,
        "well": well,
        "sites": sites_of(home, well),
        "studies": study_runs.all_of(home),
        "runs": {run: run_of(queue.progress(run), entry) for run, entry in queue.all().items()},
    }


def state_of(home: ServerFolder) -> tuple[str, bool]:
    """Return the state of the server in words, and whether it runs and responds."""
    up, last = server_setup.is_up(home), server_setup.status(home)
    responds = up and time.time() - float(last.get("beat", 0.0)) < SILENT_AFTER
    return "not running" if not up else last["state"] if responds else "does not respond", responds


def sites_of(home: ServerFolder, responds: bool) -> dict[str, dict[str, Any]]:
    """Return for each admitted site whether it is connected and revoked, and when its certificate ends."""
    connected = server_setup.status(home)["sites"] if responds else {}
    return {
        site: {"connected": site in connected, "revoked": entry["revoked"], "expires": entry["expires"]}
        for site, entry in server_setup.sites(home).items()
    }


def run_of(progress: dict[str, Any], entry: Any) -> dict[str, Any]:
    """Return the state of a run: of its entry in the queue, and of the process that works on it."""
    alive = bool(progress) and flare_processes.alive(progress["pid"], progress.get("birth", ""))
    known = ("round", "rounds", "waiting", "trained", "asked", "lost", "missing", "contributed")
    facts = {key: progress[key] for key in known if key in progress}
    return {"state": entry.state, "why": entry.why, "attempt": entry.attempt, "working": alive, **facts}
