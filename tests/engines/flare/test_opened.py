"""Which secure sums a site helps to open: by what is summed, over all runs, whatever the server calls it."""

import json
import multiprocessing
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from polyclinic.engines.flare.client.opened_sums import NotOpened, Opened, Summed

FIVE = ("a", "b", "c", "d", "e")
FOUR = ("a", "b", "c", "d")


def summed(content: str = "x", run: str = "run-1", round: int = 0, job: str = "train", static: bool = False) -> Summed:
    return Summed(run, round, job, content, static)


def refused(opened: Opened, what: Summed, roster: Any, min_sites: int = 3) -> str:
    said = opened.problem(what, roster, min_sites) or ""
    try:
        opened.record(what, roster, min_sites)
        recorded = ""
    except NotOpened as error:
        recorded = str(error)
    assert said == recorded
    return said


@pytest.fixture
def opened(tmp_path: Path) -> Opened:
    return Opened(tmp_path / "opened.jsonl")


def test_the_same_roster_may_be_opened_again_and_is_written_once(opened: Opened) -> None:
    for _ in range(3):
        assert refused(opened, summed(), FIVE) == ""
    assert refused(opened, summed(), FIVE[::-1]) == ""
    assert len(opened.path.read_text().splitlines()) == 1


@pytest.mark.parametrize(
    "other",
    [
        summed(),
        summed(run="run-2"),
        summed(round=1),
        summed(job="train "),
        summed(job="send", round=7, run="another"),
        summed("fresh"),
        summed(""),
    ],
    ids=["same", "run", "round", "job", "everything else", "values made afresh", "zeros"],
)
def test_values_that_were_opened_are_not_opened_over_a_roster_that_differs_in_few_sites(
    other: Summed, opened: Opened
) -> None:
    assert refused(opened, summed(), FIVE) == ""
    said = refused(opened, other, FOUR)
    assert "over a, b, c, d, e was opened already; one over others would show what 1 of them sent" in said
    assert "3 are the least here" in said


def test_other_values_of_another_round_are_opened_over_whoever_is_there(opened: Opened) -> None:
    assert refused(opened, summed(), FIVE) == ""
    assert refused(opened, summed("y", round=1), FOUR) == ""
    assert refused(opened, summed("z", job="send"), FOUR) == ""
    assert refused(opened, summed("w", run="run-2"), FOUR) == ""


@pytest.mark.parametrize(
    ("second", "min_sites", "fits"),
    [
        (("c", "d", "e", "f"), 3, True),  # apart: a, b, f
        (("b", "c", "d", "e", "f"), 3, False),  # apart: a, f
        (("c", "d", "e", "f"), 4, False),
        (("c", "d", "e", "f", "g"), 4, True),
        (("b", "c", "d", "e", "f"), 2, False),
        (FOUR, 0, False),
        (("c", "d", "e", "f"), 0, True),
    ],
)
def test_a_second_roster_differs_in_as_many_sites_as_the_policy_asks_for(
    second: Any, min_sites: int, fits: bool, opened: Opened
) -> None:
    assert refused(opened, summed(), FIVE, min_sites) == ""
    assert bool(refused(opened, summed(), second, min_sites)) == (not fits)


def test_there_is_never_a_third_roster(opened: Opened) -> None:
    assert refused(opened, summed(), ("a", "b", "c")) == ""
    assert refused(opened, summed(run="run-2"), ("d", "e", "f")) == ""
    assert "a third is never opened" in refused(opened, summed(run="run-3"), ("g", "h", "i"))
    for roster in (("a", "b", "c"), ("d", "e", "f")):
        assert refused(opened, summed(run="run-3", round=len(roster[0])), roster) == ""


def test_a_static_statistic_is_summed_once_in_a_run(opened: Opened) -> None:
    static = summed(job="count", static=True)
    assert refused(opened, static, ("a", "b", "c")) == ""
    assert refused(opened, static, ("a", "b", "c")) == ""
    assert "and a run opens one of them" in refused(opened, static, ("d", "e", "f"))
    assert "and a run opens one of them" in refused(
        opened, summed("y", job="count", static=True, round=1), ("d", "e", "f")
    )
    assert refused(opened, summed(job="count", static=True, run="run-2"), ("d", "e", "f")) == ""
    assert refused(opened, summed("z", job="moments", static=True), ("d", "e", "f")) == ""


def test_zeros_tell_nothing_but_a_request_has_one_roster(opened: Opened) -> None:
    assert refused(opened, summed(""), FIVE) == ""
    assert refused(opened, summed("", round=1), FOUR) == ""
    assert "was opened already" in refused(opened, summed(""), FOUR)


def test_what_was_opened_is_remembered_for_ever_and_by_all(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda handle: None)
    for k in range(1200):
        opened.record(summed(f"noise {k}", round=k), FIVE, 3)
    first = Opened(opened.path)
    assert "was opened already" in refused(first, summed("noise 0", run="another"), FOUR)
    opened.record(summed("late", run="run-9"), FIVE, 3)
    assert "was opened already" in refused(first, summed("late", run="another"), FOUR)  # read though it is open


