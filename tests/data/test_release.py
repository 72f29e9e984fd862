"""Memory that a source has freed is returned to the system."""

import ctypes
import re
from pathlib import Path

import numpy as np
import pytest

from polyclinic.data.source import release

GLIBC = Path("/proc/self/status").exists() and hasattr(ctypes.CDLL(None), "malloc_trim")


def resident() -> int:
    """The anonymous memory of this process in bytes."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


class Reader:
    """Source that has decoded many images, of which few remain in memory."""

    def __init__(self) -> None:
        self.images: list[np.ndarray] = [np.ones(60_000, np.uint8) for _ in range(2_000)]
        self.kept = self.images[::50]

    def release(self) -> None:
        """Free most images."""
        self.images = []


@pytest.mark.skipif(not GLIBC, reason="needs Linux with glibc")
def test_memory_between_what_is_kept_is_returned() -> None:
    source = Reader()
    before = resident()
    release(source)  # type: ignore[arg-type]
    assert len(source.kept) == 40
    assert resident() < before - 80e6


def test_a_source_without_memory_of_its_own_is_left_alone() -> None:
    release(object())  # type: ignore[arg-type]
