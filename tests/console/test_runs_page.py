"""The page of runs: what it reads of a run as it grows, what stays closed, and what can be done to a run."""

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the extra [console] is not installed")

from polyclinic.console import run_reader
from polyclinic.console.app import Console
from polyclinic.console.guard import VIEWER, Keys
from polyclinic.console.page import encoded, exposition
from polyclinic.console.run_reader import FINISHED, RUNNING, STOPPED, RunReader
from polyclinic.console.runs import RunsPage
from polyclinic.core import atomic
from polyclinic.core.audit_log import Journal
from polyclinic.errors import RunError
from polyclinic.studies.run.run_lock import LOCK, STOP, delete, holder
from tests.support.console import PORT, Response, request

SITES = ("lyon", "oslo")
HUGE = json.dumps(
    {"metric": "auc", "name": "x", "sites": [], "methods": [{"label": "a"}], "seeds": list(range(30_000))}
)
EVIL = "<img src=x onerror=alert(1)>"


class Run:
    """A run folder that a test lets grow."""

    def __init__(
        self, path: Path, methods: tuple[str, ...] = ("local", "fedavg"), rounds: int = 4, **info: Any
    ) -> None:
        self.path, self.methods, self.rounds = path, methods, rounds
        path.mkdir(parents=True)
        sites = [{"name": name, "role": "training", "patients": {"train": 10}} for name in SITES]
        known = [{"label": m, "name": m.split("-")[0], "leaves": "the change of the model"} for m in methods]
        table: dict[str, Any] = {
            "name": "heart",
            "title": "Heart",
            "hash": "ab" * 32,
            "created": "2026-11-30T00:00:00Z",
            "metric": "auc",
        }
        table |= {"task": "classification", "sites": sites, "methods": known, "rounds": rounds, "seeds": [0]}
        (path / "run.json").write_text(json.dumps({**table, **info}))
        (path / "study.toml").write_text("name = 'heart'\n")
        self.journal = Journal(path / "journal.jsonl")
        self.journal.write("begun", {})

    def file(self, method: str) -> Path:
        folder = self.path / "arms" / f"{method}-seed0"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / "records.jsonl"

    def write(self, method: str, kind: str, **facts: Any) -> None:
        with self.file(method).open("a") as file:
            file.write(json.dumps({"kind": kind, "method": method, "seed": 0, **facts}) + "\n")

    def round(self, method: str, number: int, values: dict[str, float], wall: float = 0.5) -> None:
        facts = {"wall": wall, "bytes_up": {"lyon": 10}, "bytes_down": {"lyon": 5}, "asked": SITES, "lost": {}}
        self.write(method, "round", round=number, **facts)
        for site, value in values.items():
            self.write(method, "scores", round=number, role="val", site=site, metrics={"auc": value, "loss": 1 - value})
        self.journal.write("round", {"method": method, "seed": 0, "round": number})

    def test(self, method: str) -> None:
        for site in SITES:
            self.write(method, "test", round=1, site=site, metrics={"auc": 0.77}, n=5)
        self.write(method, "sealed", opened=1)

    def finish(self) -> None:
        whole = b"".join(self.file(method).read_bytes() for method in self.methods)
        atomic.write(self.path / "records.jsonl", whole)
        for method in self.methods:
            self.file(method).unlink()
        self.journal.write("finished", {})


@pytest.fixture
def held() -> Iterator[Any]:
    """Hold the lock of a run in another process, as a run does."""
    started: list[subprocess.Popen[str]] = []

    def hold(path: Path) -> "subprocess.Popen[str]":
        code = (
            "import fcntl, os, sys\nlock = open(sys.argv[1], 'a+')\nfcntl.flock(lock, fcntl.LOCK_EX)\n"
            "lock.truncate(0); lock.write(str(os.getpid())); lock.flush(); print('held', flush=True); sys.stdin.read()"
        )
        command = [sys.executable, "-c", code, str(path / LOCK)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        started.append(process)
        return process

    yield hold
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "runs" / "heart-abababab")