def test_a_full_record_opens_nothing_rather_than_forget(opened: Opened) -> None:
    opened.record(summed(), FIVE, 3)
    size = opened.path.stat().st_size
    exact = Opened(opened.path, limit=2 * size)
    exact.record(summed("y", round=1), FIVE, 3)
    assert exact.path.stat().st_size == 2 * size
    with pytest.raises(NotOpened, match=r"opened\.jsonl, is full"):
        exact.record(summed("z", round=2), FIVE, 3)
    exact.record(summed(), FIVE, 3)  # needs no room
    assert exact.path.stat().st_size == 2 * size


def test_a_torn_line_is_cut_off_and_a_changed_one_stops_everything(opened: Opened) -> None:
    opened.record(summed(), FIVE, 3)
    whole = opened.path.read_bytes()
    opened.path.write_bytes(whole + b'{"run":"run-2"')
    again = Opened(opened.path)
    assert "was opened already" in str(again.problem(summed(), FOUR, 3))
    assert opened.path.read_bytes() == whole
    again.record(summed("y", round=1), FIVE, 3)
    for damage in (b"{}\n", b"nonsense\n", b'{"roster":1}\n', b"[]\n", whole.replace(b"static", b"statik")):
        opened.path.write_bytes(whole + damage)
        with pytest.raises(NotOpened, match="damaged"):
            Opened(opened.path).record(summed("z", round=3), FIVE, 3)
    opened.path.write_bytes(whole)
    with pytest.raises(NotOpened, match="damaged"):
        again.record(summed("z", round=3), FIVE, 3)  # shorter than what this process has read


def test_a_disk_that_is_full_notes_nothing_and_opens_nothing(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    opened.record(summed(), FIVE, 3)
    whole = opened.path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space"):
        opened.record(summed("y", round=1), FIVE, 3)
    monkeypatch.undo()
    assert opened.path.read_bytes() == whole
    assert opened.problem(summed("y", round=1), FOUR, 3) is None


def _race(path: str, barrier: Any, roster: Any, said: Any) -> None:
    opened = Opened(Path(path))
    barrier.wait()
    try:
        opened.record(summed(run=f"run-{len(roster)}"), roster, 3)
        said.put("opened")
    except NotOpened:
        said.put("refused")


def test_two_runs_at_once_do_not_open_two_rosters(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, said = context.Barrier(2), context.Queue()
    both = [context.Process(target=_race, args=(str(tmp_path / "o.jsonl"), barrier, r, said)) for r in (FIVE, FOUR)]
    for process in both:
        process.start()
    for process in both:
        process.join(30)
    assert sorted(said.get(timeout=5) for _ in both) == ["opened", "refused"]
    assert len([json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]) == 1


def test_a_run_waits_while_another_one_records_a_sum(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other run has checked its roster and not yet written it: without a lock, both would be opened."""
    other, begun = Opened(opened.path), threading.Event()
    append = other._append

    def slowly(line: bytes) -> None:
        begun.set()
        time.sleep(0.3)
        append(line)

    monkeypatch.setattr(other, "_append", slowly)
    thread = threading.Thread(target=other.record, args=(summed(), FIVE, 3))
    thread.start()
    assert begun.wait(10)
    with pytest.raises(NotOpened, match="over a, b, c, d, e was opened already"):
        opened.record(summed(run="run-2"), FOUR, 3)
    thread.join()


def test_a_record_holds_a_quarter_of_a_gibibyte_unless_it_is_told_otherwise(tmp_path: Path) -> None:
    opened = Opened(tmp_path / "opened.jsonl")
    assert opened.limit == 268_435_456


def test_a_sum_is_of_values_that_may_come_again_unless_it_says_that_it_is_static(opened: Opened) -> None:
    assert refused(opened, Summed("run-1", 0, "train", "x"), ("a", "b", "c")) == ""
    assert refused(opened, Summed("run-1", 1, "train", "y"), ("d", "e", "f")) == ""
    assert json.loads(opened.path.read_text().splitlines()[0])["static"] is False


def test_only_the_site_itself_reads_the_record(opened: Opened) -> None:
    opened.record(summed(), FIVE, 3)
    assert opened.path.stat().st_mode & 0o777 == 0o600


def test_a_line_that_is_written_in_part_opens_nothing(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.write", lambda handle, data: len(data) - 1)
    with pytest.raises(OSError, match="could not be written"):
        opened.record(summed(), FIVE, 3)
    monkeypatch.undo()
    assert opened.problem(summed(), FOUR, 3) is None


@pytest.mark.parametrize("torn", [b"{", b'{"run":"run-2"'])
def test_a_torn_line_after_several_is_cut_off_alone(opened: Opened, torn: bytes) -> None:
    opened.record(summed(), FIVE, 3)
    opened.record(summed("y", round=1), FIVE, 3)
    whole = opened.path.read_bytes()
    opened.path.write_bytes(whole + torn)
    assert "was opened already" in str(Opened(opened.path).problem(summed("y"), FOUR, 3))
    assert opened.path.read_bytes() == whole
