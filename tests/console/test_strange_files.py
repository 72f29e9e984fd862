"""Files that a crash, a careless person or a hostile site leaves: none stops a page, fills the memory, or leads outside."""

import json
import os
import time
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="the extra [console] is not installed")

from polyclinic.console.run_reader import LAST_FAULTS, RunReader
from polyclinic.console.server_runs import ServerRuns
from polyclinic.console.tail import MAX_LINE, PIECE, JournalTail, Tail, open_regular
from polyclinic.engines.flare.protocol.paths import ServerFolder
from polyclinic.engines.flare.protocol.shared_journals import SharedJournal
from tests.console.test_runs_page import EVIL, Browser, Run
from tests.console.test_server_page import queue, record, server_folder


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "runs" / "heart-abababab")


def whole(tail: Tail) -> tuple[list[bytes], int]:
    """All lines of a file, and the number of readings."""
    lines, readings = tail.more()[0], 1
    while tail.behind:
        more, _ = tail.more()
        lines, readings = lines + more, readings + 1
    return lines, readings


@pytest.mark.parametrize("size", [2**25, pytest.param(2**30, marks=pytest.mark.slow)])
def test_a_line_of_a_gigabyte_is_left_out_without_reading_it_at_once(tmp_path: Path, size: int) -> None:
    path = tmp_path / "records.jsonl"
    with path.open("wb") as file:
        file.write(b'{"a":1}\n{"x":"')
        file.seek(size)  # takes no disk
        file.write(b'"}\n{"a":2}\n')
    tail = Tail(path)
    lines, readings = whole(tail)
    assert lines == [b'{"a":1}', b"", b'{"a":2}']
    assert readings >= size / MAX_LINE
    assert tail.more() == ([], False)


@pytest.mark.parametrize("length", [PIECE - 1, PIECE, PIECE + 1, MAX_LINE - 2, MAX_LINE - 1])
def test_lines_up_to_the_limit_are_whole(tmp_path: Path, length: int) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"a" * length + b"\n" + b"b\n")
    lines, _ = whole(Tail(path))
    assert [len(line) for line in lines] == [length, 1]


def test_a_long_line_that_is_still_written_is_left_out_once(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"a" * (MAX_LINE + 5))
    tail = Tail(path)
    assert whole(tail)[0] == []
    with path.open("ab") as file:
        file.write(b"aaa\nb\n")
    assert whole(tail)[0] == [b"", b"b"]
    path.write_bytes(b"c\n")
    assert tail.more() == ([b"c"], True)


