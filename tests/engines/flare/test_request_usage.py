"""A site's record of one run: what was asked and answered stays known, whatever is restarted, and cannot be edited."""

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from polyclinic.core.audit_log import Broken, verify
from polyclinic.engines.flare.client.request_usage import Answered, Usage
from polyclinic.engines.request_schedule import Request

FIRST = Request(0, "train", "aa")
OTHER = Request(0, "train", "bb")
LATER = Request(1, "train", "aa")
SCORE = Request(0, "score/val", "aa")


def reopened(usage: Usage) -> Usage:
    """The record as the next start of the site finds it."""
    usage.close()
    return Usage(usage.path)


@pytest.fixture
def usage(tmp_path: Path) -> Usage:
    return Usage(tmp_path / "usage.jsonl")


def test_nothing_is_written_before_something_is_asked(usage: Usage) -> None:
    assert usage.progress.contents == {}
    assert usage.find(FIRST) == Answered(0, "", {})
    assert usage.marks(0, ["train"]) == []
    usage.close()
    assert not usage.path.exists()


def test_what_was_begun_is_the_content_of_its_round_and_job_and_not_yet_answered(usage: Usage) -> None:
    """A crash during execution must not let another content take its place."""
    usage.begin(FIRST, 5)
    for now in (usage, reopened(usage)):
        assert now.progress.contents == {(0, "train"): frozenset({"aa"})}
        assert now.find(FIRST) == Answered(0, "", {})
        assert now.marks(0, ["train"]) == []


def test_every_execution_of_a_content_is_counted_over_restarts(usage: Usage) -> None:
    """Repetitions are limited, so none may be forgotten; the last reply is the one that counts."""
    for times in (1, 2, 3):
        usage.begin(FIRST, times)
        usage.answer(FIRST, times, f"reply-{times}", {"params": f"p{times}"})
        assert usage.find(FIRST) == Answered(times, f"reply-{times}", {"params": f"p{times}"})
        usage = reopened(usage)
        assert usage.find(FIRST) == Answered(times, f"reply-{times}", {"params": f"p{times}"})


def test_contents_are_told_apart_by_round_job_and_content(usage: Usage) -> None:
    for number, asked in enumerate((FIRST, OTHER, LATER, SCORE)):
        usage.begin(asked, number)
        usage.answer(asked, number, f"reply-{number}", {})
    for now in (usage, reopened(usage)):
        assert now.progress.contents == {
            (0, "train"): frozenset({"aa", "bb"}),
            (1, "train"): frozenset({"aa"}),
            (0, "score/val"): frozenset({"aa"}),
        }
        assert [now.find(asked).sha256 for asked in (FIRST, OTHER, LATER, SCORE)] == [f"reply-{n}" for n in range(4)]
        assert [now.find(asked).times for asked in (FIRST, OTHER, LATER, SCORE)] == [1, 1, 1, 1]
        for unasked in (Request(2, "train", "aa"), Request(1, "score/val", "aa"), Request(0, "train", "cc")):
            assert now.find(unasked) == Answered()


def test_digests_are_those_of_the_round_and_jobs_that_were_asked_for(usage: Usage) -> None:
    """By them a site tells whether two requests of one round hold the same model."""
    said = {FIRST: {"params": "1"}, OTHER: {"params": "2"}, LATER: {"params": "3"}, SCORE: {"params": "4"}}
    for number, (asked, marks) in enumerate(said.items()):
        usage.begin(asked, number)
        usage.answer(asked, number, "reply", marks)
    unmarked = Request(0, "train", "dd")
    usage.begin(unmarked, 9)
    usage.answer(unmarked, 9, "reply", {})
    for now in (usage, reopened(usage)):
        assert now.marks(0, ["train"]) == [{"params": "1"}, {"params": "2"}]
        assert now.marks(0, ["score/val", "train"]) == [{"params": "4"}, {"params": "1"}, {"params": "2"}]
        assert now.marks(1, ["train", "score/val"]) == [{"params": "3"}]
        assert now.marks(0, []) == now.marks(2, ["train"]) == []


def test_the_record_says_what_was_asked_and_what_was_answered(usage: Usage) -> None:
    usage.begin(FIRST, 5)
    usage.answer(FIRST, 6, "reply", {"params": "1"})
    first, second = verify(usage.path)
    about = {"round": 0, "job": "train", "content": "aa"}
    assert {key: first[key] for key in first.keys() - {"seq", "previous", "hash"}} == {
        "event": "begun",
        **about,
        "number": 5,
    }
    answered = {"event": "answered", **about, "number": 6, "reply": "reply", "marks": {"params": "1"}}
    assert {key: second[key] for key in second.keys() - {"seq", "previous", "hash"}} == answered


def test_a_reopened_record_is_continued(usage: Usage) -> None:
    usage.begin(FIRST, 0)
    again = reopened(usage)
    again.answer(FIRST, 0, "reply", {})
    again.close()
    again.begin(LATER, 1)  # closing is no end: the next start, or a late message, continues
    assert [entry["event"] for entry in verify(usage.path)] == ["begun", "answered", "begun"]
    assert Usage(usage.path).progress.contents == {(0, "train"): frozenset({"aa"}), (1, "train"): frozenset({"aa"})}


def test_a_line_that_a_crash_tore_was_never_acknowledged(usage: Usage) -> None:
    usage.begin(FIRST, 0)
    usage.close()
    with open(usage.path, "ab") as file:
        file.write(b'{"seq":1,"event":"answ')
    again = Usage(usage.path)
    assert again.find(FIRST) == Answered()
    again.answer(FIRST, 0, "reply", {})
    assert Usage(usage.path).find(FIRST).times == 1


@pytest.mark.parametrize(
    "change", ['"round":0', '"content":"aa"', '"event":"answered"', '"reply":"reply"', '"params":"1"']
)
def test_a_record_that_was_edited_is_not_read(usage: Usage, change: str) -> None:
    usage.begin(FIRST, 0)
    usage.answer(FIRST, 0, "reply", {"params": "1"})
    usage.close()
    text = usage.path.read_text()
    assert change in text
    usage.path.write_text(text.replace(change, change[:-1] + ("7" if change[-1] != '"' else 'x"'), 1))
    with pytest.raises(Broken, match="was changed"):
        Usage(usage.path)


def test_only_the_sites_user_may_read_the_record(usage: Usage) -> None:
    usage.begin(FIRST, 0)
    assert stat.S_IMODE(usage.path.stat().st_mode) == 0o600


def test_a_new_record_is_on_the_disk_by_its_name_too(usage: Usage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the whole file could be gone after a power failure, and every request could be made again."""
    forced, fsync = [], os.fsync

    def noted(handle: int) -> Any:
        forced.append(os.fstat(handle).st_ino)
        return fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    usage.begin(FIRST, 0)
    assert {usage.path.stat().st_ino, usage.path.parent.stat().st_ino} <= set(forced)


def test_what_cannot_be_written_is_not_taken_as_answered(usage: Usage, monkeypatch: pytest.MonkeyPatch) -> None:
    usage.begin(FIRST, 0)

    def full(handle: int) -> None:
        raise OSError(28, "no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="no space"):
            usage.answer(FIRST, 0, "reply", {})
    for now in (usage, reopened(usage)):
        assert now.find(FIRST) == Answered()


def test_a_closed_record_holds_no_file_open(usage: Usage) -> None:
    usage.begin(FIRST, 0)
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 1
    usage.close()
    usage.close()
    assert before == (len(os.listdir("/proc/self/fd")) + 1 if Path("/proc/self/fd").exists() else 1)
