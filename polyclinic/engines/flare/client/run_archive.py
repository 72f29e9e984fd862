"""Retention of a run's files at a site: first all of them, in case the server repeats its test, later only facts.

A server that crashes between the end of a run and its last write starts a new attempt and tests with the site state
that its sites kept. The site state is therefore removed only a while after the end. Of a run without an end, whose
server has vanished or which was canceled while the site was away, it is removed after months of silence; if the run
continues nevertheless, the site begins with a fresh state. What remains refuses replays: the chain without its links,
the answered parts of the schedule, and the sizes of what was sent and received.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path

from polyclinic.engines.flare.client.run_memory import RunMemory
from polyclinic.engines.flare.protocol.paths import SiteFolder

KEEP = 3600.0
"""Seconds for which the site state of an ended run is kept."""
SILENT_DAYS = 90.0
"""Days without any message after which the site state of a run that has not ended is removed (``memory_days``)."""
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
            _remove_state(mark_.parent)
            yield mark_.parent.name


def retire_silent(home: SiteFolder, days: float = SILENT_DAYS) -> Iterator[str]:
    """Remove the site state of runs without an end and without a message for ``days``, and yield their names."""
    for folder in sorted(path for path in (home.path / "memory").glob("*") if path.is_dir()):
        if (folder / MARK).exists() or not _has_more(folder):
            continue
        last = max(path.stat().st_mtime for path in folder.iterdir())
        if time.time() - last > days * 86400:
            _remove_state(folder)
            yield folder.name


def _remove_state(folder: Path) -> None:
    RunMemory(folder).retire()
    for path in folder.iterdir():
        if path.name not in FACTS:
            path.unlink(missing_ok=True)


def _has_more(folder: Path) -> bool:
    return any(path.name not in FACTS for path in folder.iterdir())