class Browser:
    def __init__(self, root: Path, role: str = "operator") -> None:
        self.page, self.keys = RunsPage(root, root.parent), Keys()
        self.app = Console(self.page, self.keys).app(PORT)
        made = self.keys.exchange(self.keys.token(role))
        assert made
        self.key = made[0]

    def act(self, name: str, **body: Any) -> Response:
        return request(self.app, "POST", "/api/act", {"act": name, **body}, headers={"x-polyclinic-key": self.key})


def test_a_run_is_read_as_it_grows(run: Run, held: Any) -> None:
    reader = RunReader(run.path, "heart", curves=True)
    assert reader.look()
    assert reader.state == STOPPED
    process = held(run.path)
    assert reader.look()
    assert (reader.state, reader.process) == (RUNNING, process.pid)
    assert not reader.look()
    run.round("fedavg", 1, {"lyon": 0.5, "oslo": 0.7})
    run.round("fedavg", 2, {"lyon": 0.7, "oslo": 0.8})
    run.round("fedavg", 3, {"lyon": 0.6, "oslo": 0.8})
    assert reader.look()
    summary = reader.summary()
    assert summary["best"] == {"label": "fedavg", "value": 0.75}
    assert (summary["done"], summary["total"], summary["bytes"]) == (3, 8, 45)
    assert summary["left"] == pytest.approx(0.5 * 1 + 0.5 * 4)
    arm = reader.arm(reader.arms["fedavg", 0, 0], 0)
    assert arm["rows"][0] == (1, {"lyon": 0.5, "oslo": 0.7})
    assert (arm["best_round"], arm["best_sites"]) == (2, {"lyon": 0.7, "oslo": 0.8})
    process.kill()
    process.wait()
    assert reader.look()
    assert reader.state == STOPPED


def test_a_round_that_is_half_written_is_not_the_best(run: Run, held: Any) -> None:
    held(run.path)
    run.round("fedavg", 1, {"lyon": 0.5, "oslo": 0.5})
    run.round("fedavg", 2, {"lyon": 0.9})
    reader = RunReader(run.path, "heart")
    reader.look()
    assert reader.summary()["best"]["value"] == 0.5
    run.write("fedavg", "scores", round=2, role="val", site="oslo", metrics={"auc": 0.3})
    reader.look()
    assert reader.summary()["best"]["value"] == 0.6


def test_a_baseline_is_never_the_best_method(run: Run) -> None:
    run.round("local", 1, {"lyon": 0.99, "oslo": 0.99})
    run.round("fedavg", 1, {"lyon": 0.5, "oslo": 0.5})
    reader = RunReader(run.path, "heart")
    reader.look()
    assert reader.summary()["best"]["label"] == "fedavg"


def test_smaller_is_better_for_another_metric(run: Run) -> None:
    run.round("fedavg", 1, {"lyon": 0.6, "oslo": 0.6})
    run.round("fedavg", 2, {"lyon": 0.9, "oslo": 0.9})
    reader = RunReader(run.path, "heart", True, "loss")
    reader.look()
    assert reader.summary()["best"]["value"] == pytest.approx(0.1)
    assert reader.detail()["metrics"] == ["auc", "loss"]


def test_the_best_of_a_loss_is_the_smallest(tmp_path: Path) -> None:
    run = Run(tmp_path / "x", metric="loss", higher_is_better=False)
    for number, value in enumerate((0.6, 0.9, 0.8), 1):
        run.round("fedavg", number, {"lyon": value, "oslo": value})
    reader = RunReader(run.path, "heart")
    reader.look()
    assert reader.summary()["best"]["value"] == pytest.approx(0.1)


