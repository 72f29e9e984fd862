"""Stopping of a run after the current round, by a signal or ``polyclinic stop``; a second signal stops it at once."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

STOPPED = 3
"""The exit code of a run that ``polyclinic stop`` ended; one that a signal ended has 128 and the signal's number."""


class Signals:
    """The signals received so far."""

    def __init__(self) -> None:
        self.last = 0

    @property
    def code(self) -> int:
        """The exit code of a run that has stopped."""
        return 128 + self.last if self.last else STOPPED


@contextmanager
def stopping(folder: Path, console: Console) -> Iterator[Signals]:
    """Make SIGINT and SIGTERM stop the run in ``folder`` between two rounds, also in the background.

    A shell starts background commands with SIGINT ignored, which Python keeps; here the signal is handled.
    """
    from polyclinic.studies.run.run_directory import STOP, holder

    signals = Signals()

    def stop(number: int, frame: FrameType | None) -> None:
        again, signals.last = bool(signals.last), number
        if again or not holder(folder):  # nothing runs yet, or this is the second signal
            raise KeyboardInterrupt
        (folder / STOP).touch()
        print("\nstopping after the current round; a second signal stops at once", file=sys.stderr, flush=True)

    before: dict[int, Any] = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
