"""A coordinator's page: sites, runs, the sites that a run waits for, and actions that are confirmed by typing a name."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the extra [console] is not installed")

from polyclinic.console.app import Console
from polyclinic.console.guard import VIEWER, Keys
from polyclinic.console.page import exposition
from polyclinic.console.server import ServerPage
from polyclinic.core.atomic import write_json
from polyclinic.core.audit_log import verify
from polyclinic.engines.flare import flare_processes
from polyclinic.engines.flare.protocol.paths import ServerFolder, toml
from polyclinic.engines.flare.server.job_queue import ACTIVE, CANCELLED, FINISHED, Entry, Queue
from tests.support.console import PORT, Response, request
from tests.support.local_deployment import order

EVIL = "<img src=x onerror=alert(1)>"


def admitted(days: float = 700, **change: Any) -> dict[str, Any]:
    expires = (datetime.now(UTC) + timedelta(days=days)).isoformat(timespec="seconds")
    entry = {
        "organization": "chu",
        "polyclinic": "0.1.0",
        "secure": "00",
        "expires": expires,
        "admitted": "",
        "signers": [],
    }
    return {**entry, "revoked": "", **change}


def server_folder(path: Path) -> ServerFolder:
    """A server's folder, without certificates and without sites."""
    home = ServerFolder(path)
    home.path.mkdir(parents=True)
    home.settings.write_text(
        toml({"project": "spots", "host": "localhost", "port": 8002, "organization": "umc", "scheme": "grpc"})
    )
    return home


@pytest.fixture
def home(tmp_path: Path) -> ServerFolder:
    """A server's folder whose supervisor is this process; without certificates."""
    home = server_folder(tmp_path / "server")
    write_json(
        home.admitted, {"lyon": admitted(), "oslo": admitted(20), "old": admitted(revoked="2026-01-01T00:00:00+00:00")}
    )
    status(home, sites={"lyon": time.time()})
    return home


def status(home: ServerFolder, **change: Any) -> None:
    me = os.getpid()
    known = {"state": "up", "pid": me, "birth": flare_processes.birth(me), "beat": time.time(), "sites": {}}
    write_json(home.path / "status.json", {**known, **change})


def queue(
    home: ServerFolder, run: str, state: str = ACTIVE, progress: dict[str, Any] | None = None, **change: Any
) -> None:
    an = replace(order(run=run, sites=("lyon", "oslo")), **change)
    Queue(home).put(run, Entry(an.to_json(), state, since=time.time()))
    folder = home.run(run)
    folder.mkdir(parents=True, exist_ok=True)
    if progress is not None:
        known = {"phase": "running", "pid": os.getpid(), "birth": "", "beat": time.time(), "rounds": 3, "round": 1}
        write_json(folder / "status.json", {**known, **progress})


def record(home: ServerFolder, run: str, *facts: dict[str, Any]) -> None:
    with (home.run(run) / "records.jsonl").open("a") as file:
        file.writelines(json.dumps({"method": "fedavg", "seed": 3, **fact}) + "\n" for fact in facts)


class Browser:
    def __init__(self, home: ServerFolder, role: str = "operator") -> None:
        self.page, self.keys = ServerPage(home.path), Keys()
        self.app = Console(self.page, self.keys).app(PORT)
        made = self.keys.exchange(self.keys.token(role))
        assert made
        self.key = made[0]
        self.started: list[list[str]] = []
        self.page.children.start = lambda what, words, **more: self.started.append(list(words))  # type: ignore[method-assign,assignment]

    def act(self, name: str, **body: Any) -> Response:
        return request(self.app, "POST", "/api/act", {"act": name, **body}, headers={"x-polyclinic-key": self.key})

    def state(self) -> dict[str, Any]:
        self.page.look()
        return self.page.state()


@pytest.fixture
def browser(home: ServerFolder) -> Browser:
    return Browser(home)


def test_sites_are_connected_away_or_revoked(browser: Browser) -> None:
    rows = {row["name"]: row for row in browser.state()["sites"]}
    assert {name: row["state"] for name, row in rows.items()} == {"lyon": "connected", "oslo": "away", "old": "revoked"}
    assert 19 < rows["oslo"]["days"] < 20
    assert rows["lyon"]["version"] == "0.1.0"


def test_a_dead_server_is_shown_and_its_sites_are_away(browser: Browser, home: ServerFolder) -> None:
    assert browser.state()["state"] == "up"
    status(home, pid=2**22 - 1, birth="1", sites={"lyon": time.time()})
    state = browser.state()
    assert (state["state"], state["well"]) == ("not running", False)
    assert {row["state"] for row in state["sites"]} == {"away", "revoked"}


