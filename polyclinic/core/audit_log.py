"""The journal: what happened, one line a fact, each line bound to all before it.

Every entry holds the SHA-256 of the previous one, so that nobody can change, drop or reorder an entry without
breaking the chain from there on. A torn last line, as a crash leaves it, is told apart from tampering and cut
off on reopening.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from polyclinic.errors import IntegrityError

FIRST = "0" * 64


class Broken(IntegrityError):
    """A journal whose chain does not hold. The message names the file and the first bad line."""


class Journal:
    """An append-only file of JSON lines: ``seq``, ``event``, its details, ``previous`` and ``hash``.

    Attributes:
        head: The hash of the last entry. Whoever keeps a copy can tell whether the journal was rewritten.
    """

    def __init__(self, path: Path) -> None:
        """Opens or begins the journal at ``path``.

        Raises:
            Broken: Where the existing chain does not hold.
        """
        self.path, self.head, self._seq = path, FIRST, 0
        if path.exists():
            _cut_torn_line(path)
            for entry in verify(path):
                self.head, self._seq = entry["hash"], entry["seq"] + 1
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115

    def write(self, event: str, details: Mapping[str, Any] | None = None) -> str:
        """Appends an entry, forces it to the disk, and returns the new head.

        Raises:
            OSError: Where there is no room. Then the journal is as it was.
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
        """Closes the file. The journal stays as it is."""
        self._file.close()


def verify(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the entries of the journal at ``path``, checking the chain as it goes.

    Raises:
        Broken: At the first line that does not follow from those before.
    """
    head = FIRST
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            try:
                entry = json.loads(line)
                fits = entry["seq"] == number and entry["previous"] == head
                unchanged = fits and _hash({k: v for k, v in entry.items() if k != "hash"}) == entry["hash"]
            except (ValueError, KeyError, TypeError, RecursionError):
                unchanged = False
            if not unchanged:
                raise Broken(f"{path}:{number + 1}: this entry was changed, or one before it removed")
            head = entry["hash"]
            yield entry


def _hash(entry: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _cut_torn_line(path: Path) -> None:
    """A line is complete when it ends in a newline; what follows the last newline was never acknowledged."""
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        with open(path, "r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)
