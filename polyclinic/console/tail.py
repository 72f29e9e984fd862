"""Files of JSON lines, read as they grow: only what was added since the last reading."""

import json
import os
from pathlib import Path
from typing import Any

from polyclinic.core.audit_log import FIRST, follows

MAX_PIECE = 4 * 2**20


class Tail:
    """A file of JSON lines. It is read from the beginning again after it was cut or replaced.

    Attributes:
        path: The file.
        behind: Whether the last reading did not reach the end.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.behind = path, False
        self._offset = self._inode = 0

    def more(self) -> tuple[list[bytes], bool]:
        """Return the complete lines since the last reading, and whether the file began anew."""
        try:
            with open(self.path, "rb", buffering=0) as file:
                status = os.fstat(file.fileno())
                anew = self._inode not in (0, status.st_ino) or status.st_size < self._offset
                self._offset, self._inode = 0 if anew else self._offset, status.st_ino
                if status.st_size == self._offset:
                    self.behind = False
                    return [], anew
                file.seek(self._offset)
                data = file.read(MAX_PIECE)
        except OSError:
            return [], False
        end = data.rfind(b"\n") + 1
        self._offset += end
        self.behind = bool(end) and self._offset < status.st_size
        return data[:end].splitlines(), anew


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

    def more(self) -> tuple[list[dict[str, Any]], bool]:
        """Return the new entries, and whether the journal began anew."""
        lines, anew = self._tail.more()
        if anew:
            self._reset()
        entries = []
        for line in lines:
            entry = parsed(line)
            if not self.broken and not follows(entry, self.count, self.head):
                self.broken = f"entry {self.count + 1} was changed, or an earlier one was removed"
            self.count += 1
            if entry is not None:
                self.head = str(entry.get("hash", ""))
                entries.append(entry)
        return entries, anew


def parsed(line: bytes) -> dict[str, Any] | None:
    """Return the JSON object in a line; None if it is none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
