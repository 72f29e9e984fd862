"""What breaks in hospitals, broken on purpose: processes, disks, lines, clocks, messages. Real processes, real signals.

After each fault either the result has the bits of the undisturbed run, or what was lost is one site in one round, named
in the journal. SCAFFOLD throughout, because its sites remember: a round that was done twice would show.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from polyclinic.core.audit_log import verify
from polyclinic.engines.flare import flare_processes
from polyclinic.engines.flare.protocol.paths import ServerFolder, SiteFolder
from polyclinic.engines.flare.server import server_setup
from polyclinic.privacy.ledger import Ledger
from polyclinic.testing import equal
from tests.support.flare_deployment import PATIENCE, POLICY, Hospitals, reference, study, until
from tests.support.http_proxy import Proxy

pytestmark = [pytest.mark.deploy, pytest.mark.slow]
WHO = ("site-0", "site-1", "site-2")


@pytest.fixture(scope="module")
def way() -> Iterator[Proxy]:
    """The line between site-2 and the server."""
    made = Proxy()
    yield made
    made.close()


@pytest.fixture(scope="module")
def broken(way: Proxy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hospitals]:
    """Hospitals for these tests, with a supervisor that waits less long for who is away."""
    made = Hospitals(Path(tmp_path_factory.mktemp("broken")), ports={"site-2": way.port}, wait_for_all=20)
    way.target = made.port
    with made:
        yield made


@pytest.fixture
def house(broken: Hospitals, way: Proxy) -> Iterator[Hospitals]:
    """Hospitals where every site is there; after the test every journal must still be whole."""
    broken.reset()
    yield broken
    way.mend()
    broken.release()
    broken.journals_hold()


def bits_are_the_same(house: Hospitals, run: str, an: Any) -> None:
    """Server and site state are those of the undisturbed run, and no site was lost."""
    state, memory = reference(an)
    assert house.lost(run) == []
    assert equal(state, house.state(run))
    for site, kept in memory.items():
        assert equal(kept, house.memory(run, site)), site


def trained(house: Hospitals, run: str, site: str) -> int:
    """How often a site worked on something of a run."""
    return house.events(house.homes[site].journal, run).count("asked")


def begin(house: Hospitals, run: str, at: int = 1, rounds: int = 3, who: tuple[str, ...] = WHO, **how: Any) -> Any:
    """A run that is in the middle of a round, with the sites ``who`` at work."""
    an = house.order(study(run, rounds=rounds, **how))
    house.hold(at, *who)
    house.held(at, *who)
    return an


# Processes --------------------------------------------------------------------------------------------------------------


def test_every_kind_of_process_is_recognized(house: Hospitals) -> None:
    """What the other tests kill by its command line exists: a renamed module would otherwise only make them wait."""
    begin(house, "kinds", who=("site-1",))
    at_sites, at_the_server = ("training", "site job", "site parent", "site keeper"), ("server job", "server parent")
    assert all(house.pids(kind, "site-1") for kind in at_sites)
    assert all(house.pids(kind) for kind in (*at_the_server, "supervisor"))
    house.release()
    house.finished("kinds")


def test_kill_the_training_process(house: Hospitals) -> None:
    """Its site starts another, which does the work; the server learns nothing of it."""
    an = begin(house, "training", who=("site-1",))
    house.kill("training", "site-1")
    house.release()
    house.finished("training")
    bits_are_the_same(house, "training", an)
    assert house.attempts("training") == 1


def test_a_training_process_that_always_dies_loses_its_site_and_nobody_else(house: Hospitals) -> None:
    """As when there is too little memory: after three deaths the site is lost for this round, by name."""
    house.order(study("dying", rounds=2, min_replies=2))
    house.hold(0, "site-1")
    for _ in range(3):
        house.held(0, "site-1")
        (house.faults / "held-site-1-0").unlink()
        house.kill("training", "site-1")
    house.release()
    house.finished("dying")
    ((round, site, why),) = house.lost("dying")
    assert (round, site) == (1, "site-1")
    assert "SIGKILL" in why
    assert house.attempts("dying") == 1


def test_kill_a_sites_job_process(house: Hospitals) -> None:
    """FLARE ends the whole job; the supervisor begins another from the checkpoint, and no site works twice."""
    an = begin(house, "site-job", who=("site-1",))
    until(lambda: house.events(house.homes["site-0"].journal, "site-job").count("answered") == 2, "site-0 to answer")
    house.kill("site job", "site-1")
    house.release()
    house.finished("site-job")
    bits_are_the_same(house, "site-job", an)
    assert house.attempts("site-job") == 2
    assert trained(house, "site-job", "site-0") == 3
    assert "asked again, answered as before" in house.events(house.homes["site-0"].journal, "site-job")


def test_kill_a_whole_site(house: Hospitals) -> None:
    """Everything of a site at once, as by a power cut; it starts again as its service manager would start it.

    FLARE lets it in again and notices nothing; its silence is noticed. This study wants all three, and gets them.
    """
    an = begin(house, "site-gone", who=("site-1",), min_replies=3)
    house.power_cut("site-1")
    house.release()
    house.start_site("site-1")
    house.finished("site-gone")
    bits_are_the_same(house, "site-gone", an)
    assert house.attempts("site-gone") == 2


def test_kill_a_sites_parent(house: Hospitals) -> None:
    """FLARE's own process at a site; our supervisor starts another one."""
    an = begin(house, "site-parent", who=("site-1",), min_replies=3)
    house.kill("site parent", "site-1")
    until(lambda: house.pids("site parent", "site-1"), "the keeper to start another")
    house.release()
    house.finished("site-parent")
    bits_are_the_same(house, "site-parent", an)