def test_a_long_line_in_a_journal_breaks_its_chain(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    SharedJournal(path).write("a")
    with path.open("ab") as file:
        file.write(b"x" * (MAX_LINE + 1) + b"\n")
    tail = JournalTail(path)
    while True:
        tail.more()
        if not tail.behind:
            break
    assert tail.broken.startswith("entry 2 ")


def test_a_journal_is_read_within_its_time(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes((b'{"a":"' + b"x" * 1000 + b'"}\n') * 3000)
    tail = JournalTail(path)
    assert 0 < len(tail.more(0.0)[0]) < 3000
    assert tail.behind
    tail.more(60.0)
    assert (tail.count, tail.behind) == (3000, False)


@pytest.mark.parametrize("kind", ["pipe", "endless", "folder", "loop"])
def test_what_is_no_file_is_not_read(run: Run, kind: str) -> None:
    """A pipe would block every page, and /dev/zero would never end."""
    arm = run.file("fedavg").parent
    for path in (run.path / "journal.jsonl", run.file("fedavg"), arm / "now.json", run.path / ".lock"):
        path.unlink(missing_ok=True)
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        else:
            path.symlink_to("/dev/zero" if kind == "endless" else path.name)
        with pytest.raises(OSError, match=r"."):
            open_regular(path)
    browser = Browser(run.path.parent)
    begun = time.monotonic()
    browser.page.look()
    rows = dict(browser.page.watch({"run": run.path.name}).updates())["rows"]["rows"]
    assert [row["id"] for row in rows] == ["heart-abababab"]
    assert time.monotonic() - begun < 5


def test_a_description_that_is_a_pipe_hides_no_other_run(run: Run) -> None:
    other = Run(run.path.parent / "other")
    (other.path / "run.json").unlink()
    os.mkfifo(other.path / "run.json")
    (run.path.parent / "linked").symlink_to("/")
    assert list(Browser(run.path.parent).page.watch({}).page.readers) == ["heart-abababab"]


def test_records_cut_in_the_middle_are_read_up_to_there(run: Run) -> None:
    for number in (1, 2):
        run.round("fedavg", number, {"lyon": 0.6, "oslo": 0.7})
    data = run.file("fedavg").read_bytes()
    run.file("fedavg").write_bytes(data[:-40])
    reader = RunReader(run.path, "heart")
    reader.look()
    arm = reader.arms["fedavg", 0, 0]
    assert (arm.round, arm.scored[1]) == (2, {"lyon": 0.6})
    (run.path / "run.json").write_bytes((run.path / "run.json").read_bytes()[:-9])
    assert Browser(run.path.parent).page.watch({}).page.readers == {}


def test_one_record_of_another_version_hides_no_other(run: Run) -> None:
    run.round("fedavg", 1, {"lyon": 0.6, "oslo": 0.7})
    run.write("fedavg", "round", round="two")
    run.write("fedavg", "scores", round=None, site="lyon", metrics=3)
    run.write("fedavg", "quarantine", site="lyon")
    run.round("fedavg", 2, {"lyon": 0.7, "oslo": 0.8})
    reader = RunReader(run.path, "heart")
    reader.look()
    assert reader.arms["fedavg", 0, 0].round == 2


def test_10_000_faults_of_a_site_are_counted_and_the_last_are_shown(run: Run) -> None:
    reason = EVIL + "\x1b[2J" + "x" * 400
    with run.file("fedavg").open("a") as file:
        for number in range(10_000):
            fact = {
                "kind": "quarantine",
                "method": "fedavg",
                "seed": 0,
                "round": number,
                "site": "oslo",
                "reason": reason,
            }
            file.write(json.dumps(fact) + "\n")
    browser = Browser(run.path.parent)
    watcher = browser.page.watch({"run": run.path.name})
    for _ in range(200):
        if not browser.page.look():
            break
    (_, detail), *_ = [event for event in watcher.updates() if event[0] == "run"]
    assert detail["faults"] == 10_000
    assert len(detail["fault"]) == LAST_FAULTS
    assert detail["fault"][-1]["round"] == 9999
    assert "\x1b" not in detail["fault"][-1]["reason"]
    assert len(json.dumps(detail)) < 200_000


def test_10_000_faults_at_a_server_are_counted_and_the_last_are_shown(tmp_path: Path) -> None:
    home: ServerFolder = server_folder(tmp_path / "server")
    queue(home, "run-1")
    facts = [{"kind": "quarantine", "round": i, "site": "oslo", "reason": "x" * 400} for i in range(10_000)]
    record(home, "run-1", *facts)
    runs = ServerRuns(home)
    runs.look(0.0)
    assert runs.reading == 1  # 5 MB are not read at once
    looks = 0
    while runs.reading:
        looks += runs.look(0.1)
    assert runs.all["run-1"].count_of_faults == 10_000
    assert [fault["round"] for fault in runs.faults()[:2]] == [9999, 9998]
    assert len(json.dumps(runs.faults())) < 100_000


def test_the_runs_at_work_are_read_first_and_what_is_behind_follows(tmp_path: Path) -> None:
    home: ServerFolder = server_folder(tmp_path / "server")
    for i in range(20):
        queue(home, f"done-{i}", "finished", {})
        record(home, f"done-{i}", {"kind": "round", "round": 1, "bytes_up": {"lyon": 1}})
    queue(home, "at-work", progress={})
    record(home, "at-work", {"kind": "round", "round": 1, "bytes_up": {"lyon": 1}})
    runs = ServerRuns(home)
    runs.look(0.0)
    assert runs.all["at-work"].up == {"lyon": 1}
    assert runs.reading == 19
    while runs.reading:
        runs.look(0.0)
    assert runs.totals()["lyon"]["sent"] == 21
