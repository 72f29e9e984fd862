"""The cache: built once, read back equal, rebuilt when damaged, never half written."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from polyclinic.data import cache as caching
from polyclinic.data.cache import cached
from polyclinic.data.examples import DataError


def test_built_once_and_read_back_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time nothing is built, and every value and type is the same."""
    monkeypatch.setenv("POLYCLINIC_CACHE", str(tmp_path))
    made: dict[str, Any] = {
        "images": torch.randint(0, 255, (3, 4), dtype=torch.uint8),
        "means": torch.rand(3).double(),
        "ids": ["a", "ü"],
    }
    assert cached("kind", "key", lambda: dict(made)).keys() == made.keys()
    again = cached("kind", "key", lambda: pytest.fail("built again"))
    assert torch.equal(again["images"], made["images"])
    assert torch.equal(again["means"], made["means"])
    assert again["ids"] == ["a", "ü"]
    assert [path.name for path in (tmp_path / "kind").iterdir()] == ["key.safetensors"]


def test_what_was_just_built_is_mapped_from_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYCLINIC_CACHE", str(tmp_path))
    built = torch.arange(1000)
    stored = cached("kind", "key", lambda: {"x": built})["x"]
    assert torch.equal(stored, built)
    assert stored.data_ptr() != built.data_ptr()


def test_what_is_read_can_be_changed_without_changing_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mapping is private."""
    monkeypatch.setenv("POLYCLINIC_CACHE", str(tmp_path))
    cached("kind", "key", lambda: {"x": torch.zeros(5)})
    cached("kind", "key", dict)["x"].add_(1)
    assert cached("kind", "key", dict)["x"].tolist() == [0] * 5


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "noise"])
def test_a_damaged_file_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    """One bit, a cut, nothing at all, or another file: the result is what was built."""
    monkeypatch.setenv("POLYCLINIC_CACHE", str(tmp_path))
    cached("kind", "key", lambda: {"x": torch.arange(1000)})
    path = tmp_path / "kind" / "key.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes({"flip": bytes(data), "cut": bytes(data[:-9]), "empty": b"", "noise": b"\xff" * 50}[damage])
    built = []
    again = cached("kind", "key", lambda: built.append(1) or {"x": torch.arange(1000)})  # type: ignore[func-returns-value]
    assert built == [1]
    assert torch.equal(again["x"], torch.arange(1000))
    assert cached("kind", "key", lambda: pytest.fail("built a third time"))


def test_a_cache_that_cannot_be_written_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file exists in place of the folder."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("POLYCLINIC_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="point POLYCLINIC_CACHE at a writable folder"):
        cached("kind", "key", lambda: {"x": torch.zeros(1)})


def test_the_folder_is_this_users_own_unless_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """POLYCLINIC_CACHE wins; else a folder that is called polyclinic."""
    monkeypatch.delenv("POLYCLINIC_CACHE", raising=False)
    assert "polyclinic" in caching.folder().parts
    monkeypatch.setenv("POLYCLINIC_CACHE", "/elsewhere")
    assert caching.folder() == Path("/elsewhere")


def test_the_hash_of_a_large_file_is_remembered_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of one that was just written, nor of a small one; a change of the same size and time of modification counts."""
    monkeypatch.setenv("POLYCLINIC_CACHE", str(tmp_path / "cache"))
    file, read = tmp_path / "large", list[Path]()

    def content(path: Path) -> str:
        read.append(path)
        return path.read_bytes()[:1].decode()

    file.write_bytes(b"a" * caching.SMALL)
    assert [caching.remembered(file, content) for _ in range(2)] == ["a", "a"]
    assert len(read) == 2  # it may still be changing
    monkeypatch.setattr(caching, "SETTLED", -10)
    assert [caching.remembered(file, content) for _ in range(3)] == ["a"] * 3
    assert len(read) == 3
    before = file.stat()
    file.write_bytes(b"b" * caching.SMALL)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert caching.remembered(file, content) == "b"
    for note in (tmp_path / "cache").rglob("*.json"):
        note.write_text("{")
    assert caching.remembered(file, content) == "b"
    small = tmp_path / "small"
    small.write_bytes(b"c")
    read.clear()
    assert [caching.remembered(small, content) for _ in range(2)] == ["c", "c"]
    assert len(read) == 2
