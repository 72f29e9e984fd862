"""Progress within a round, in a file that the console reads: which sites were asked, and which have answered.

The file is written at most twice a second and without forcing it to disk, so that it costs a run nothing that can be
measured and changes no result. It is deleted at the end of a method run.
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from polyclinic.core import atomic
from polyclinic.core.method import Request
from polyclinic.core.rounds import Arrival, Federation
from polyclinic.core.site import Site
from polyclinic.studies.records.time_profile import Stopwatch

NAME = "now.json"
INTERVAL = 0.5


class WatchedFederation:
    """A federation whose exchanges are recorded in a file, and whose time counts as training."""

    def __init__(self, inner: Federation, file: Path, watch: Stopwatch) -> None:
        self._inner, self._file, self._watch = inner, file, watch
        self._round, self._since, self._written = 0, 0.0, 0.0
        self._asked: tuple[str, ...] = ()
        self._arrived: dict[str, float] = {}

    @property
    def server(self) -> Site:
        """The server of the federation."""
        return self._inner.server

    @property
    def sites(self) -> Sequence[str]:
        """The sites of the federation."""
        return self._inner.sites

    def send(self, request: Request, recipients: Sequence[str]) -> None:
        """Record that ``recipients`` are asked, and send."""
        self._round, self._since = request.round + 1, time.time()
        self._asked, self._arrived = tuple(recipients), {}
        self._write()
        with self._watch.phase("training"):
            self._inner.send(request, recipients)

    def replies(self, deadline: float | None = None) -> Iterator[Arrival]:
        """Yield the answers, and record each."""
        arrivals = self._inner.replies(deadline)
        while True:
            with self._watch.phase("training"):
                arrival = next(arrivals, None)
            if arrival is None:
                return
            self._arrived[arrival.site] = round(time.time() - self._since, 3)
            self._write()
            yield arrival
            del arrival  # before the next site trains

    def _write(self) -> None:
        if time.monotonic() - self._written < INTERVAL:
            return
        self._written = time.monotonic()
        facts = {"round": self._round, "since": self._since, "asked": self._asked, "arrived": self._arrived}
        with suppress(OSError):  # progress must not end a run
            atomic.write(self._file, json.dumps(facts), durable=False)
