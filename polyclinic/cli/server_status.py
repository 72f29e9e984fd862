"""``polyclinic server status``: the state of the server, its sites, studies and runs."""

from typing import Any

from polyclinic.cli.queue import line_of
from polyclinic.cli.rendering import document, line
from polyclinic.engines.flare.protocol.paths import ServerFolder
from polyclinic.engines.flare.server import study_runs
from polyclinic.engines.flare.server.job_queue import ACTIVE, OVER, Queue
from polyclinic.engines.flare.server.server_status import read


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
