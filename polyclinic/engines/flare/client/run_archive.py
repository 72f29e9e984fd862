"""Retention of an ended run's files at a site: first all of them, in case the server repeats its test, later only
facts.

A server that crashes between the end of a run and its last write starts a new attempt and tests with the site state
that its sites kept. The site state is therefore removed only a while after the end. What remains refuses replays: the
chain without its links, the answered parts of the schedule, and the sizes of what was sent and received.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path

from polyclinic.engines.flare.client.run_memory import RunMemory
from polyclinic.engines.flare.protocol.paths import SiteFolder

KEEP = 3600.0
"""Seconds for which the site state of an ended run is kept."""
MARK = "ended"
FACTS = ("chain.json", "order.json", "received.json", "status.json", "usage.jsonl", MARK)


def mark(folder: Path) -> None:
    """Record that the run whose site state is in ``folder`` has ended now."""
    (folder / MARK).touch()
    os.utime(folder / MARK)


def unmark(folder: Path) -> None:
    """Record that the run continues."""
    (folder / MARK).unlink(missing_ok=True)


def retire(home: SiteFolder, keep: float = KEEP) -> Iterator[str]:
    """Remove the site state of runs that ended more than ``keep`` seconds ago, and yield their names."""
    for mark_ in sorted((home.path / "memory").glob(f"*/{MARK}")):
        if not 0 <= time.time() - mark_.stat().st_mtime < keep and _has_more(mark_.parent):
            RunMemory(mark_.parent).retire()
            for path in mark_.parent.iterdir():
                if path.name not in FACTS:
                    path.unlink(missing_ok=True)
            yield mark_.parent.name


def _has_more(folder: Path) -> bool:
    return any(path.name not in FACTS for path in folder.iterdir())
