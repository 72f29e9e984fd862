"""What ``polyclinic site status`` shows, and waiting at a site for something to come."""

import json
import time
from collections.abc import Callable
from typing import Any

from polyclinic.engines.flare.client import agent_status, proxies, site_setup
from polyclinic.engines.flare.client.agent_status import ago
from polyclinic.engines.flare.client.reviews import Reviews
from polyclinic.engines.flare.client.run_memory import RunMemory
from polyclinic.engines.flare.protocol.paths import SetupError, SiteFolder
from polyclinic.engines.flare.protocol.shared_journals import SharedJournal

DEAD_AFTER = 5.0
"""Seconds for which a site may be down, as when a service restarts it, before nobody waits there any more."""


def show(home: SiteFolder, as_json: bool) -> None:
    """Prints how the site is.

    Raises:
        SystemExit: With JSON, if the site is not well.
    """
    found = agent_status.read(home)
    if as_json:
        print(json.dumps(found, indent=1))
        if not found["well"]:
            raise SystemExit(1)
        return
    given = site_setup.settings(home)
    print(f"site     {found['site']} {_running(found)}")
    if "project" in given:
        way = f" through {proxy}" if (proxy := proxies.of(given)) else ""
        where = f"{given['project']} at {given['host']}:{given['port']}{way}"
        print(f"server   {where}: {_server(found['server'])}; certificate until {given['expires'][:10]}")
        print(f"data     {given['data']}")
    else:
        print("server   not joined yet")
    for one in found["doing"]:
        print(f"working  {one['run']}: {one['job']} of round {one['round']}, begun {ago(one['since'])}")
    for one in found["problems"]:
        since = f" ({ago(one['since'])})" if one["since"] else ""
        print(f"problem  {one['run'] + ': ' if one['run'] else ''}{one['problem']}{since}")
    for review in Reviews(home.reviews).all():
        memory = RunMemory(home.memory(review.what.run)).chain
        last = memory.links[-1] if memory.links else None
        did = f"answered message {last.number} of round {last.round + 1}" if last else ""
        print(f"study    {review.what.run:24} {review.state:10} {did}".rstrip())
        for line in review.data.splitlines():
            print(f"         ! {line}")
    if found["waiting"]:
        print(f"next     {len(found['waiting'])} wait for a person: polyclinic site review")
    elif found["problems"]:
        print("next     polyclinic site diagnose")
    print(f"journal  {SharedJournal(home.journal).head[:16]}")


def _running(found: dict[str, Any]) -> str:
    if found["running"]:
        return "runs" if found["well"] else "runs, and is not well"
    if count := found["processes_without_keeper"]:
        return f"lost its keeper, and {count} of its processes go on: polyclinic site start takes over"
    return "does not run: polyclinic site start"


def _server(server: dict[str, Any]) -> str:
    heard = f"heard {ago(server['heard'])}" if server["heard"] else "never heard"
    match server["state"]:
        case "connected":
            return f"connected, {heard}"
        case "refused":
            return f"REFUSES this site ({server['refused']}), {heard}: ask the coordinator"
        case "unreachable":
            return f"NOT REACHED, {heard}: polyclinic site diagnose"
        case state:
            return f"{state}, {heard}"


def wait_for(home: SiteFolder, run: str, come: Callable[[], Any]) -> None:
    """Waits until what ``come`` looks for is there, and says meanwhile what is waited for and what goes wrong.

    Raises:
        SetupError: If the site does not run, so that nothing can come.
    """
    what, said, down = f"the study {run!r}" if run else "a study", "", 0.0
    while not come():
        found = agent_status.read(home)
        down = 0.0 if found["running"] else down or time.monotonic()
        if down and time.monotonic() - down > DEAD_AFTER:
            raise SetupError(f"{found['site']} does not run, so {what} cannot come here: polyclinic site start")
        state = _server(found["server"]).partition(",")[0]
        problems = "; ".join(f"{one['run']}: {one['problem']}" for one in found["problems"])
        line = f"waits    for {what} to come; the server is {state}{f'; {problems}' if problems else ''}"
        if line != said:
            print(line, flush=True)
            said = line
        time.sleep(0.5)