def test_whom_a_run_waits_for_is_named_with_the_reason(browser: Browser, home: ServerFolder) -> None:
    queue(home, "run-1", progress={"waiting": {"oslo": f"waits for a person at oslo {EVIL}"}})
    queue(home, "run-2", FINISHED, {"waiting": {"lyon": "x"}})
    state = browser.state()
    run = next(run for run in state["runs"] if run["run"] == "run-1")
    assert run["waiting"] == {"oslo": f"waits for a person at oslo {EVIL}"}
    waits = {row["name"]: [wait["run"] for wait in row["waits"]] for row in state["sites"]}
    assert waits == {"lyon": [], "oslo": ["run-1"], "old": []}


def test_scores_traffic_faults_and_privacy_are_added_up(browser: Browser, home: ServerFolder) -> None:
    queue(home, "run-1", progress={})
    moved = {"bytes_up": {"lyon": 5, "oslo": 7}, "bytes_down": {"lyon": 3}}
    record(
        home,
        "run-1",
        {"kind": "round", "round": 1, **moved},
        {"kind": "scores", "round": 1, "site": "lyon", "metrics": {"loss": 0.5, "auc": 0.75}},
        {"kind": "quarantine", "round": 1, "site": "oslo", "reason": f"norm {EVIL}"},
        {"kind": "privacy", "round": 1, "site": "lyon", "epsilon": 1.25},
    )
    state = browser.state()
    rows = {row["name"]: row for row in state["sites"]}
    assert (rows["lyon"]["sent"], rows["lyon"]["received"], rows["lyon"]["epsilon"]) == (5, 3, 1.25)
    assert rows["oslo"]["faults"] == 1
    assert state["faults"] == [{"run": "run-1", "round": 1, "site": "oslo", "reason": f"norm {EVIL}"}]
    watcher = browser.page.watch({"run": "run-1"})
    scores = dict(watcher.updates())["scores"]
    assert (scores["metric"], scores["rows"]) == ("auc", [(1, {"lyon": 0.75})])
    assert watcher.updates() == []


def test_records_that_a_new_attempt_cut_are_forgotten(browser: Browser, home: ServerFolder) -> None:
    queue(home, "run-1", progress={})
    record(home, "run-1", *({"kind": "round", "round": i, "bytes_up": {"lyon": 5}} for i in range(4)))
    assert browser.state()["sites"][0]["sent"] == 20
    (home.run("run-1") / "records.jsonl").write_text("")
    record(home, "run-1", {"kind": "round", "round": 1, "bytes_up": {"lyon": 5}})
    assert browser.state()["sites"][0]["sent"] == 5


def test_strange_files_hide_nothing_else(browser: Browser, home: ServerFolder) -> None:
    queue(home, "run-1", progress={})
    (home.queue / "run-2.json").write_text("{")
    (home.queue / "run-3.json").write_text('{"order": "{}", "members": []}')
    record(home, "run-1", {"kind": "scores", "round": "x", "site": 1, "metrics": []}, {"kind": "round", "round": 1})
    state = browser.state()
    assert [run["run"] for run in state["runs"]] == ["run-1"]
    assert set(state["unreadable"]) == {"run-2", "run-3"}


@pytest.mark.parametrize(
    ("act", "body", "key", "words"),
    [
        ("stop", {}, "spots", ["server", "stop"]),
        ("revoke", {"site": "lyon"}, "lyon", ["server", "revoke", "lyon"]),
        ("reinstate", {"site": "old"}, "old", ["server", "reinstate", "old"]),
        ("cancel", {"run": "run-1"}, "run-1", ["server", "cancel", "run-1"]),
    ],
)
def test_what_is_confirmed_by_typing_a_name(
    browser: Browser, home: ServerFolder, act: str, body: dict[str, str], key: str, words: list[str]
) -> None:
    queue(home, "run-1", progress={})
    browser.state()
    for wrong in ("", "yes", key.upper()):
        assert browser.act(act, **body, confirm=wrong).status == 422
    assert browser.act(act, **body).status == 400
    assert browser.started == []
    assert browser.act(act, **body, confirm=key).status == 200
    assert browser.started == [[*words, "--home", str(home.path)]]
    entry = list(verify(home.path / "journal.jsonl"))[-1]
    assert (entry["event"], entry["action"], entry["about"]) == ("console", act, body.get("site", body.get("run", "")))


def test_only_known_names_reach_a_command(browser: Browser, home: ServerFolder) -> None:
    queue(home, "done", CANCELLED, {})
    browser.state()
    for name in ("--help", "../x", "nobody", ""):
        assert browser.act("revoke", site=name, confirm=name).status == 404
        assert browser.act("cancel", run=name, confirm=name).status == 404
        assert browser.act("export", study=name).status == 404
        assert browser.act("queue", study=name).status == 404
        assert browser.act("report", export=name).status == 404
        assert browser.act("file", export=name).status == 404
    assert browser.act("cancel", run="done", confirm="done").status == 404
    assert browser.started == []


