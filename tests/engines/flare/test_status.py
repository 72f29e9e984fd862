"""What the commands say of a site and of a run is so, also after a process was killed."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nvflare", reason="the extra [flare] is not installed")

from nvflare.fuel.f3.cellnet.defs import CellChannelTopic, MessageHeaderKey, ReturnCode

from polyclinic.cli import app, server_status
from polyclinic.cli import site_status as shown
from polyclinic.engines.flare import flare_processes
from polyclinic.engines.flare.client import agent_status, run_archive, site_setup
from polyclinic.engines.flare.client.connection_log import Connection
from polyclinic.engines.flare.client.run_memory import Link, OldMessage, RunMemory
from polyclinic.engines.flare.client.run_status import RunStatus
from polyclinic.engines.flare.protocol.messages import VERSION, Call
from polyclinic.engines.flare.protocol.paths import ServerFolder, SetupError, SiteFolder, toml
from polyclinic.engines.flare.server.job_queue import FINISHED, Queue
from tests.support.flare_deployment import Hospitals, study, until
from tests.support.local_deployment import LocalCarrier, approve, coordinator, hospital, order, write_settings

LITTLE = "[limits]\nmin_patients = 2\n"
JOINED: dict[str, str | int] = {
    "site": "site-0",
    "organization": "x",
    "project": "p",
    "host": "localhost",
    "port": 1,
    "scheme": "grpc",
    "expires": "2030-01-01",
    "data": "/data",
}


@pytest.fixture
def site(tmp_path: Path) -> SiteFolder:
    """A site whose supervisor is this process, and which heard the server just now."""
    home = SiteFolder(tmp_path / "site-0")
    home.path.mkdir()
    home.settings.write_text(toml(JOINED))
    keeper(home)
    heard(home, 0)
    return home


def keeper(home: SiteFolder, pid: int = 0, **changes: object) -> None:
    pid = pid or os.getpid()
    said = {
        "state": "up",
        "pid": pid,
        "birth": flare_processes.birth(pid),
        "beat": time.time(),
        "started": 0.0,
        "crashes": 0,
    }
    (home.path / "status.json").write_text(json.dumps({**said, **changes}))


def heard(home: SiteFolder, seconds_ago: float, refused: str = "") -> None:
    (home.path / "connection.json").write_text(json.dumps({"heard": time.time() - seconds_ago, "refused": refused}))


def started(home: SiteFolder) -> None:
    keeper(home, started=time.time())
    heard(home, 3600)


def call(kind: str = "do") -> Call:
    size = 0 if kind in ("hello", "end") else 5
    return Call(
        VERSION, "run-1", 1, "site-0", "", size, "0" * 64 if size else "", kind, "0" * 64, 2, "train", 0, 0, 0, 0.0, ""
    )


def said(home: SiteFolder, capsys: pytest.CaptureFixture[str]) -> str:
    shown.show(home, as_json=False)
    return capsys.readouterr().out


def test_a_site_that_is_well_says_so(site: SiteFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert "site-0 runs\n" in said(site, capsys)
    shown.show(site, as_json=True)
    assert json.loads(capsys.readouterr().out)["well"] is True


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda home: heard(home, 3600), "NOT REACHABLE, last message 60 minutes ago"),
        (lambda home: (home.path / "connection.json").unlink(), "NOT REACHABLE, no message yet"),
        (lambda home: heard(home, 1, "Client 'site-0' is disabled"), "REFUSES this site (Client 'site-0' is disabled)"),
        (lambda home: keeper(home, birth="1"), "does not run: polyclinic site start"),
        (lambda home: keeper(home, beat=time.time() - 600), "its supervisor does not respond"),
        (lambda home: keeper(home, crashes=5), "FLARE's process ended 5 times in a row"),
        (started, "connecting, last message 60 minutes ago"),
        (lambda home: failing(home), "problem  run-1: failed: DataError; see the site's log"),
    ],
)
def test_what_is_wrong_is_told_and_counts(
    make: Any, says: str, site: SiteFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    make(site)
    assert says in said(site, capsys)
    with pytest.raises(SystemExit):
        shown.show(site, as_json=True)
    assert json.loads(capsys.readouterr().out)["well"] is False


def failing(home: SiteFolder) -> None:
    status = RunStatus(RunMemory(home.memory("run-1")).folder)
    status.came_of(call("hello"), "failed: DataError; see the site's log")


def test_a_site_without_its_keeper_that_works_on_says_so(
    site: SiteFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper(site, birth="1")
    monkeypatch.setattr(flare_processes, "working_in", lambda folder: [1, 2])
    assert "lost its supervisor, and 2 of its processes still run" in said(site, capsys)


def test_what_is_done_is_told_while_its_process_lives(site: SiteFolder, capsys: pytest.CaptureFixture[str]) -> None:
    status = RunStatus(RunMemory(site.memory("run-1")).folder)
    with status.working(call()):
        assert "working  run-1: train of round 3, started" in said(site, capsys)
        steps = {"site": "site-0", "round": 2, "job": "train", "done": 120, "total": 400}
        (status.path.parent / "steps-0.json").write_text(json.dumps(steps))
        assert "minibatch" not in said(site, capsys)  # of an earlier round
        (status.path.parent / "steps-0.json").write_text(json.dumps({**steps, "round": 3}))
        assert ", minibatch 120 of 400" in said(site, capsys)
        table = json.loads(status.path.read_text())
        status.path.write_text(json.dumps({**table, "birth": "1"}))  # kill -9
        assert "working" not in said(site, capsys)
    assert "working" not in said(site, capsys)


def test_a_problem_lasts_until_something_succeeds(site: SiteFolder) -> None:
    failing(site)
    status = RunStatus(site.memory("run-1"))  # another process
    status.came_of(call("end"), "")
    assert len(agent_status.read(site)["problems"]) == 1
    status.came_of(call(), "waits for a person at site-0")
    assert agent_status.read(site)["problems"] == []
    failing(site)
    run_archive.mark(site.memory("run-1"))
    assert agent_status.read(site)["problems"] == []


def test_waiting_says_for_what_and_ends_with_the_site(
    site: SiteFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hung for ever, without a word."""
    monkeypatch.setattr(shown, "DEAD_AFTER", 0.6)
    failing(site)
    looks = iter([False, False, True])
    shown.wait_for(site, "spots", lambda: next(looks))
    out = capsys.readouterr().out
    assert (
        out == "waiting  for the study 'spots'; the server is connected; run-1: failed: DataError; see the site's log\n"
    )
    keeper(site, birth="1")
    with pytest.raises(SetupError, match="site-0 does not run, so the study 'spots' cannot arrive"):
        app.app(["site", "review", "spots", "--wait", "--home", str(site.path)])