def test_external_sites_are_not_in_the_mean(tmp_path: Path) -> None:
    sites = [{"name": "lyon", "role": "training"}, {"name": "oslo", "role": "external"}]
    run = Run(tmp_path / "x", sites=sites)
    run.round("fedavg", 1, {"lyon": 0.5, "oslo": 0.9})
    reader = RunReader(run.path, "heart")
    reader.look()
    assert reader.summary()["best"]["value"] == 0.5


def test_test_scores_stay_closed_until_everything_is_tested(run: Run) -> None:
    for method in run.methods:
        run.round(method, 1, {"lyon": 0.5, "oslo": 0.5})
    run.test("fedavg")
    browser = Browser(run.path.parent)
    watcher = browser.page.watch({"run": run.path.name})
    assert b"0.77" not in json.dumps(watcher.updates()).encode()
    run.test("local")
    browser.page.look()
    assert b"0.77" not in json.dumps(watcher.updates()).encode()
    run.finish()
    browser.page.look()
    text = json.dumps(watcher.updates())
    assert "0.77" in text
    assert '"state": "finished"' in text


def test_after_a_resume_what_was_undone_is_forgotten(run: Run) -> None:
    run.round("fedavg", 1, {"lyon": 0.5, "oslo": 0.5})
    kept = run.file("fedavg").stat().st_size
    run.round("fedavg", 2, {"lyon": 0.9, "oslo": 0.9})
    reader = RunReader(run.path, "heart", curves=True)
    reader.look()
    generation = reader.generation
    with run.file("fedavg").open("r+b") as file:
        file.truncate(kept)
    run.journal.write("resumed", {})
    for number in (2, 3, 4):  # longer than before, so that the size alone shows nothing
        run.round("fedavg", number, {"lyon": 0.6, "oslo": 0.6})
    reader.look()
    assert reader.generation > generation
    arm = reader.arms["fedavg", 0, 0]
    assert [number for number, _ in arm.rows] == [1, 2, 3, 4]
    assert (arm.round, arm.up) == (4, 40)
    assert reader.summary()["best"]["value"] == 0.6


def test_a_finished_run_is_read_from_its_joined_records(run: Run) -> None:
    reader = RunReader(run.path, "heart", curves=True)
    for method in run.methods:
        run.round(method, 1, {"lyon": 0.5, "oslo": 0.7})
        run.test(method)
    reader.look()
    run.finish()
    reader.look()
    assert reader.state == FINISHED
    assert reader.summary()["bytes"] == 30
    assert reader.arms["fedavg", 0, 0].test == {"lyon": 0.77, "oslo": 0.77}
    assert not reader.look()


def test_progress_within_training_is_shown_of_the_sites_that_compute(run: Run, held: Any) -> None:
    held(run.path)
    run.round("fedavg", 1, {"lyon": 0.5, "oslo": 0.5})
    arm = run.file("fedavg").parent
    now = {"round": 2, "since": 1.0, "asked": list(SITES), "arrived": {"lyon": 0.5}}
    (arm / "now.json").write_text(json.dumps(now))
    steps = {"site": "oslo", "round": 2, "job": "train", "done": 120, "total": 400}
    changes: list[dict[str, Any]] = [{}, {"site": "lyon"}, {"site": "evil"}, {"round": 1}, {"total": 0}]
    for number, change in enumerate(changes):
        (arm / f"steps-{number}.json").write_text(json.dumps({**steps, **change}))
    reader = RunReader(run.path, "heart")
    reader.look()
    assert reader.arms["fedavg", 0, 0].now["steps"] == {"oslo": [120, 400]}
    run.round("fedavg", 2, {"lyon": 0.5, "oslo": 0.5})
    reader.look()
    assert reader.arms["fedavg", 0, 0].now == {}


def test_progress_within_a_round_is_shown_until_the_round_is_complete(run: Run, held: Any) -> None:
    held(run.path)
    reader = RunReader(run.path, "heart")
    run.file("fedavg")
    now = {"round": 1, "since": 1.0, "asked": SITES, "arrived": {"lyon": 0.4}}
    (run.path / "arms" / "fedavg-seed0" / "now.json").write_text(json.dumps(now))
    reader.look()
    arm = reader.arms["fedavg", 0, 0]
    assert arm.now == {"round": 1, "asked": 2, "arrived": 1, "waits": ["oslo"], "steps": {}, "since": 1.0}
    run.round("fedavg", 1, {"lyon": 0.5, "oslo": 0.5})
    reader.look()
    assert arm.now == {}


