"""Files of JSON lines, read as they grow: only what was added since the last reading, in bounded pieces."""

import json
import os
import stat
import time
from pathlib import Path
from typing import IO, Any

from polyclinic.core.audit_log import FIRST, follows

PIECE = 2**18
MAX_LINE = 4 * 2**20
"""A longer line is left out, so that no file can fill the memory."""


def open_regular(path: Path) -> IO[bytes]:
    """Open a regular file for reading, unbuffered.

    Raises:
        OSError: If it cannot be read, or is something else: a pipe would block the console, a device would never end.
    """
    file = open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(f"{path} is not a regular file")
    return file


def stamp_of(path: Path) -> tuple[int, int, int] | None:
    """Return what differs when the file at ``path`` was changed or replaced; None if there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


class Tail:
    """A file of JSON lines. It is read from the beginning again after it was cut or replaced.

    Attributes:
        path: The file.
        behind: Whether the last reading did not reach the end.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.behind = path, False
        self._offset = self._inode = 0
        self._skipping = False

    def more(self) -> tuple[list[bytes], bool]:
        """Return the next complete lines since the last reading, and whether the file began anew.

        A line of more than ``MAX_LINE`` bytes is returned as an empty one.
        """
        try:
            with open_regular(self.path) as file:
                status = os.fstat(file.fileno())
                anew = self._inode not in (0, status.st_ino) or status.st_size < self._offset
                if anew:
                    self._offset, self._skipping = 0, False
                self._inode = status.st_ino
                file.seek(self._offset)
                data = file.read(PIECE)
                if len(data) == PIECE and b"\n" not in data:
                    data += file.read(MAX_LINE - PIECE)
        except OSError:
            return [], False
        end = data.rfind(b"\n") + 1
        lines = data[:end].splitlines()
        if self._skipping and lines:
            lines[0], self._skipping = b"", False
        if not end and (self._skipping or len(data) >= MAX_LINE):
            self._skipping, end = True, len(data)
        self._offset += end
        self.behind = bool(end) and self._offset < status.st_size
        return lines, anew


class JournalTail:
    """A journal, whose hash chain is checked as it grows.

    Attributes:
        count: Number of entries read. ``head``: hash of the last one.
        broken: What is wrong with the chain; empty if nothing is.
    """

    def __init__(self, path: Path) -> None:
        self._tail = Tail(path)
        self.path = path
        self._reset()

    def _reset(self) -> None:
        self.count, self.head, self.broken = 0, FIRST, ""

    @property
    def behind(self) -> bool:
        """Whether there is more to read."""
        return self._tail.behind

    def more(self, seconds: float = 0.0) -> tuple[list[dict[str, Any]], bool]:
        """Return new entries, and whether the journal began anew.

        Args:
            seconds: What may be spent on what is behind; one piece of the file is read in any case.
        """
        until, began, entries = time.monotonic() + seconds, False, list[dict[str, Any]]()
        while True:
            lines, anew = self._tail.more()
            if anew:
                self._reset()
                began, entries = True, []
            entries += filter(None, map(self._checked, lines))
            if not self.behind or time.monotonic() > until:
                return entries, began

    def _checked(self, line: bytes) -> dict[str, Any] | None:
        """Return the entry in a line; note whether it follows the one before it."""
        entry = parsed(line)
        if not self.broken and not follows(entry, self.count, self.head):
            self.broken = f"entry {self.count + 1} was changed, or an earlier one was removed"
        self.count += 1
        if entry is not None:
            self.head = str(entry.get("hash", ""))
        return entry


def parsed(line: bytes) -> dict[str, Any] | None:
    """Return the JSON object in a line; None if it is none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