class Reply:
    def __init__(
        self, code: str, origin: str = "server", topic: str = CellChannelTopic.HEART_BEAT, error: str = ""
    ) -> None:
        self.headers = {
            MessageHeaderKey.RETURN_CODE: code,
            MessageHeaderKey.ORIGIN: origin,
            MessageHeaderKey.TOPIC: topic,
            MessageHeaderKey.ERROR: error,
        }

    def get_header(self, key: str, default: object = None) -> object:
        return self.headers.get(key, default)


def test_replies_of_the_server_say_when_it_was_heard_and_what_it_refuses(site: SiteFolder) -> None:
    watch, file = Connection(), site.path / "connection.json"
    watch.home = site
    file.unlink()
    watch.note(Reply(ReturnCode.TIMEOUT))
    watch.note(Reply(ReturnCode.OK, origin="site-0.job"))
    assert not file.exists()
    watch.note(Reply(ReturnCode.UNAUTHENTICATED, error="Client 'site-0' is disabled"))
    assert json.loads(file.read_text())["refused"] == "Client 'site-0' is disabled"
    watch.note(Reply(ReturnCode.OK, topic="challenge"))  # anybody is answered that
    assert json.loads(file.read_text())["refused"]
    watch.note(Reply(ReturnCode.OK))
    assert json.loads(file.read_text())["refused"] == ""


# Runs -------------------------------------------------------------------------------------------------------------------


