"""Lock of a run folder: which process works in it, how it is asked to stop, how it is deleted.

Requires no PyTorch.
"""

import fcntl
import os
import shutil
from pathlib import Path

from polyclinic.errors import RunError

LOCK, STOP = ".lock", "stop"


def holder(path: Path) -> int:
    """Return the process that works on the run in the folder at ``path``, or 0."""
    try:
        with open(path / LOCK, encoding="ascii", opener=_without_waiting) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(lock.read(20) or -1)
    except (OSError, ValueError):
        return 0
    return 0


def ask_to_stop(path: Path) -> int:
    """Ask the process that works on the run at ``path`` to stop after the current round; return its number, or 0."""
    pid = holder(path)
    if pid:
        (path / STOP).touch()
    return pid


def delete(path: Path) -> None:
    """Delete the run in the folder at ``path``, unless a process works on it.

    Raises:
        RunError: If a process works on it, or the folder contains no run.
    """
    if path.is_symlink() or not (path / "run.json").is_file():
        raise RunError(f"{path} contains no run")
    with open(path / LOCK, "a", encoding="ascii", opener=_without_waiting) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{path}: a process works on this run. Stop it first: polyclinic stop {path}") from None
        (path / "run.json").unlink()  # from here on it is no run, also if deleting the rest is interrupted
        shutil.rmtree(path)


def _without_waiting(path: str, flags: int) -> int:
    """Open a file; a pipe of that name, in the folder of a stranger, does not block."""
    return os.open(path, flags | os.O_NONBLOCK, 0o666)
