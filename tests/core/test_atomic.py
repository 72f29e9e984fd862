"""Law of atomic writing: whichever system call fails or is the last, the file has its old or its new content."""

import errno
import io
import os
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from polyclinic.core import atomic

OLD, NEW = b"old" * 20_000, b"new and longer" * 10_000
PIECES = [NEW[start : start + 50_000] for start in range(0, len(NEW), 50_000)]


class Calls:
    """The system calls of ``atomic``, in order. ``act`` is called in place of, or halfway through, number ``at``."""

    def __init__(self, at: int = -1, act: Callable[[], Any] = lambda: None) -> None:
        self.names: list[str] = []
        self.at, self.act = at, act

    def reached(self, name: str) -> bool:
        self.names.append(name)
        return len(self.names) - 1 == self.at

    def call(self, name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def faulty(*args: Any, **kwargs: Any) -> Any:
            if self.reached(name):
                self.act()
            return real(*args, **kwargs)

        return faulty

    def install(self, patch: pytest.MonkeyPatch) -> None:
        calls = self

        class Raw(io.FileIO):
            def write(self, data: Any) -> int:
                if calls.reached("write"):
                    super().write(memoryview(data)[: len(data) // 2])
                    calls.act()
                return super().write(data)

        for name in ("open", "fsync", "replace", "close"):
            patch.setattr(os, name, self.call(name))
        patch.setattr(atomic, "open", lambda handle, mode: io.BufferedWriter(Raw(handle, mode)), raising=False)


def store(path: Path, **options: bool) -> None:
    with atomic.writing(path, **options) as file:
        for piece in PIECES:
            file.write(piece)


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def crash_points() -> Iterator[tuple[int, str]]:
    """Every system call of one write: number and name."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        calls = Calls()
        calls.install(patch)
        store(Path(folder) / "file")
    yield from enumerate(calls.names)


POINTS = list(crash_points())


def test_the_order_of_the_system_calls() -> None:
    """The content is on the disk before it gets its name, and the name is on the disk before the call returns."""
    names = [name for _, name in POINTS]
    assert names == ["open", *["write"] * names.count("write"), "fsync", "replace", "open", "fsync", "close"]
    assert names.count("write") >= 3


@pytest.mark.parametrize("existed", [True, False], ids=["old file", "no file"])
@pytest.mark.parametrize(("at", "name"), POINTS, ids=[f"{at} {name}" for at, name in POINTS])
def test_a_failed_system_call(tmp_path: Path, at: int, name: str, existed: bool) -> None:
    path = tmp_path / "file"
    if existed:
        path.write_bytes(OLD)
    with pytest.MonkeyPatch.context() as patch:
        Calls(at, full).install(patch)
        with pytest.raises(OSError, match="No space left"):
            store(path)
    renamed = at > [name for _, name in POINTS].index("replace")
    assert (path.read_bytes() if path.exists() else None) == (NEW if renamed else OLD if existed else None)
    assert [entry.name for entry in tmp_path.iterdir()] == (["file"] if existed or renamed else [])


@pytest.mark.parametrize("existed", [True, False], ids=["old file", "no file"])
@pytest.mark.parametrize(("at", "name"), POINTS, ids=[f"{at} {name}" for at, name in POINTS])
def test_a_process_killed_at_a_system_call(tmp_path: Path, at: int, name: str, existed: bool) -> None:
    path = tmp_path / "file"
    if existed:
        path.write_bytes(OLD)
    if (child := os.fork()) == 0:
        try:
            Calls(at, lambda: os._exit(9)).install(pytest.MonkeyPatch())
            store(path)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    renamed = at > [name for _, name in POINTS].index("replace")
    assert (path.read_bytes() if path.exists() else None) == (NEW if renamed else OLD if existed else None)
    atomic.remove_leftovers(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == (["file"] if existed or renamed else [])


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_in_the_block_changes_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_bytes(OLD)

    def interrupted() -> None:
        with atomic.writing(path) as file:
            file.write(NEW)
            raise error

    with pytest.raises(error):
        interrupted()
    assert path.read_bytes() == OLD
    assert list(tmp_path.iterdir()) == [path]


def test_a_value_that_is_not_json_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic.write_json(path, {"a": [1, "\u00e9"]})
    before = path.read_bytes()
    assert before == b'{\n "a": [\n  1,\n  "\\u00e9"\n ]\n}\n'
    with pytest.raises(TypeError):
        atomic.write_json(path, {"a": object()})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("before", [None, 0o600, 0o644])
@pytest.mark.parametrize(("private", "mode"), [(True, 0o600), (False, 0o640)])
def test_permissions(tmp_path: Path, before: int | None, private: bool, mode: int) -> None:
    """A private file is never readable by others, not even while it is written; otherwise the umask decides."""
    path, umask = tmp_path / "file", os.umask(0o027)
    try:
        if before is not None:
            path.touch()
            path.chmod(before)
        with atomic.writing(path, private=private) as file:
            assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) == mode
        assert stat.S_IMODE(path.stat().st_mode) == mode
        atomic.write_private(path, "text \u00e9")
        assert (stat.S_IMODE(path.stat().st_mode), path.read_bytes()) == (0o600, b"text \xc3\xa9")
    finally:
        os.umask(umask)


def test_a_symbolic_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    target, path, nowhere = tmp_path / "target", tmp_path / "link", tmp_path / "dangling"
    target.write_bytes(OLD)
    path.symlink_to(target)
    nowhere.symlink_to(tmp_path / "absent")
    atomic.write(path, NEW)
    atomic.write(nowhere, NEW)
    assert target.read_bytes() == OLD
    assert not (tmp_path / "absent").exists()
    assert not path.is_symlink()
    assert path.read_bytes() == NEW == nowhere.read_bytes()
    assert not nowhere.is_symlink()


def test_a_link_in_place_of_the_temporary_file_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(OLD)
    monkeypatch.setattr("secrets.token_hex", lambda count: "0")
    (tmp_path / ".polyclinic-0.part").symlink_to(victim)
    with pytest.raises(FileExistsError):
        atomic.write(tmp_path / "file", NEW)
    assert victim.read_bytes() == OLD
    assert not (tmp_path / "file").exists()


def test_a_file_that_is_not_durable_is_not_forced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls()
    calls.install(monkeypatch)
    store(tmp_path / "file", durable=False)
    assert set(calls.names) == {"open", "write", "replace"}
    assert (tmp_path / "file").read_bytes() == NEW


@pytest.mark.parametrize(
    ("code", "raised"), [(errno.EINVAL, False), (errno.EBADF, False), (errno.EIO, True), (errno.ENOSPC, True)]
)
def test_a_file_system_that_cannot_force_folders(tmp_path: Path, code: int, raised: bool) -> None:
    def fault() -> None:
        raise OSError(code, os.strerror(code))

    at = [name for _, name in POINTS].index("fsync", [name for _, name in POINTS].index("replace"))
    with pytest.MonkeyPatch.context() as patch:
        Calls(at, fault).install(patch)
        if raised:
            with pytest.raises(OSError, match=os.strerror(code)):
                store(tmp_path / "file")
        else:
            store(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == NEW


def test_a_reader_sees_one_of_the_contents_of_concurrent_writers(tmp_path: Path) -> None:
    path, contents = tmp_path / "file", {bytes([letter]) * 100_000 for letter in b"abc"}
    path.write_bytes(min(contents))

    def write(content: bytes) -> None:
        for _ in range(30):
            atomic.write(path, content, durable=False)

    writers = [threading.Thread(target=write, args=(content,)) for content in contents]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert path.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [path]


def test_only_temporary_files_are_left_over(tmp_path: Path) -> None:
    keep = [tmp_path / name for name in ("file.part", ".polyclinic-notes", "polyclinic-1.part", ".hidden.part")]
    for path in [*keep, tmp_path / ".polyclinic-0123456789abcdef.part"]:
        path.touch()
    atomic.remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(keep)


@pytest.mark.parametrize("existed", [True, False])
def test_several_files_are_written_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existed: bool) -> None:
    folder = tmp_path / "a" / "b"
    files: dict[str, str | bytes] = {"one": "1", "more/two": b"2", "three": "3"}
    if existed:
        folder.mkdir(parents=True)
        (folder / "one").write_text("old")
    real = atomic.write

    def write(path: Path, content: str | bytes) -> None:
        if path.name == "three":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, content)

    monkeypatch.setattr(atomic, "write", write)
    with pytest.raises(OSError, match="No space left"):
        atomic.write_all(folder, files)
    left = {str(f.relative_to(tmp_path)): f.read_text() for f in tmp_path.rglob("*") if f.is_file()}
    assert left == ({"a/b/one": "old"} if existed else {})
    assert (tmp_path / "a").exists() == existed
    monkeypatch.setattr(atomic, "write", real)
    atomic.write_all(folder, files)
    left = {str(f.relative_to(folder)): f.read_text() for f in folder.rglob("*") if f.is_file()}
    assert left == {"one": "1", "more/two": "2", "three": "3"}
    assert len(list(folder.iterdir())) == 3


def test_leftover_folders_are_deleted(tmp_path: Path) -> None:
    left = tmp_path / f"{atomic.PREFIX}x{atomic.SUFFIX}"
    left.mkdir()
    (left / "file").touch()
    atomic.remove_leftovers(tmp_path)
    assert not left.exists()