def test_kill_the_servers_job(house: Hospitals) -> None:
    an = begin(house, "server-job")
    house.kill("server job")
    house.release()
    house.finished("server-job")
    bits_are_the_same(house, "server-job", an)
    assert house.attempts("server-job") == 2


def test_kill_the_whole_server(house: Hospitals) -> None:
    """Supervisor, FLARE and job; after a restart it resumes by itself, and FLARE's stale word RUNNING is not
    believed.
    """
    an = begin(house, "server-gone")
    house.power_cut()
    house.release()
    assert not server_setup.is_up(house.server)
    house.command("server", "start", "--background", home=house.server.path)
    house.finished("server-gone")
    bits_are_the_same(house, "server-gone", an)
    assert house.attempts("server-gone") == 2


def test_kill_the_server_job_at_its_writes(house: Hospitals) -> None:
    """Just before, and just after, what it writes has its name; every other such moment is in test_crashes.py."""
    run, deaths = "server-writes", []
    for file, when, skip in (
        ("checkpoint", "before", 1),
        ("checkpoint", "after", 3),
        ("model", "before", 0),
        ("model", "after", 0),
    ):
        deaths.append(house.die_at("runner_process", rf"{run}/{file}\.safetensors$", when, skip))
    an = house.order(study(run, rounds=4))
    house.finished(run, 3 * PATIENCE)
    assert all(died.exists() for died in deaths)
    bits_are_the_same(house, run, an)
    assert house.attempts(run) == 1 + len(deaths)


def test_kill_a_site_at_its_writes(house: Hospitals) -> None:
    """A site's training process writes replies and memory, its job process says which of them count."""
    run, deaths = "site-writes", []
    for number, (argv, file) in enumerate(
        (
            (r"client\.training_process", r"\d\.reply"),
            (r"client\.training_process", r"\d\.memory"),
            ("worker_process", r"chain\.json"),
        )
    ):
        for when in ("before", "after"):
            deaths.append(house.die_at(argv, rf"site-1/memory/{run}/{file}$", when, skip=1 + number))
    an = house.order(study(run, rounds=6))
    house.finished(run, 3 * PATIENCE)
    assert all(died.exists() for died in deaths)
    bits_are_the_same(house, run, an)


