"""Which secure sums this site has helped to open, over all runs: by what was summed, and over which sites.

Two sums of the same values whose rosters differ by one site show what that site sent. So for one content the roster is
fixed by the first sum that is opened; a second roster is allowed only where it differs in at least ``min_sites`` sites,
and there is never a third. The file is append-only, shared by all runs at the site, and forced to the disk before
shares are revealed. It is never shortened: when it is full, no further sum is opened.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from polyclinic.engines.flare.protocol.paths import sync
from polyclinic.errors import ProtocolError

LIMIT = 2**28
LEAST = 3
Roster = tuple[str, ...]


class NotOpened(ProtocolError):
    """A secure sum that this site does not help to open. The message says why."""


@dataclass(frozen=True)
class Summed:
    """What a secure sum adds up at this site.

    Attributes:
        run: The run. ``round`` and ``job``: of the request.
        content: Digest of the values before they were coded; empty where they are all zero, which tells nothing.
        static: Whether it is a statistic of the data alone, of which a run opens one sum.
    """

    run: str
    round: int
    job: str
    content: str
    static: bool = False


class Opened:
    """The record of one site."""

    def __init__(self, path: Path, limit: int = LIMIT) -> None:
        """The record at ``path``, of at most ``limit`` bytes."""
        self.path, self.limit = path, limit
        self._rosters: dict[tuple[object, ...], set[Roster]] = {}
        self._read_to = 0

    def problem(self, summed: Summed, roster: Sequence[str], min_sites: int) -> str | None:
        """Why a sum of ``summed`` over ``roster`` is not opened; None where it may be.

        Args:
            min_sites: In how many sites a second roster must differ from the first; at least 3.
        """
        with self._locked():
            self._read()
            return self._problem(summed, tuple(sorted(set(roster))), min_sites)

    def record(self, summed: Summed, roster: Sequence[str], min_sites: int) -> None:
        """Notes on the disk that a sum over ``roster`` is about to be opened.

        Raises:
            NotOpened: If it must not be. Nothing is noted.
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
                raise NotOpened(f"the record of opened sums, {self.path.name}, is full: a person here must look at it")
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
        """Takes in what was appended since the last time, by this run or another.

        A torn last line was never forced to the disk, so that nothing was revealed after it: it is cut off.

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
            sync(self.path.parent)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        handle = os.open(self.path.with_name(f".{self.path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def _keys(summed: Summed) -> list[tuple[object, ...]]:
    """By what an opened sum is found again."""
    keys: list[tuple[object, ...]] = [("statistic", summed.run, summed.job)] if summed.static else []
    keys.append(("request", summed.run, summed.round, summed.job))
    return [*keys, ("content", summed.content)] if summed.content else keys
