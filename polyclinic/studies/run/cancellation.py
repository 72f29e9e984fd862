"""Stopping of a run after the current round, by a signal or ``polyclinic stop``; a second signal stops it at once."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from polyclinic.studies.run.run_lock import STOP

if TYPE_CHECKING:
    from polyclinic.studies.run.run_directory import Folder

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
def stopping(folder: "Folder") -> Iterator[Signals]:
    """Make SIGINT and SIGTERM stop the run in ``folder`` between two rounds, also in the background.

    While the run has not begun, for example while its data are read, a signal stops it at once.

    A shell starts background commands with SIGINT ignored, which Python keeps; here the signal is handled.
    """
    signals = Signals()

    def stop(number: int, frame: FrameType | None) -> None:
        again, signals.last = bool(signals.last), number
        if again or not folder.running:
            raise KeyboardInterrupt
        (folder.path / STOP).touch()
        print("\nstopping after the current round; a second signal stops at once", file=sys.stderr, flush=True)

    before: dict[int, Any] = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
