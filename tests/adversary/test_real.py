"""The same guarantees with real processes, mutual TLS and NVIDIA FLARE. Few tests, because each takes a minute."""

import pytest

from polyclinic.engines.flare.server.job_queue import OVER, Queue
from tests.adversary.real import heard, listening, size_of, stranger, wish
from tests.support.flare_deployment import Hospitals, study, until

pytestmark = [pytest.mark.deploy, pytest.mark.slow]


def test_a_server_job_that_asks_for_more_than_its_schedule_hears_refusals(hospitals: Hospitals) -> None:
    """Two rounds were approved and trained. Then the server's own process asks for what was not."""
    requests = [
        ("score/train", 2, 0.0),
        ("score/train", 0, 0.0),
        ("predict/train", 2, 0.0),
        ("predict/val", 2, 0.0),
        ("score/val", 2, 0.0),
        ("train", 0, 0.1),
        ("train", 1, 0.1),
        ("train", 2, 0.0),
        ("train ", 0, 0.0),
        ("anything at all", 1, 0.0),
        ("describe", 0, 0.0),
    ]
    wish(hospitals, "hostile", requests)
    hospitals.order(study("hostile", "fedavg", rounds=2))
    hospitals.finished("hostile")
    said = heard(hospitals, "hostile")
    assert len(said) == len(requests) * 3
    left = [f"{one.job} in round {one.round} at {one.site}" for one in said if one.answered]
    assert not left, f"{len(left)} of {len(said)} requests beyond the schedule were answered: {', '.join(left)}"
    assert all(one.reason.startswith("refused") for one in said), said
    hospitals.journals_hold()


def test_no_other_process_of_the_machine_talks_through_a_sites_client(hospitals: Hospitals) -> None:
    """FLARE's client process listens on loopback for its own job processes only."""
    hospitals.order(study("listened", "fedavg", rounds=1))
    hospitals.finished("listened")
    pids = until(lambda: hospitals.pids("site parent", "site-0"), "the client's process")
    answers = []
    for port in listening(pids):
        answers += stranger(port, "site-0.stranger", ["site-0", "server"], hospitals.root)
    good = [answer for answer in answers if answer[2].lower() in ("ok", "none") and answer[3] != "None"]
    assert not good, f"a process without any certificate was answered: {good[0]}"


def test_a_greeting_fills_no_disk(hospitals: Hospitals) -> None:
    """A server that greets with 8 MB, and a site that answers a registration with 8 MB: neither keeps them."""
    before = {name: size_of(home.path) for name, home in hospitals.homes.items()} | {
        "server": size_of(hospitals.server.path)
    }
    (hospitals.faults / "flooding").touch()
    (hospitals.faults / "flood-site-1").touch()
    hospitals.order(study("flood", "fedavg", rounds=1, patience=30.0))
    queue = Queue(hospitals.server)
    until(lambda: _attempted(queue, "flood"), "the greeting")
    after = {name: size_of(home.path) for name, home in hospitals.homes.items()} | {
        "server": size_of(hospitals.server.path)
    }
    more = {name: after[name] - before[name] for name in before}
    assert all(size < 2**22 for size in more.values()), f"bytes more than before the greetings: {more}"


def _attempted(queue: Queue, run: str) -> bool:
    """Whether a run is over, or was greeted at least once and has waited for its patience."""
    entry = queue.get(run)
    return entry is not None and (entry.state in OVER or entry.attempt >= 2)
