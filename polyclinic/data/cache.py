"""On-disk cache of decoded data, keyed by a hash of everything that a result depends on."""

import json
import mmap
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from polyclinic.core import atomic, serialization
from polyclinic.core.serialization import bytes_of
from polyclinic.data.examples import DataError
from polyclinic.data.source import digest

CHECKED = 2**30
"""Largest file in bytes whose checksum is verified at each opening; larger files are mapped without verification."""

SMALL = 2**20
"""Size in bytes below which the hash of a file is not remembered."""
SETTLED = 5
"""Age in seconds of a file's last change from which on its hash is remembered."""


def folder() -> Path:
    """Return the cache folder: the environment variable ``POLYCLINIC_CACHE``, or the user's cache folder."""
    if chosen := os.environ.get("POLYCLINIC_CACHE"):
        return Path(chosen)
    import platformdirs

    return Path(platformdirs.user_cache_dir("polyclinic"))


def cached(kind: str, key: str, build: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the result of ``build``, from disk if it was built before.

    Tensors are memory-mapped, so a data set may be larger than memory. A damaged file is rebuilt. Files are written
    atomically.

    Args:
        kind: Folder within the cache, such as ``"nodules"``.
        key: Hash of everything that the result depends on.
        build: Builds the result, a table of tensors and plain values; called only if it is not cached.

    Raises:
        DataError: If the cache cannot be written, with what to do.
    """
    path = folder() / kind / f"{key}.safetensors"
    if (stored := _read(path)) is not None:
        return stored
    built = build()
    with writing_in(path.parent):
        serialization.save(path, built, {"checksum": _checksum(built)})
    stored = _read(path)
    return built if stored is None else stored  # the file is mapped, so that the tensors take no memory of their own


@contextmanager
def writing_in(place: Path) -> Iterator[None]:
    """Create the folder ``place`` of the cache for the block, which writes files there.

    Raises:
        DataError: If the block cannot write, with what to do.
    """
    try:
        place.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise DataError(
            f"cannot write the cache {place} ({error.strerror}): free some space, or point POLYCLINIC_CACHE at a "
            "writable folder"
        ) from error


def remembered(path: Path, content_of: Callable[[Path], str]) -> str:
    """Return ``content_of(path)``, or the result of an earlier call if the file has not changed since.

    A file has not changed if its size, inode and times of modification and of status change are the same, and these
    were at least ``SETTLED`` seconds old at the earlier call. Files below ``SMALL`` bytes and folders are always read.

    Args:
        path: The file.
        content_of: Returns the hash of a file's content.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) or status.st_size < SMALL:
        return content_of(path)
    known = [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    key = digest(str(path.resolve()))
    note = folder() / "contents" / key[:2] / f"{key}.json"
    with suppress(OSError, ValueError, TypeError, KeyError):
        stored = json.loads(note.read_text())
        if stored["status"] == known:
            return str(stored["content"])
    begun = time.time_ns()
    content = content_of(path)
    if max(status.st_mtime_ns, status.st_ctime_ns) < begun - SETTLED * 10**9:
        with suppress(OSError):  # without the note the file is read again
            note.parent.mkdir(parents=True, exist_ok=True)
            atomic.write(note, json.dumps({"status": known, "content": content}), durable=False)
    return content


def _read(path: Path) -> dict[str, Any] | None:
    try:
        with open(path, "rb") as file:
            # A private mapping: pages are read when accessed, and changes are not written to the file.
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        value, meta = serialization.decode_with_meta(buffer, share=True)
        intact = len(buffer) > CHECKED or meta.get("checksum") == _checksum(value)
    except (OSError, ValueError):  # absent, empty or damaged
        return None
    return value if isinstance(value, dict) and intact else None


def _checksum(value: Mapping[str, Any]) -> str:
    return digest(*(_bytes(part) if isinstance(part, Tensor) else (name, part) for name, part in value.items()))


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(bytes_of(tensor))
