"""Lock of a run folder: which process works in it, and how it is asked to stop. Requires no PyTorch."""

import fcntl
from pathlib import Path

LOCK, STOP = ".lock", "stop"


def holder(path: Path) -> int:
    """Return the process that works on the run in the folder at ``path``, or 0."""
    try:
        with open(path / LOCK, encoding="ascii") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(lock.read() or -1)
    except (OSError, ValueError):
        return 0
    return 0


def ask_to_stop(path: Path) -> int:
    """Ask the process that works on the run at ``path`` to stop after the current round; return its number, or 0."""
    pid = holder(path)
    if pid:
        (path / STOP).touch()
    return pid
