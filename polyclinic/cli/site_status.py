"""``polyclinic site status``: the state of a site, and waiting for a study to arrive."""

import time
from collections.abc import Callable
from typing import Any

from polyclinic.cli.rendering import document, hint, line
from polyclinic.engines.flare.client import agent_status, proxies, site_setup
from polyclinic.engines.flare.client.agent_status import ago
from polyclinic.engines.flare.client.reviews import Reviews
from polyclinic.engines.flare.client.run_memory import RunMemory
from polyclinic.engines.flare.protocol.paths import SetupError, SiteFolder
from polyclinic.engines.flare.protocol.shared_journals import SharedJournal

DEAD_AFTER = 5.0
"""Seconds for which a site may be down, as during a restart by a service manager, before waiting ends."""


def show(home: SiteFolder, as_json: bool) -> None:
    """Print the state of the site.

    Raises:
        SystemExit: With JSON, if the site does not run, is not connected or has a problem.
    """
    found = agent_status.read(home)
    with document(as_json) as emit:
        emit(found)
        _show(home, found)
    if as_json and not found["well"]:
        raise SystemExit(1)


def _show(home: SiteFolder, found: dict[str, Any]) -> None:
    given = site_setup.settings(home)
    line(f"site     {found['site']} {_running(found)}")
    if "project" in given:
        way = f" through {proxy}" if (proxy := proxies.of(given)) else ""
        where = f"{given['project']} at {given['host']}:{given['port']}{way}"
        line(f"server   {where}: {_server(found['server'])}; certificate until {given['expires'][:10]}")
        line(f"data     {given['data']}")
    else:
        line("server   not joined yet")
    for one in found["doing"]:
        steps = f", minibatch {one['done']} of {one['total']}" if "total" in one else ""
        line(f"working  {one['run']}: {one['job']} of round {one['round']}, started {ago(one['since'])}{steps}")
    for one in found["problems"]:
        since = f" ({ago(one['since'])})" if one["since"] else ""
        line(f"problem  {one['run'] + ': ' if one['run'] else ''}{one['problem']}{since}")
    for review in Reviews(home.reviews).all():
        memory = RunMemory(home.memory(review.what.run)).chain
        last = memory.links[-1] if memory.links else None
        did = f"answered message {last.number} of round {last.round + 1}" if last else ""
        line(f"study    {review.what.run:24} {review.state:10} {did}".rstrip())
        for text in review.data.splitlines():
            line(f"         ! {text}")
    if found["waiting"]:
        line(f"next     {len(found['waiting'])} waiting for a decision: polyclinic site review")
    elif found["problems"]:
        line("next     polyclinic site diagnose")
    line(f"journal  {SharedJournal(home.journal).head[:16]}")


def _running(found: dict[str, Any]) -> str:
    if found["running"]:
        return "runs" if found["well"] else "runs, with problems"
    if count := found["processes_without_keeper"]:
        return f"lost its supervisor, and {count} of its processes still run: polyclinic site start takes them over"
    return "does not run: polyclinic site start"


def _server(server: dict[str, Any]) -> str:
    heard = f"last message {ago(server['heard'])}" if server["heard"] else "no message yet"
    match server["state"]:
        case "connected":
            return f"connected, {heard}"
        case "refused":
            return f"REFUSES this site ({server['refused']}), {heard}: ask the coordinator"
        case "unreachable":
            return f"NOT REACHABLE, {heard}: polyclinic site diagnose"
        case state:
            return f"{state}, {heard}"


def wait_for(home: SiteFolder, run: str, come: Callable[[], Any]) -> None:
    """Wait until ``come`` returns something, and print the state of the connection and problems meanwhile.

    Raises:
        SetupError: If the site does not run, so that nothing can arrive.
    """
    what, before, down = f"the study {run!r}" if run else "a study", "", 0.0
    while not come():
        found = agent_status.read(home)
        down = 0.0 if found["running"] else down or time.monotonic()
        if down and time.monotonic() - down > DEAD_AFTER:
            raise SetupError(f"{found['site']} does not run, so {what} cannot arrive: polyclinic site start")
        state = _server(found["server"]).partition(",")[0]
        problems = "; ".join(f"{one['run']}: {one['problem']}" for one in found["problems"])
        text = f"waiting  for {what}; the server is {state}{f'; {problems}' if problems else ''}"
        if text != before:
            hint(text)
            before = text
        time.sleep(0.5)
