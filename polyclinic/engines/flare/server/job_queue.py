"""The runs that a server was asked for, one file each, and where each of them stands."""

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from polyclinic.engines.flare.protocol.paths import (
    ServerFolder,
    SetupError,
    name,
    private_folder,
    read_json,
    write_private,
)
from polyclinic.engines.flare.protocol.run_request import RunRequest

WAITING, ACTIVE, FINISHED, FAILED, CANCELLED = "waiting", "active", "finished", "failed", "cancelled"
# What a run says of itself in status.json, besides "greeting" and "running": how an attempt ended.
INTERRUPTED = "interrupted"
OVER = (FINISHED, FAILED, CANCELLED)


@dataclass(frozen=True)
class Entry:
    """One run in the queue.

    Attributes:
        order: The order, as text.
        state: ``waiting``, ``active``, ``finished``, ``failed`` or ``cancelled``; ``why`` in words.
        job: FLARE's number of the job of this attempt. ``attempt``: how many there were before.
        since: When this state began. ``not_before``: when a waiting run may be tried again.
        round: How far the last attempt came. ``fruitless``: how many attempts ended without a round.
        members: The sites whose jobs were started.
    """

    order: str
    state: str = WAITING
    why: str = ""
    job: str = ""
    attempt: int = 0
    since: float = 0.0
    not_before: float = 0.0
    round: int = 0
    fruitless: int = 0
    members: tuple[str, ...] = ()

    @property
    def what(self) -> RunRequest:
        """The order, as an object."""
        return RunRequest.from_json(self.order)


class Queue:
    """The folder of runs."""

    def __init__(self, home: ServerFolder) -> None:
        self.home = home

    def add(self, order: RunRequest) -> None:
        """Puts a run at the end.

        Raises:
            SetupError: Where there is one of this name.
        """
        if self.get(order.run) is not None or self.home.run(order.run).exists():
            raise SetupError(f"there was a run called {order.run!r} before: choose another name")
        self.put(order.run, Entry(order.to_json(), since=time.time()))

    def get(self, run: str) -> Entry | None:
        """The entry of a run, if there is one."""
        table = read_json(self._path(run), default={})
        return Entry(**{**table, "members": tuple(table["members"])}) if table else None

    def put(self, run: str, entry: Entry) -> None:
        """Writes an entry."""
        private_folder(self.home.queue)
        write_private(self._path(run), json.dumps(asdict(entry)))

    def change(self, run: str, **fields: Any) -> Entry:
        """Changes some fields of an entry."""
        entry = self.get(run)
        if entry is None:
            raise SetupError(f"there is no run called {run!r}")
        if fields.get("state", entry.state) != entry.state:
            fields["since"] = time.time()
        changed = replace(entry, **fields)
        self.put(run, changed)
        return changed

    def all(self) -> dict[str, Entry]:
        """Every entry, the oldest first."""
        runs = sorted(self.home.queue.glob("*.json"), key=lambda path: path.stem) if self.home.queue.exists() else []
        found = {path.stem: entry for path in runs if (entry := self.get(path.stem))}
        return dict(sorted(found.items(), key=lambda item: (item[1].since, item[0])))

    def cancel(self, run: str) -> None:
        """Asks the supervisor to end a run for good.

        Raises:
            SetupError: Where there is none.
        """
        if self.get(run) is None:
            raise SetupError(f"there is no run called {run!r}")
        self._marker(run).touch()

    def cancelled(self, run: str) -> bool:
        """Whether a person asked for an end."""
        return self._marker(run).exists()

    def progress(self, run: str) -> dict[str, Any]:
        """What the run itself says in its status.json; empty where it has said nothing."""
        found: dict[str, Any] = read_json(self.home.run(run) / "status.json", default={})
        return found

    def _path(self, run: str) -> Path:
        return self.home.queue / f"{name(run, 'a run')}.json"

    def _marker(self, run: str) -> Path:
        return self.home.queue / f"{name(run, 'a run')}.cancel"
