"""Record of the secure sums that this site has helped to open, over all runs: by summed content and by roster.

Two sums of the same values over rosters that differ by one site reveal that site's contribution. The first opened sum
of a content therefore fixes its roster; a second roster is allowed only if it differs in at least ``min_sites`` sites,
and a third never. The file is append-only, shared by all runs at the site, and forced to disk before shares are
revealed. It is never shortened: when it is full, no further sum is opened.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from polyclinic.core.atomic import sync_folder
from polyclinic.errors import ProtocolError

LIMIT = 2**28
LEAST = 3
Roster = tuple[str, ...]


class NotOpened(ProtocolError):
    """Secure sum that this site refuses to open. The message says why."""


@dataclass(frozen=True)
class Summed:
    """This site's term in a secure sum.

    Attributes:
        run: The run. ``round`` and ``job``: of the request.
        content: Digest of the values before encoding; empty if they are all zero, which reveals nothing.
        static: Whether it is a statistic of the data alone, of which a run opens one sum.
    """

    run: str
    round: int
    job: str
    content: str
    static: bool = False


class Opened:
    """Record of one site."""

    def __init__(self, path: Path, limit: int = LIMIT) -> None:
        """Use the record at ``path``, of at most ``limit`` bytes."""
        self.path, self.limit = path, limit
        self._rosters: dict[tuple[object, ...], set[Roster]] = {}
        self._read_to = 0

    def problem(self, summed: Summed, roster: Sequence[str], min_sites: int) -> str | None:
        """Return why a sum of ``summed`` over ``roster`` must not be opened, or None if it may be.

        Args:
            min_sites: Number of sites in which a second roster must differ from the first; at least 3.
        """
        with self._locked():
            self._read()
            return self._problem(summed, tuple(sorted(set(roster))), min_sites)

    def record(self, summed: Summed, roster: Sequence[str], min_sites: int) -> None:
        """Record on disk that a sum over ``roster`` is about to be opened.

        Raises:
            NotOpened: If it must not be opened. Nothing is recorded.
        """
        own = tuple(sorted(set(roster)))
        with self._locked():
            self._read()
            if why := self._problem(summed, own, min_sites):
                raise NotOpened(why)
            if all(own in self._rosters.get(key, ()) for key in _keys(summed)):
                return
            line = json.dumps({**asdict(summed), "roster": own}, separators=(",", ":")).encode() + b"\n"
            if self._read_to + len(line) > self.limit:
                raise NotOpened(f"the record of opened sums, {self.path.name}, is full: a person must review it")
            self._append(line)
            self._take(summed, own)
            self._read_to += len(line)

    def _problem(self, summed: Summed, own: Roster, min_sites: int) -> str | None:
        least = max(min_sites, LEAST)
        for key in _keys(summed):
            rosters = self._rosters.get(key, set())
            if not rosters or own in rosters:
                continue
            if key[0] == "statistic":
                (first, *_) = rosters
                return (
                    f"a sum of {summed.job!r} over {', '.join(first)} was opened already, and a run opens one of them"
                )
            if len(rosters) > 1:
                return "sums of these values over two rosters were opened already, and a third is never opened"
            (first,) = rosters
            if (apart := len(set(first) ^ set(own))) < least:
                return (
                    f"a sum of these values over {', '.join(first)} was opened already; one over others would show "
                    f"what {apart} of them sent, and {least} are the least here (require.min_sites)"
                )
        return None

    def _take(self, summed: Summed, roster: Roster) -> None:
        for key in _keys(summed):
            self._rosters.setdefault(key, set()).add(roster)

    def _read(self) -> None:
        """Read the entries appended since the last call, by this run or another.

        An incomplete last line was never forced to disk, so nothing was revealed after it: it is removed.

        Raises:
            NotOpened: If the file is not what this site has written.
        """
        size = self.path.stat().st_size if self.path.exists() else 0
        damaged = NotOpened(f"the record of opened sums, {self.path.name}, is damaged: no sum is opened")
        if size < self._read_to:
            raise damaged
        if size == self._read_to:
            return
        with open(self.path, "rb") as file:
            file.seek(self._read_to)
            data = file.read()
        lines, torn = data[: data.rfind(b"\n") + 1], data[data.rfind(b"\n") + 1 :]
        if torn:
            os.truncate(self.path, self._read_to + len(lines))
        for line in lines.splitlines():
            try:
                entry = json.loads(line)
                roster = tuple(str(site) for site in entry.pop("roster"))
                self._take(Summed(**entry), roster)
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                raise damaged from None
        self._read_to += len(lines)

    def _append(self, line: bytes) -> None:
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            if os.write(handle, line) != len(line):
                raise OSError(f"{self.path} could not be written")
            os.fsync(handle)
        except OSError:
            os.ftruncate(handle, self._read_to)
            raise
        finally:
            os.close(handle)
        if self._read_to == 0:
            sync_folder(self.path.parent)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        handle = os.open(self.path.with_name(f".{self.path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def _keys(summed: Summed) -> list[tuple[object, ...]]:
    """Return the keys under which an opened sum is recorded."""
    keys: list[tuple[object, ...]] = [("statistic", summed.run, summed.job)] if summed.static else []
    keys.append(("request", summed.run, summed.round, summed.job))
    return [*keys, ("content", summed.content)] if summed.content else keys
