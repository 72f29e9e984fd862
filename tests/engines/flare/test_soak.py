"""Two hundred rounds at five sites while something breaks every few rounds: the bits, the journals, the memory.

All five sites must answer every round, so whatever breaks costs time and no bit. POLYCLINIC_SOAK_ROUNDS makes it shorter
or longer, POLYCLINIC_SOAK_EVERY the faults rarer; what breaks, and when, follows from these alone.
"""

import os
import random
import re
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from polyclinic.core.audit_log import verify
from polyclinic.engines.flare import flare_processes
from polyclinic.engines.flare.server import server_setup
from polyclinic.engines.flare.server.job_queue import OVER, Queue
from polyclinic.testing import equal
from tests.conftest import little_sites
from tests.support.flare_deployment import KINDS, Hospitals, reference, study, until

pytestmark = [pytest.mark.deploy, pytest.mark.slow]
ROUNDS = int(os.environ.get("POLYCLINIC_SOAK_ROUNDS", "200"))
EVERY = int(os.environ.get("POLYCLINIC_SOAK_EVERY", "12"))  # rounds from one fault to the next
FULL = 90.0  # seconds until a process has all that it will hold
FAULTS = ("training", "training", "site job", "site parent", "whole site", "server job", "whole server")


@pytest.fixture
def five(tmp_path: Path) -> Iterator[Hospitals]:
    with Hospitals(tmp_path / "five", count=5) as made:
        yield made


def break_something(house: Hospitals, what: str, site: str) -> None:
    match what:
        case "whole site":
            house.power_cut(site)
            house.start_site(site)
        case "whole server":
            house.power_cut()
            house.command("server", "start", "--background", home=house.server.path)
        case "server job":
            house.kill(what)
        case _:
            house.kill(what, site)


def processes_of(house: Hospitals) -> Iterator[tuple[str, int]]:
    """Every process of these hospitals, and of which kind it is."""
    for pid in flare_processes.working_in(house.root):
        with suppress(OSError):
            line = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
            for kind, word in KINDS.items():
                if re.search(word, line):
                    yield kind, pid


def megabytes(pid: int) -> float:
    """Memory of a process that is its own, not shared with files."""
    with suppress(OSError):
        found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
        return int(found[1]) / 1024 if found else 0.0
    return 0.0


def test_many_rounds_while_things_break(five: Hospitals) -> None:
    rng, run, queue = random.Random(ROUNDS), "soak", Queue(five.server)
    an = five.order(study(run, rounds=ROUNDS, sites=tuple(five.homes), min_replies=5, score_every=10))
    # Each fault strikes in the middle of its round: a site is held there until it has happened.
    rounds = range(EVERY // 2, ROUNDS, EVERY)
    faults = [fault for _ in rounds for fault in rng.sample(FAULTS, len(FAULTS))]  # each in its turn, in some order
    coming = [(r, fault, rng.choice(sorted(five.homes))) for r, fault in zip(rounds, faults, strict=False)]
    for round, _, site in coming:
        five.hold(round, site)
    broken: list[tuple[int, str, str]] = []
    used: dict[tuple[str, int, str], list[tuple[float, int, float]]] = defaultdict(list)
    end = time.monotonic() + 60 * ROUNDS + 900
    while (entry := queue.get(run)) is not None and entry.state not in OVER:
        assert time.monotonic() < end, five.tell(run)
        done = queue.progress(run).get("round", 0)
        for kind, pid in processes_of(five):
            used[kind, pid, flare_processes.birth(pid)].append((time.monotonic(), done, megabytes(pid)))
        if coming and (five.faults / f"held-{coming[0][2]}-{coming[0][0]}").exists():
            round, what, site = coming.pop(0)
            broken.append((round, what, site))
            break_something(five, what, site)
            (five.faults / f"hold-{site}-{round}").unlink()
        time.sleep(1.0)
    five.finished(run)
    print(f"{ROUNDS} rounds, {len(broken)} faults, {five.attempts(run)} attempts: {broken}")
    state, memory = reference(an, little_sites(count=5))
    assert equal(state, five.state(run))
    for site, kept in memory.items():
        assert equal(kept, five.memory(run, site)), site
    five.journals_hold()
    assert not coming
    checkpoints = [e["round"] for e in verify(five.server.run(run) / "journal.jsonl") if e["event"] == "checkpoint"]
    assert sorted(set(checkpoints)) == list(range(1, ROUNDS + 1))
    for (kind, pid, _), samples in used.items():
        # Libraries are loaded, and FLARE keeps a thread for a minute for every message that came: only then is it flat.
        seen = [(at, mb) for when, at, mb in samples if when > samples[0][0] + FULL]
        if not seen or seen[-1][0] - seen[0][0] < 20:
            continue  # it did not live long enough to tell
        middle = (seen[0][0] + seen[-1][0]) / 2
        early, late = max(mb for at, mb in seen if at <= middle), max(mb for at, mb in seen if at > middle)
        print(f"{kind:14} {pid:8} rounds {seen[0][0]} to {seen[-1][0]}: {early:.0f} MB, then {late:.0f} MB")
        assert late <= 1.1 * early + 20, f"{kind} {pid} grew from {early:.0f} to {late:.0f} MB"
    until(lambda: server_setup.is_up(five.server), "the server to be there")
