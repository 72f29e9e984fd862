"""Append-only journal: one JSON line per event, each bound to all earlier lines.

Every entry holds the SHA-256 of the previous one, so that changing, dropping or reordering an entry breaks the chain
from that entry on. An incomplete last line, as a crash leaves it, is distinguished from tampering and removed when the
journal is opened.
"""

import errno
import hashlib
import json
import os
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from polyclinic.errors import IntegrityError

FIRST = "0" * 64


class Broken(IntegrityError):
    """A journal whose hash chain is broken. The message names the file and the first invalid line."""


class Journal:
    """An append-only file of JSON lines: ``seq``, ``event``, its details, ``previous`` and ``hash``.

    Attributes:
        head: The hash of the last entry. A copy kept in another place reveals whether the journal was rewritten.
    """

    def __init__(self, path: Path) -> None:
        """Open the journal at ``path``, or create it.

        Raises:
            Broken: If the hash chain of an existing journal is broken.
        """
        self.path, self.head, self._seq = path, FIRST, 0
        if path.exists():
            _cut_torn_line(path)
            for entry in verify(path):
                self.head, self._seq = entry["hash"], entry["seq"] + 1
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        self._close = weakref.finalize(self, self._file.close)

    def write(self, event: str, details: Mapping[str, Any] | None = None) -> str:
        """Append an entry, force it to the disk, and return the new head.

        Raises:
            OSError: If the disk is full. The journal is then unchanged.
        """
        entry = {"seq": self._seq, "event": event, **(details or {}), "previous": self.head}
        entry["hash"] = _hash(entry)
        line = json.dumps(entry, separators=(",", ":"), ensure_ascii=True).encode() + b"\n"
        end = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            os.fsync(self._file.fileno())
        except OSError:
            os.ftruncate(self._file.fileno(), end)
            raise
        self.head, self._seq = entry["hash"], self._seq + 1
        return self.head

    def close(self) -> None:
        """Close the file. The journal is unchanged. A journal that is no longer used is closed by itself."""
        self._close()


def verify(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the entries of the journal at ``path``, checking the chain.

    Raises:
            Broken: At the first line that does not follow from the lines before it.
    """
    head = FIRST
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                entry = None
            if not follows(entry, number, head):
                raise Broken(f"{path}:{number + 1}: this entry was changed, or an earlier one was removed")
            head = entry["hash"]
            yield entry


def follows(entry: Any, number: int, head: str) -> bool:
    """Return whether ``entry`` is unchanged and follows ``number`` entries, the last of which has the hash ``head``."""
    try:
        fits = entry["seq"] == number and entry["previous"] == head
        return bool(fits and _hash({k: v for k, v in entry.items() if k != "hash"}) == entry["hash"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return False


def _hash(entry: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _cut_torn_line(path: Path) -> None:
    """Remove an incomplete last line. Text after the last newline was never acknowledged by ``write``."""
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        with open(path, "r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)