def test_a_run_that_ended_without_some_sites_names_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong data at two of three sites: the run ended, and no site was named."""
    homes, an = hospital(tmp_path, policy=LITTLE), order(rounds=2)
    for home in homes.values():
        approve(home, an)
    for name in ("site-1", "site-2"):
        (homes[name].path / "data" / "train.npz").write_bytes(b"nonsense")
    assert coordinator(tmp_path, an, LocalCarrier(homes, an)).run() == "finished"
    server = ServerFolder(tmp_path / "coordinator")
    server.path.mkdir()
    (tmp_path / "server").rename(server.path / "runs")
    write_settings(server)
    server.admitted.write_text(json.dumps({n: {"revoked": "", "expires": "2030"} for n in homes}))
    queue = Queue(server)
    queue.home.run(an.run).rename(tmp_path / "aside")
    queue.add(an)
    (tmp_path / "aside").rename(server.run(an.run))
    queue.change(an.run, state=FINISHED, why=queue.progress(an.run)["why"])
    server_status.show(server, as_json=False)
    out = capsys.readouterr().out
    assert "finished without site-1 (refused: the data cannot be read" in out
    assert "; site-2 (refused: the data cannot be read" in out
    assert "1 of " in out
    assert "sites that were asked took part in the last round" in out
    assert "without site-1: refused: the data cannot be read" in out
    with pytest.raises(SystemExit):
        server_status.show(server, as_json=True)
    run = json.loads(capsys.readouterr().out)["runs"][an.run]
    assert {*run["missing"], *run["lost"]} == {"site-1", "site-2"}
    assert run["trained"] == ["site-0"]
    assert run["contributed"] == ["site-0"]


def test_the_memory_of_an_ended_run_goes_and_a_replay_stays_refused(tmp_path: Path) -> None:
    homes, an = hospital(tmp_path, policy=LITTLE), order("scaffold", rounds=2)
    for home in homes.values():
        approve(home, an)
    carrier = LocalCarrier(homes, an)
    assert coordinator(tmp_path, an, carrier).run() == "finished"
    carrier.close()
    home = homes["site-0"]
    folder = home.memory(an.run)
    last = [call for call in carrier.calls if call.kind == "do" and call.site == "site-0"][
        -1
    ]  # the server confirmed none after it
    assert list(folder.glob("*.memory"))
    assert list(run_archive.retire(home)) == []  # the server may begin its test again
    os.utime(folder / run_archive.MARK, (0, 0))
    assert list(run_archive.retire(home)) == [an.run]
    assert list(run_archive.retire(home)) == []
    assert {path.name for path in folder.iterdir()} <= set(run_archive.FACTS)
    agent = LocalCarrier(homes, an).agent("site-0")
    body = tmp_path / "body"
    body.write_bytes(b"0")
    assert "replay" in agent.answer(last, body)[0].lost


def test_the_memory_of_a_run_that_never_ended_goes_after_months_of_silence(tmp_path: Path) -> None:
    home = SiteFolder(tmp_path)
    for run in ("silent", "recent", "over"):
        memory = RunMemory(home.memory(run))
        memory.kept(3).write_text("state")
        memory.add(Link(3, 0, "0" * 64, 1, "train", 10, "0" * 64, memory.kept(3).name, 0.1))
        for path in memory.folder.iterdir():
            os.utime(path, (0, 0))
    run_archive.mark(home.memory("over"))
    (home.memory("recent") / "status.json").write_text("{}")
    (home.path / "memory" / "no folder").write_text("")
    assert list(run_archive.retire_silent(home, 30.0)) == ["silent"]
    assert list(run_archive.retire_silent(home, 30.0)) == []
    assert {path.name for path in home.memory("silent").iterdir()} <= set(run_archive.FACTS)
    assert home.memory("recent").joinpath("3.memory").exists()
    with pytest.raises(OldMessage, match="replay"):
        RunMemory(home.memory("silent")).settle(3, 3, 3)


@pytest.mark.parametrize("days", [0, -1, "90", True, float("nan"), 10**9])
def test_days_that_are_no_days_are_refused(days: object) -> None:
    with pytest.raises(SetupError, match=r"site\.toml: memory_days"):
        site_setup.memory_days({"memory_days": days})
    assert site_setup.memory_days({"memory_days": 30}) == 30.0
    assert site_setup.memory_days({}) == run_archive.SILENT_DAYS


@pytest.mark.deploy
@pytest.mark.slow
def test_the_status_of_a_real_site_is_true(hospitals: Hospitals, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_status, "SILENT_AFTER", 25.0)
    home = hospitals.homes["site-1"]

    def status() -> str:
        return hospitals.command("site", "status", home=home.path)

    until(lambda: "connected, last message" in status(), "the server to be heard", 60)
    hospitals.hold(0, "site-1")
    hospitals.order(study("status", rounds=1))
    hospitals.held(0, "site-1")
    assert "working  status: train of round 1" in status()
    hospitals.kill("site keeper", "site-1")
    until(lambda: "lost its supervisor" in status(), "the loss to be reported", 30)
    hospitals.release()
    hospitals.finished("status")
    hospitals.start_site("site-1")
    hospitals.together()
    hospitals.command("server", "revoke", "site-1", home=hospitals.server.path)
    until(lambda: "REFUSES this site" in status(), "the refusal to be reported", 60)
    hospitals.command("site", "stop", home=home.path)
    hospitals.command("site", "start", "--background", home=home.path)
    time.sleep(15)
    assert "REFUSES this site" in status()
    hospitals.command("server", "reinstate", "site-1", home=hospitals.server.path)
    until(lambda: "connected, last message" in status(), "the site to be let in again", 120)
    hospitals.command("server", "stop", home=hospitals.server.path)
    until(lambda: "NOT REACHABLE" in status(), "the silence to be noticed", 90)
    hospitals.command("site", "status", "--json", home=home.path, code=1)
