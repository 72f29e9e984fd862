"""Remembered hashes of sources: never out of date, and of no use to another user."""

import json
import os
import re
from pathlib import Path

import pytest

from polyclinic.core.syntax_hash import hash_of_source
from polyclinic.engines.flare.protocol import source_hashes

SOURCES = [b"x = 1\n", b'"""Words."""\n', b"def f():\n    return 2\n"]
EXPECTED = [hash_of_source(source) for source in SOURCES]


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that ``SOURCES`` left."""
    monkeypatch.setenv("POLYCLINIC_CACHE", str(tmp_path))
    assert source_hashes.hashes_of(SOURCES) == EXPECTED
    (path,) = tmp_path.glob("syntax-hashes/*.json")
    return path


def parsed(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Record the sources that are parsed from now on."""
    seen: list[bytes] = []

    def record(source: bytes) -> str:
        seen.append(source)
        return hash_of_source(source)

    monkeypatch.setattr(source_hashes, "hash_of_source", record)
    return seen


def test_only_new_contents_are_parsed(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = parsed(monkeypatch)
    assert source_hashes.hashes_of(SOURCES) == EXPECTED
    assert not seen
    assert source_hashes.hashes_of([SOURCES[2], b"x = 3\n"]) == [EXPECTED[2], hash_of_source(b"x = 3\n")]
    assert seen == [b"x = 3\n"]
    assert re.fullmatch(r"python3\.\d+-[0-9a-f]{16}\.json", table.name)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"checksum": 1, "hashes": 2}', "\0" * 80])
def test_a_damaged_table_is_ignored_and_replaced(table: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    table.write_text(content)
    assert source_hashes.hashes_of(SOURCES) == EXPECTED
    seen = parsed(monkeypatch)
    assert source_hashes.hashes_of(SOURCES) == EXPECTED
    assert not seen


def test_a_changed_hash_is_noticed(table: Path) -> None:
    stored = json.loads(table.read_text())
    stored["hashes"] = dict.fromkeys(stored["hashes"], "0" * 64)
    table.write_text(json.dumps(stored))
    assert source_hashes.hashes_of(SOURCES) == EXPECTED


@pytest.mark.parametrize("which", ["file", "folder", "link"])
def test_a_table_that_others_can_write_is_not_read(table: Path, monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    if which == "link":
        other = table.with_name("other")
        table.rename(other)
        table.symlink_to(other)
    else:
        os.chmod(table if which == "file" else table.parent, 0o777)
    seen = parsed(monkeypatch)
    assert source_hashes.hashes_of(SOURCES) == EXPECTED
    assert seen == SOURCES


def test_without_a_writable_folder_sources_are_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("POLYCLINIC_CACHE", str(tmp_path / "file"))
    assert source_hashes.hashes_of(SOURCES) == EXPECTED