@pytest.mark.parametrize(
    ("file", "skip"),
    [
        (r"ledgers/.*\.head", 2),  # after the heads of the budget and of the list of patients: the first spend
        (r"\d\.reply", 1),
    ],
)
def test_privacy_spend_is_never_under_counted(file: str, skip: int, house: Hospitals) -> None:
    """The training process dies when it has paid and not yet answered, or just before its answer has its name."""
    pytest.importorskip("dp_accounting", reason="needs polyclinic[privacy]")
    run, home = f"spend-{len(file)}", house.homes["site-1"]
    before = sum(len(Ledger(path).spends()) for path in home.ledgers.glob("*.jsonl"))
    home.policy.write_text(POLICY + '[privacy]\nepsilon = 1000.0\ndelta = 1e-3\nunit = "record"\n')
    died = house.die_at(r"client\.training_process", rf"site-1/.*{file}$", "before", skip)
    training = {"batch_size": 8, "lr": 0.05, "steps": 1, "private": {"noise": 2.0, "bound": 1.0, "unit": "record"}}
    try:
        house.order(
            study(
                run, "fedavg", rounds=3, plan={"training": training, "network_options": {"width": 8, "norm": "group"}}
            )
        )
        house.finished(run)
    finally:
        home.policy.write_text(POLICY)
    assert died.exists()
    assert house.lost(run) == []
    left = {e["reply"] for e in verify(home.journal) if e.get("run") == run and e["event"] == "answered"}
    spent = sum(len(Ledger(path).spends()) for path in home.ledgers.glob("*.jsonl")) - before
    assert len(left) == 3
    assert spent == 4  # each that left, and the one that was paid for and lost


# Absence ----------------------------------------------------------------------------------------------------------------


def test_a_site_away_for_three_rounds_returns_with_its_memory(house: Hospitals) -> None:
    """Its machine is off; the others continue, the journal names it, and after its return it continues from its state."""
    run, rounds = "away", 30
    house.order(study(run, rounds=rounds, min_replies=2))
    house.hold(1, "site-1")
    house.held(1, "site-1")
    house.power_cut("site-1")
    house.release()
    house.hold(5, "site-0")
    house.held(5, "site-0")  # rounds 1 to 4 went on without it
    house.start_site("site-1")
    house.together()
    until(
        lambda: any(
            e["event"] == "pause asked for" and e["run"] == run for e in verify(house.server.path / "journal.jsonl")
        ),
        "the supervisor to see it",
    )
    house.release()
    house.finished(run)
    mine = [e for e in verify(house.homes["site-1"].journal) if e.get("run") == run and e["event"] == "asked"]
    rounds_of = [e["round"] for e in mine]
    away = range(rounds_of[1] + 1, rounds_of[2])  # it died in its second round, and came back for its third
    assert len(away) >= 3
    assert rounds_of == [0, 1, *range(away.stop, rounds)]
    server = list(verify(house.server.run(run) / "journal.jsonl"))
    assert not [e for e in server if e["event"] == "site begins anew"]  # it had kept what it knew
    assert {(e["site"], e["reason"]) for e in server if e["event"] == "lost"} == {("site-1", "the site is away")}
    assert [e["round"] for e in server if e["event"] == "lost"] == [1, *away]
    assert house.attempts(run) == 2


# Lines ------------------------------------------------------------------------------------------------------------------


def test_a_line_that_is_cut_for_a_while(house: Hospitals, way: Proxy) -> None:
    an = begin(house, "cut", who=("site-2",))
    way.cut()
    house.release()
    time.sleep(10)
    way.mend()
    house.finished("cut")
    bits_are_the_same(house, "cut", an)


def test_a_line_that_swallows_everything_for_a_while(house: Hospitals, way: Proxy) -> None:
    """No connection breaks, and nothing arrives, for longer than a heart beats."""
    an = begin(house, "stalled", who=("site-2",))
    way.stalled = True
    house.release()
    time.sleep(20)
    way.stalled = False
    house.finished("stalled")
    bits_are_the_same(house, "stalled", an)


