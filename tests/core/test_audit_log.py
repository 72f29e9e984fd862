"""The journal's chain, byte by byte: what is written, what is distinguished, and what a full disk leaves."""

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from polyclinic.core.audit_log import FIRST, Broken, Journal, verify


def sealed(entry: dict[str, Any]) -> dict[str, Any]:
    """``entry`` with the hash that it must have: SHA-256 of compact JSON with sorted keys."""
    rest = {k: v for k, v in entry.items() if k != "hash"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()
    return {**rest, "hash": hashlib.sha256(text).hexdigest()}


def line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry, separators=(",", ":")).encode() + b"\n"


def written(path: Path, count: int = 4) -> list[dict[str, Any]]:
    journal = Journal(path)
    for i in range(count):
        journal.write("round", {"round": i})
    journal.close()
    return list(verify(path))


def test_the_bytes_of_a_journal(tmp_path: Path) -> None:
    """Anybody can check it with a JSON parser and SHA-256."""
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    assert journal.head == FIRST == "0" * 64
    first = sealed({"seq": 0, "event": "began", "previous": "0" * 64})
    second = sealed({"seq": 1, "event": "ende\u0301", "who": "\u4e2d", "previous": first["hash"]})
    assert journal.write("began") == journal.head == first["hash"]
    assert journal.write("ende\u0301", {"who": "\u4e2d"}) == journal.head == second["hash"]
    journal.close()
    assert path.read_bytes() == line(first) + line(second)
    assert path.read_bytes().isascii()
    assert list(verify(path)) == [first, second]


def test_a_journal_goes_on_where_it_ended(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    last = written(path)[-1]
    journal = Journal(path)
    assert journal.head == last["hash"]
    journal.write("more")
    journal.close()
    assert [(e["seq"], e["previous"] == last["hash"]) for e in verify(path)][-2:] == [(3, False), (4, True)]


def test_a_journal_that_is_no_longer_used_is_closed(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.jsonl")
    file = journal._file
    journal.write("a")
    del journal
    assert file.closed


def test_an_empty_file_is_a_journal_of_nothing(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.touch()
    assert list(verify(path)) == []
    assert Journal(path).write("one") == next(verify(path))["hash"]


@pytest.mark.parametrize("change", [{"seq": 9}, {"seq": 1}, {"previous": "1" * 64}, {"round": 7}, {"event": "other"}])
def test_an_entry_that_was_sealed_anew_does_not_fit_its_place_or_the_next_one(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    """An attacker who changes an entry can compute its hash again, but then the chain breaks, there or one line on."""
    path = tmp_path / "journal.jsonl"
    entries = written(path)
    entries[2] = sealed({**entries[2], **change})
    path.write_bytes(b"".join(map(line, entries)))
    where = 3 if {"seq", "previous"} & change.keys() else 4
    with pytest.raises(Broken, match=rf"journal.jsonl:{where}: this entry was changed, or an earlier one was removed"):
        list(verify(path))
    read = verify(path)
    assert [next(read)["seq"] for _ in range(where - 1)] == list(range(where - 1)), "what comes before it is valid"


@pytest.mark.parametrize("key", ["seq", "event", "previous", "hash", "round"])
def test_an_entry_with_a_key_taken_out_is_broken(tmp_path: Path, key: str) -> None:
    path = tmp_path / "journal.jsonl"
    entries = written(path)
    del entries[1][key]
    path.write_bytes(b"".join(map(line, entries)))
    with pytest.raises(Broken, match=r"journal.jsonl:2:"):
        list(verify(path))


@pytest.mark.parametrize(
    "text", [b"[]", b"3", b"null", b'"seq"', b"{}", b"", b"{", b"[" * 100_000, b"\xff\xfe", b'{"seq":0}']
)
def test_a_line_of_anything_else_is_broken(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(text + b"\n")
    with pytest.raises(Broken, match=r"journal.jsonl:1:"):
        list(verify(path))
    with pytest.raises(Broken):
        Journal(path)


def test_what_was_cut_off_the_end_is_known_to_who_kept_the_head(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    entries = written(path)
    path.write_bytes(b"".join(map(line, entries[:-1])))
    assert [e["hash"] for e in verify(path)][-1] != entries[-1]["hash"]


@pytest.mark.parametrize("whole", [0, 1, 3])
def test_only_the_torn_line_is_cut(tmp_path: Path, whole: int) -> None:
    path = tmp_path / "journal.jsonl"
    written(path, whole)
    before = path.read_bytes()
    path.write_bytes(before + b'{"seq": 3, "ev')
    Journal(path).close()
    assert path.read_bytes() == before


def test_a_line_that_ends_is_never_cut(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    written(path, 1)
    before = path.read_bytes()
    path.write_bytes(before + b"x\n")
    with pytest.raises(Broken, match=":2:"):
        Journal(path)
    assert path.read_bytes() == before + b"x\n"


def test_every_entry_is_on_the_disk_before_it_is_acknowledged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, synced = tmp_path / "journal.jsonl", []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append((os.fstat(fd).st_ino, os.fstat(fd).st_size)))
    journal = Journal(path)
    for i in range(3):
        journal.write("one")
        assert len(synced) == i + 1
        assert synced[-1] == (path.stat().st_ino, path.stat().st_size)
    assert path.stat().st_size > 0


class Short:
    """A file on a disk that has room for only ``room`` bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        return int(self.file.write(data[: self.room]))

    def fileno(self) -> int:
        return int(self.file.fileno())


def test_half_a_line_on_a_full_disk_is_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    last, before = written(path)[-1], path.read_bytes()
    journal = Journal(path)
    file = journal._file
    journal._file = Short(file, 10)  # type: ignore[assignment]
    with pytest.raises(OSError, match=r"No space left") as error:
        journal.write("lost")
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(path))
    assert (path.read_bytes(), journal.head) == (before, last["hash"])
    journal._file = file
    journal.write("kept")
    assert [e["event"] for e in verify(path)] == ["round"] * 4 + ["kept"]


def test_what_the_disk_does_not_confirm_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal.jsonl"
    last, before = written(path)[-1], path.read_bytes()
    journal = Journal(path)
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(errno.EIO, "it broke")))
        with pytest.raises(OSError, match="it broke"):
            journal.write("lost")
    assert (path.read_bytes(), journal.head) == (before, last["hash"])
    journal.write("kept")
    assert len(list(verify(path))) == 5


def test_a_closed_journal_takes_no_more(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.close()
    with pytest.raises(ValueError, match="closed file"):
        journal.write("late")
