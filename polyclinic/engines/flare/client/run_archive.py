"""At a site, what is kept of a run that has ended: first all of it, in case the server begins its test again, then
facts.

A server that crashes between its good-bye and its last write begins a new attempt, and tests with the memory that its
sites kept. So the memory of a run is removed a while after the good-bye. What stays is what refuses replays: the chain
without its links, what was answered of the schedule, and what was sent and received.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path

from polyclinic.engines.flare.client.run_memory import RunMemory
from polyclinic.engines.flare.protocol.paths import SiteFolder

KEEP = 3600.0
"""Seconds for which the memory of an ended run is kept."""
MARK = "ended"
FACTS = ("chain.json", "order.json", "received.json", "status.json", "usage.jsonl", MARK)


def mark(folder: Path) -> None:
    """Notes that the run whose memory lies in ``folder`` has ended now."""
    (folder / MARK).touch()
    os.utime(folder / MARK)


def unmark(folder: Path) -> None:
    """Notes that the run goes on after all."""
    (folder / MARK).unlink(missing_ok=True)


def retire(home: SiteFolder, keep: float = KEEP) -> Iterator[str]:
    """Removes the memory of runs that ended more than ``keep`` seconds ago, and yields their names."""
    for mark_ in sorted((home.path / "memory").glob(f"*/{MARK}")):
        if not 0 <= time.time() - mark_.stat().st_mtime < keep and _has_more(mark_.parent):
            RunMemory(mark_.parent).retire()
            for path in mark_.parent.iterdir():
                if path.name not in FACTS:
                    path.unlink(missing_ok=True)
            yield mark_.parent.name


def _has_more(folder: Path) -> bool:
    return any(path.name not in FACTS for path in folder.iterdir())