def test_a_slow_line(house: Hospitals, way: Proxy) -> None:
    """Half a second each way and 100 kB a second, with a model of 1.3 MB: slower, and the same bits."""
    way.rate, way.delay = 100_000, 0.25
    plan = {"network": "mlp", "network_options": {"width": 512, "depth": 2}}
    an = house.order(study("slow", method="fedavg", rounds=2, plan=plan))
    house.finished("slow")
    bits_are_the_same(house, "slow", an)


def test_a_site_that_is_too_late_is_lost_for_a_round(house: Hospitals) -> None:
    an = begin(house, "late", who=("site-1",), deadline=90.0, min_replies=2)
    until(lambda: house.lost("late"), "the deadline to pass")
    house.release()
    house.finished("late")
    assert [(round, site) for round, site, _ in house.lost("late")] == [(2, "site-1")]
    assert an.deadline == 90.0


def test_a_site_that_never_scores_is_not_waited_for(house: Hospitals) -> None:
    """It is connected, it trained, and its scores never come: the run ends without them, and the journal names it."""
    (house.faults / "silent-site-1").touch()
    an = house.order(study("silent", rounds=2, score_every=2, test="score/test", deadline=60.0))
    house.finished("silent")
    bits_are_the_same(house, "silent", an)
    facts = [json.loads(line) for line in (house.server.run("silent") / "records.jsonl").read_text().splitlines()]
    assert [fact["site"] for fact in facts if fact["kind"] == "scores"] == ["site-0", "site-2"]
    assert [fact["site"] for fact in facts if fact["kind"] == "test"] == ["site-0", "site-2"]
    lost = [e for e in verify(house.server.run("silent") / "journal.jsonl") if e["event"] == "lost"]
    assert [(e["site"], e["job"]) for e in lost] == [("site-1", "score/val"), ("site-1", "score/test")]
    assert house.attempts("silent") == 1


# Disks ------------------------------------------------------------------------------------------------------------------


def test_a_sites_full_disk_loses_it_for_a_round(house: Hospitals) -> None:
    begin(house, "site-disk", who=("site-1",), min_replies=2)
    there = [pid for kind in ("training", "site job") for pid in house.pids(kind, "site-1")]
    house.full_disk(there)
    house.release()
    until(lambda: house.lost("site-disk"), "the site to be lost")
    house.full_disk(there, full=False)
    house.finished("site-disk")
    lost = house.lost("site-disk")
    assert {site for _, site, _ in lost} == {"site-1"}
    assert house.attempts("site-disk") == 1


def test_the_servers_full_disk_costs_time_and_nothing_else(house: Hospitals) -> None:
    an = begin(house, "server-disk")
    there = [pid for kind in ("supervisor", "server job") for pid in house.pids(kind)]
    house.full_disk(there)
    house.release()
    time.sleep(15)
    house.full_disk(there, full=False)
    house.finished("server-disk")
    bits_are_the_same(house, "server-disk", an)


# Clocks -----------------------------------------------------------------------------------------------------------------


def fake_clock() -> str:
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    if not found:
        pytest.skip("libfaketime is not installed, so no process can be shown another clock")
    return str(found[0])


def test_the_doctor_knows_a_wrong_clock(house: Hospitals) -> None:
    """In one line: what is wrong, and what to do."""
    env = {**house.env, "LD_PRELOAD": fake_clock(), "FAKETIME": "-1d", "NO_FAKE_STAT": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "polyclinic.cli.app", "site", "diagnose", "--home", str(house.homes["site-1"].path)],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    bad = [line for line in done.stdout.splitlines() if line.startswith("BAD") and "clock" in line]
    assert bad, done.stdout


# Doubles ----------------------------------------------------------------------------------------------------------------


def test_a_site_is_not_started_twice(house: Hospitals) -> None:
    said = house.command("site", "start", "--background", home=house.homes["site-1"].path, code=2)
    assert "is already running" in said


