"""Queue of requested runs, one file each, with the state of each run."""

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from polyclinic.core.atomic import write_private
from polyclinic.engines.flare.protocol.paths import ServerFolder, SetupError, name, private_folder, read_json
from polyclinic.engines.flare.protocol.run_request import RunRequest

WAITING, ACTIVE, FINISHED, FAILED, CANCELLED = "waiting", "active", "finished", "failed", "cancelled"
# Phases in status.json besides "greeting" and "running": how an attempt ended.
INTERRUPTED = "interrupted"
OVER = (FINISHED, FAILED, CANCELLED)


@dataclass(frozen=True)
class Entry:
    """Run in the queue.

    Attributes:
        order: The run request, as text.
        state: ``waiting``, ``active``, ``finished``, ``failed`` or ``cancelled``; ``why``: the reason, as text.
        job: FLARE's job number of this attempt. ``attempt``: number of attempts so far.
        since: Start time of this state. ``not_before``: earliest time of the next attempt.
        round: Round that the last attempt reached. ``fruitless``: number of attempts without a completed round.
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
        """The parsed run request."""
        return RunRequest.from_json(self.order)


class Queue:
    """Folder of queued runs."""

    def __init__(self, home: ServerFolder) -> None:
        self.home = home

    def add(self, order: RunRequest) -> None:
        """Append a run.

        Raises:
            SetupError: If the name was used before.
        """
        if self.get(order.run) is not None or self.home.run(order.run).exists():
            raise SetupError(f"the name {order.run!r} was used by another run: choose another name")
        self.put(order.run, Entry(order.to_json(), since=time.time()))

    def get(self, run: str) -> Entry | None:
        """Return the entry of a run, if there is one."""
        table = read_json(self._path(run), default={})
        return Entry(**{**table, "members": tuple(table["members"])}) if table else None

    def put(self, run: str, entry: Entry) -> None:
        """Write an entry."""
        private_folder(self.home.queue)
        write_private(self._path(run), json.dumps(asdict(entry)))

    def change(self, run: str, **fields: Any) -> Entry:
        """Change fields of an entry."""
        entry = self.get(run)
        if entry is None:
            raise SetupError(f"there is no run called {run!r}")
        if fields.get("state", entry.state) != entry.state:
            fields["since"] = time.time()
        changed = replace(entry, **fields)
        self.put(run, changed)
        return changed

    def all(self) -> dict[str, Entry]:
        """Return every entry, the oldest first."""
        runs = sorted(self.home.queue.glob("*.json"), key=lambda path: path.stem) if self.home.queue.exists() else []
        entries = {path.stem: entry for path in runs if (entry := self.get(path.stem))}
        return dict(sorted(entries.items(), key=lambda item: (item[1].since, item[0])))

    def cancel(self, run: str) -> None:
        """Request that the supervisor ends a run permanently.

        Raises:
            SetupError: If there is no such run.
        """
        if self.get(run) is None:
            raise SetupError(f"there is no run called {run!r}")
        self._marker(run).touch()

    def cancelled(self, run: str) -> bool:
        """Return whether a person requested the end of a run."""
        return self._marker(run).exists()

    def progress(self, run: str) -> dict[str, Any]:
        """Return the contents of the run's status.json; empty if the file does not exist."""
        status: dict[str, Any] = read_json(self.home.run(run) / "status.json", default={})
        return status

    def _path(self, run: str) -> Path:
        return self.home.queue / f"{name(run, 'a run')}.json"

    def _marker(self, run: str) -> Path:
        return self.home.queue / f"{name(run, 'a run')}.cancel"