def test_a_study_file_of_the_folder_is_queued_and_a_study_exported(browser: Browser, home: ServerFolder) -> None:
    (home.path / "spots.toml").write_text("[[methods]]\nname = 'fedavg'\n")
    folder = home.path / "studies" / "spots"
    folder.mkdir(parents=True)
    study = {"state": "queued", "why": "", "runs": {"run-1": {}}, "survey": "", "how": {}}
    write_json(folder / "study.json", study)
    queue(home, "run-1", FINISHED, {})
    state = browser.state()
    assert state["files"] == ["spots.toml"]
    assert (state["studies"][0]["runs"], state["studies"][0]["finished"]) == (1, 1)
    assert browser.act("queue", study="spots.toml").status == 200
    assert browser.act("export", study="spots").status == 200
    assert [words[1] for words in browser.started] == ["run", "export"]
    exported = home.path / "exports" / "spots-1" / "report"
    exported.mkdir(parents=True)
    (exported / "report.html").write_text("<p>report")
    browser.state()
    ticket = browser.act("file", export="spots-1").json["ticket"]
    assert request(browser.app, "GET", f"/report/{ticket}").body == b"<p>report"


def test_a_viewer_changes_nothing(home: ServerFolder) -> None:
    browser = Browser(home, VIEWER)
    browser.state()
    for act in (
        "start",
        "stop",
        "rehearse",
        "request",
        "admit",
        "revoke",
        "reinstate",
        "queue",
        "cancel",
        "export",
        "report",
    ):
        assert browser.act(act, site="lyon", confirm="spots", study="x", run="x", text="{}", export="x").status == 403
    assert browser.started == []


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"site": "<script>"}', '{"format": 1}', "[" * 9999])
def test_a_strange_request_admits_nobody(browser: Browser, home: ServerFolder, text: str) -> None:
    for act in ("request", "admit"):
        answer = browser.act(act, text=text, confirm="x")
        assert answer.status == 422
        assert "<script>" not in answer.json["error"] or answer.headers["content-type"] == "application/json"
    assert set(json.loads(home.admitted.read_text())) == {"lyon", "oslo", "old"}


def test_a_request_is_read_and_then_admitted_by_its_name(tmp_path: Path) -> None:
    """With a real authority: the page writes the join file, and the name is typed."""
    pytest.importorskip("nvflare", reason="the extra [flare] is not installed")
    from polyclinic.engines.flare.client import site_setup
    from polyclinic.engines.flare.protocol.paths import SiteFolder
    from polyclinic.engines.flare.server import server_setup

    home = ServerFolder(tmp_path / "server")
    server_setup.init(home, "spots", "localhost", 8002, "umc")
    text = site_setup.init(SiteFolder(tmp_path / "site"), "nice", "chu").read_text()
    browser = Browser(home)
    browser.state()
    shown = browser.act("request", text=text).json
    assert (shown["site"], shown["organization"], shown["known"]) == ("nice", "chu", "")
    assert browser.act("admit", text=text, confirm="lyon").status == 422
    assert browser.act("admit", text=text, confirm="nice", days=0).status == 422
    assert json.loads(home.admitted.read_text()) == {}
    answer = browser.act("admit", text=text, confirm="nice")
    assert answer.status == 200
    given = request(browser.app, "GET", f"/report/{answer.json['ticket']}")
    assert given.headers["content-disposition"].startswith("attachment")
    assert given.json["site"] == "nice"
    (tmp_path / "nice.join").write_bytes(given.body)
    _, fingerprint = site_setup.read_join(SiteFolder(tmp_path / "site"), tmp_path / "nice.join")
    assert fingerprint == browser.state()["authority"]
    assert browser.act("request", text=text).json["known"] == "admitted"


def test_100_sites_and_200_runs_are_read_quickly(home: ServerFolder) -> None:
    sites = [f"site-{i:03d}" for i in range(100)]
    write_json(home.admitted, {site: admitted() for site in sites})
    status(home, sites=dict.fromkeys(sites, time.time()))
    for i in range(200):
        queue(home, f"run-{i:03d}", FINISHED if i else ACTIVE, {"waiting": dict.fromkeys(sites, "waits for a person")})
    browser = Browser(home)
    begun = time.perf_counter()
    state = browser.state()
    first = time.perf_counter() - begun
    assert (len(state["sites"]), len(state["runs"])) == (100, 200)
    begun = time.process_time()
    for _ in range(10):
        browser.page.look()
    assert first < 3.0
    assert (time.process_time() - begun) / 10 < 0.1  # measured 8 ms


def test_metrics_name_no_site_and_no_run(browser: Browser, home: ServerFolder) -> None:
    queue(home, "run-1", progress={"waiting": {"oslo": "x"}})
    browser.state()
    text = exposition(browser.page.metrics())
    assert 'polyclinic_sites{state="connected"} 1' in text
    assert "polyclinic_sites_waited_for 1" in text
    for word in ("lyon", "oslo", "run-1", "spots"):
        assert word not in text


def test_the_page_imports_no_pytorch() -> None:
    code = (
        "import sys, polyclinic.console.server; "
        "print([name for name in ('torch', 'numpy', 'monai', 'nvflare', 'scipy', 'pandas') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