def test_a_copy_of_a_site_changes_no_bit(house: Hospitals) -> None:
    """Somebody copied a site's folder to a second machine, and started both."""
    copy = SiteFolder(house.root / "copy")
    shutil.copytree(house.homes["site-1"].path, copy.path, ignore=shutil.ignore_patterns("*.sock"))
    (copy.path / "status.json").unlink()
    an = begin(house, "double", who=("site-1",))
    house.command("site", "start", "--background", home=copy.path)
    time.sleep(15)
    house.release()
    time.sleep(15)
    house.command("site", "stop", home=copy.path)
    house.finished("double")
    with suppress(AssertionError):  # FLARE drops the copy after a while, and with it, for some seconds, the site
        until(lambda: "site-1" not in server_setup.status(house.server)["sites"], "the copy to be forgotten", 60)
    house.together()
    lost = house.lost("double")
    assert {site for _, site, _ in lost} <= {"site-1"}
    assert len(lost) <= 1
    if not lost:
        assert equal(reference(an)[0], house.state("double"))


def test_a_server_is_not_started_twice(house: Hospitals) -> None:
    assert "is already running" in house.command("server", "start", "--background", home=house.server.path, code=2)


def test_a_copy_of_a_server_takes_nobody_away(house: Hospitals) -> None:
    """A copy of the server's folder on the same machine finds its port taken, and says so."""
    copy = ServerFolder(house.root / "server-copy")
    shutil.copytree(
        house.server.path, copy.path, ignore=shutil.ignore_patterns("status.json", "*.log*", ".*", "*.sock")
    )
    said = house.command("server", "start", "--background", home=copy.path, code=2)
    assert str(house.port) in said
    assert not flare_processes.working_in(copy.path)
    house.together()


# Messages ---------------------------------------------------------------------------------------------------------------


def test_a_message_that_is_not_right_loses_one_site_in_one_round(house: Hospitals) -> None:
    """Over the real line: each is refused, named, and forgotten; the site takes part in the next round."""
    run = "messages"
    wrong = ("truncated", "oversized", "altered", "malformed", "unexpected", "elsewhere", "raised")
    for round in range(len(wrong)):
        house.hold(round, "site-1")
    house.order(study(run, rounds=len(wrong) + 1, min_replies=2))
    for round, how in enumerate(wrong):
        house.held(round, "site-1")
        house.twist("site-1", how)
        (house.faults / f"hold-site-1-{round}").unlink()
    house.finished(run)
    lost = house.lost(run)
    assert [(round, site) for round, site, _ in lost] == [(round + 1, "site-1") for round in range(len(wrong))]
    print("\n".join(f"{how}: {why}" for how, (_, _, why) in zip(wrong, lost, strict=True)))
    assert all(why for _, _, why in lost)
    assert house.attempts(run) == 1
    said = [e for e in verify(house.server.run(run) / "journal.jsonl") if e["event"] == "lost"]
    assert [(e["site"], e["round"]) for e in said] == [("site-1", round) for round in range(len(wrong))]
    assert trained(house, run, "site-1") == len(wrong) + 1


def test_a_message_that_was_used_already_is_dropped(house: Hospitals) -> None:
    """The answer to the round before comes again in the place of the answer to this one."""
    run = "replayed"
    house.hold(1, "site-1")
    house.order(study(run, rounds=3, min_replies=2, deadline=90.0))
    house.held(1, "site-1")
    house.twist("site-1", "replayed")
    house.release()
    house.finished(run)
    assert [(round, site) for round, site, _ in house.lost(run)] == [(2, "site-1")]
    assert "late or repeated, dropped" in house.events(house.server.run(run) / "journal.jsonl")


def test_nothing_stays_behind(house: Hospitals) -> None:
    """After all of this: no files of messages under way at the server, and no replies but the last at the sites."""
    an = house.order(study("tidy", rounds=4))
    house.finished("tidy")
    folder = house.server.run("tidy")
    assert not list((folder / "inbox").iterdir())
    for home in house.homes.values():
        assert len(list(home.memory(an.run).glob("*.reply"))) <= 2
    assert json.loads((folder / "status.json").read_text())["phase"] == "finished"