def test_strange_lines_are_ignored(run: Run) -> None:
    with run.file("fedavg").open("ab") as file:
        file.write(b'\xff\xfe\n[]\n"x"\n{}\n{"kind":"new","method":"fedavg","seed":0}\n{"kind":"round"\n')
    run.round("fedavg", 1, {"lyon": 0.5, "oslo": 0.5})
    reader = RunReader(run.path, "heart")
    assert reader.look()
    assert reader.summary()["done"] == 1


def test_numbers_that_are_not_finite_break_no_page(run: Run) -> None:
    """JSON of Python has NaN and Infinity; a browser's has not."""
    run.round("fedavg", 1, {"lyon": float("nan"), "oslo": 0.5})
    run.write("fedavg", "privacy", round=1, site="lyon", epsilon=float("inf"))
    run.journal.write("round", {"epsilon": {"lyon": float("inf")}})
    browser = Browser(run.path.parent)
    events = browser.page.watch({"run": run.path.name}).updates()
    sent = json.loads(encoded(events), parse_constant=lambda text: pytest.fail(f"{text} was sent"))
    arms = dict(sent)["arms"]
    assert next(arm for arm in arms if arm["label"] == "fedavg")["rows"] == [[1, {"oslo": 0.5}]]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"metric": 1}', '{"metric":"auc","methods":{},"sites":[]}', "\x00", HUGE]
)
def test_a_folder_with_a_strange_description_hides_no_other_run(run: Run, text: str) -> None:
    bad = run.path.parent / "bad"
    bad.mkdir()
    (bad / "run.json").write_text(text)
    browser = Browser(run.path.parent)
    browser.page.look()
    assert list(browser.page.readers) == [run.path.name]


def test_runs_of_scenarios_are_found_and_links_are_not_followed(run: Run, tmp_path: Path) -> None:
    Run(run.path.parent / "panel" / "few-abababab")
    outside = Run(tmp_path / "elsewhere" / "secret")
    (run.path.parent / "link").symlink_to(outside.path)
    browser = Browser(run.path.parent)
    browser.page.look()
    assert sorted(browser.page.readers) == ["heart-abababab", "panel/few-abababab"]
    assert browser.page.readers["heart-abababab"].summary()["resumable"] is True
    assert browser.page.readers["panel/few-abababab"].summary()["resumable"] is False


def test_each_watcher_gets_each_change_once(run: Run) -> None:
    browser = Browser(run.path.parent)
    one, two = browser.page.watch({"run": run.path.name}), browser.page.watch({})
    assert {name for name, _ in one.updates()} == {"facts", "rows", "run", "arms"}
    assert {name for name, _ in two.updates()} == {"facts", "rows"}
    browser.page.look()
    browser.page.look()
    one.updates(), two.updates()
    browser.page.look()
    assert one.updates() == two.updates() == []
    run.round("fedavg", 1, {"lyon": 0.5, "oslo": 0.5})
    browser.page.look()
    assert [name for name, _ in two.updates()] == ["rows"]
    run.round("fedavg", 2, {"lyon": 0.6, "oslo": 0.6})
    browser.page.look()
    arms = dict(one.updates())["arms"]
    assert [arm["name"] for arm in arms] == ["fedavg-seed0"]
    run.round("fedavg", 3, {"lyon": 0.7, "oslo": 0.7})
    browser.page.look()
    (arm,) = dict(one.updates())["arms"]
    assert (arm["from"], [number for number, _ in arm["rows"]]) == (1, [2, 3])  # only what is new, and the last before


