"""File with the progress of a site within its local training, which pages read while a round lasts.

It is written at most once a second and without forcing it to disk. It contains numbers of minibatches, which tell how
much data a site has: it stays in the folder of the run, or of the site, and is never sent.
"""

import json
import time
from pathlib import Path
from typing import Any

from polyclinic.core import atomic

INTERVAL = 1.0
PATTERN = "steps-*.json"
MAX_BYTES = 2000


class StepFile:
    """The file of one worker in a folder.

    Attributes:
        path: The file.
    """

    def __init__(self, folder: Path, worker: int, site: str, round: int, job: str) -> None:
        """Record the progress of ``site`` with the request ``job`` of a round, counted from 0, in ``folder``."""
        self.path = folder / PATTERN.replace("*", str(worker))
        self._about = {"site": site, "round": round + 1, "job": job}
        self._written = time.monotonic()  # what takes less than a second needs no progress

    def __call__(self, done: int, total: int) -> None:
        """Record that ``done`` of ``total`` minibatches were taken."""
        now = time.monotonic()
        if now - self._written < INTERVAL:
            return
        self._written = now
        try:
            atomic.write(self.path, json.dumps({**self._about, "done": done, "total": total}), durable=False)
        except OSError:  # progress must not end a run
            return


def read(folder: Path) -> list[dict[str, Any]]:
    """Return the contents of the files in ``folder``, each with ``site``, ``round``, ``job``, ``done``, ``total``."""
    found = list[dict[str, Any]]()
    for path in sorted(path for path in folder.glob(PATTERN) if path.is_file())[:64]:
        try:
            with open(path, "rb") as file:
                table = json.loads(file.read(MAX_BYTES))
            numbers = {key: int(table[key]) for key in ("round", "done", "total")}
            found.append({"site": str(table["site"]), "job": str(table["job"])[:80], **numbers})
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def remove(folder: Path) -> None:
    """Delete the files in ``folder``."""
    for path in folder.glob(PATTERN):
        path.unlink(missing_ok=True)