def test_a_new_stream_begins_with_all_runs(run: Run) -> None:
    """A run that was deleted between two streams of a tab is in no row of the second."""
    other = Run(run.path.parent / "other")
    browser = Browser(run.path.parent)
    first = browser.page.watch({})
    assert dict(first.updates())["rows"]["whole"] is True
    delete(other.path)
    browser.page._scanned = 0.0
    browser.page.look()
    run.round("fedavg", 1, {"lyon": 0.5, "oslo": 0.5})
    browser.page.look()
    rows = dict(browser.page.watch({}).updates())["rows"]
    assert ([row["id"] for row in rows["rows"]], rows["whole"]) == ([run.path.name], True)
    assert dict(first.updates())["rows"]["whole"] is False


def test_a_run_that_nobody_watches_is_not_kept_open(run: Run) -> None:
    browser = Browser(run.path.parent)
    watcher = browser.page.watch({"run": run.path.name})
    assert len(browser.page._open) == 1
    del watcher
    browser.page.look()
    assert browser.page._open == {}


def test_a_run_that_is_begun_anew_or_deleted_is_noticed(run: Run) -> None:
    browser = Browser(run.path.parent)
    watcher = browser.page.watch({})
    watcher.updates()
    info = json.loads((run.path / "run.json").read_text())
    time.sleep(0.01)
    (run.path / "run.json").write_text(json.dumps({**info, "title": "Again"}))
    browser.page._scanned = 0.0
    browser.page.look()
    assert dict(watcher.updates())["rows"]["rows"][0]["title"] == "Again"
    for file in run.path.iterdir():
        file.unlink()
    run.path.rmdir()
    browser.page.look()
    assert dict(watcher.updates())["rows"]["gone"] == [run.path.name]


def test_a_stop_is_asked_for_by_its_file(run: Run, held: Any) -> None:
    browser = Browser(run.path.parent)
    browser.page.look()
    assert browser.act("stop", run=run.path.name).status == 422
    process = held(run.path)
    assert str(process.pid) in browser.act("stop", run=run.path.name).json["say"]
    assert (run.path / STOP).exists()


def test_commands_that_the_page_starts(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "heart.toml").write_text("name = 'heart'\n[task]\n[[methods]]\nname = 'fedavg'\n")
    (tmp_path / "other.toml").write_text("[tool]\n")
    browser = Browser(run.path.parent)
    browser.page.look()
    started: list[list[str]] = []

    class Started:
        class process:  # noqa: N801
            pid = 1

    monkeypatch.setattr(browser.page.children, "start", lambda what, words, **more: started.append(words) or Started)  # type: ignore[func-returns-value]
    root, folder = str(run.path.parent), str(run.path)
    assert browser.page.facts()["studies"] == ["heart.toml"]
    assert browser.act("start", study="heart.toml").status == 200
    assert browser.act("resume", run=run.path.name).status == 200
    assert browser.act("report", run=run.path.name).status == 200
    assert started == [
        ["run", str(tmp_path / "heart.toml"), "--out", root],
        ["run", f"{folder}/study.toml", "--resume", "--out", root],
        ["report", folder],
    ]
    for study in ("other.toml", "../heart.toml", "/etc/passwd", "runs/heart-abababab/study.toml", "--help"):
        assert browser.act("start", study=study).status == 404
    for name in ("..", "../x", "", "/etc"):
        assert browser.act("resume", run=name).status == 404
    assert browser.act("compare", runs=[run.path.name, run.path.name]).status == 422  # not finished
    assert browser.act("compare", runs="x").status == 422
    assert len(started) == 3


def test_only_listed_files_are_given(run: Run) -> None:
    report = run.path / "report"
    report.mkdir()
    (report / "report.html").write_text("<p>report")
    (report / "secret.csv").symlink_to("/etc/passwd")
    (run.file("fedavg").parent / "predictions.safetensors").write_bytes(b"patients")
    browser = Browser(run.path.parent)
    browser.page.look()
    ticket = browser.act("file", run=run.path.name, file="report/report.html").json["ticket"]
    assert request(browser.app, "GET", f"/report/{ticket}").body == b"<p>report"
    for file in (
        "../../x",
        "/etc/passwd",
        "report/secret.csv",
        "arms/fedavg-seed0/predictions.safetensors",
        ".lock",
        "",
    ):
        assert browser.act("file", run=run.path.name, file=file).status == 404


def test_a_run_is_deleted_by_its_name_and_not_while_it_runs(run: Run, held: Any) -> None:
    browser = Browser(run.path.parent)
    browser.page.look()
    assert browser.act("delete", run=run.path.name, confirm="yes").status == 422
    process = held(run.path)
    assert browser.act("delete", run=run.path.name, confirm=run.path.name).status == 422
    assert run.path.exists()
    process.kill()
    process.wait()
    assert browser.act("delete", run=run.path.name, confirm=run.path.name).status == 200
    assert not run.path.exists()
    assert browser.page.readers == {}


def test_what_is_no_run_is_not_deleted(tmp_path: Path, run: Run) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(RunError, match="contains no run"):
        delete(tmp_path / "data")
    (tmp_path / "link").symlink_to(run.path)
    with pytest.raises(RunError, match="contains no run"):
        delete(tmp_path / "link")
    assert run.path.exists()


def test_a_viewer_changes_nothing(run: Run) -> None:
    browser = Browser(run.path.parent, VIEWER)
    browser.page.look()
    for act in ("start", "stop", "resume", "report", "compare", "delete"):
        assert browser.act(act, run=run.path.name, confirm=run.path.name, study="x", runs=[]).status == 403
    assert run.path.exists()
    assert browser.act("file", run=run.path.name, file="study.toml").status == 200


def test_looking_holds_up_no_run_that_starts(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock is tried only after it was taken, so that a run does not find it held by the console."""
    reader = RunReader(run.path, "heart")
    (run.path / LOCK).write_text("")
    reader.look()
    calls: list[Path] = []
    monkeypatch.setattr(run_reader, "holder", lambda path: calls.append(path) or holder(path))  # type: ignore[func-returns-value]
    for _ in range(5):
        reader.look()
    assert calls == []
    with open(run.path / LOCK, "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lock.write(str(os.getpid()))
        lock.flush()
        assert holder(run.path) == os.getpid()
        reader.look()
        assert calls == [run.path]


def test_200_runs_are_listed_quickly(tmp_path: Path) -> None:
    for i in range(200):
        run = Run(tmp_path / "runs" / f"heart-{i:08d}", title=f"{EVIL} {i}")
        run.round("fedavg", 1, {"lyon": 0.5, "oslo": 0.5})
    browser = Browser(tmp_path / "runs")
    begun = time.perf_counter()
    watcher = browser.page.watch({})
    rows = dict(watcher.updates())["rows"]["rows"]
    first = time.perf_counter() - begun
    assert len(rows) == 200
    assert rows[0]["title"].startswith(EVIL)  # JSON text; the page makes a text node of it
    for _ in range(20):
        if not browser.page.look():
            break
    begun = time.process_time()
    for _ in range(10):
        browser.page.look()
    assert first < 3.0  # measured 0.2 s; the bar in the browser is 300 ms
    assert (time.process_time() - begun) / 10 < 0.05  # measured 6 ms


def test_metrics_name_no_run(run: Run) -> None:
    run.round("fedavg", 1, {"lyon": 0.5, "oslo": 0.5})
    browser = Browser(run.path.parent)
    browser.page.look()
    text = exposition(browser.page.metrics())
    assert 'polyclinic_runs{state="stopped"} 1' in text
    assert "heart" not in text


def test_the_page_imports_no_pytorch() -> None:
    code = (
        "import sys, polyclinic.console.runs; "
        "print([name for name in ('torch', 'numpy', 'monai', 'nvflare', 'scipy', 'pandas') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
