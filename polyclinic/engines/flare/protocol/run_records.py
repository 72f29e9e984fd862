"""Records of a run, one line each: rounds, scores, excluded sites. A crash loses the lines after the last
checkpoint.
"""

import json
import os
from pathlib import Path
from typing import Any

from polyclinic.core.rounds import Step


class Records:
    """Writer of a run's records.jsonl, continued from the length in the checkpoint."""

    def __init__(self, path: Path, length: int, method: str, seed: int) -> None:
        """Open the file and truncate it to ``length`` bytes; every line names ``method`` and ``seed``."""
        self._about = {"method": method, "seed": seed}
        self._file = open(path, "ab")  # noqa: SIM115
        self._file.truncate(length)
        self._file.seek(0, os.SEEK_END)

    def write(self, kind: str, **facts: Any) -> None:
        """Append a line."""
        line = {"kind": kind, **self._about, **facts}
        self._file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")

    def step(self, step: Step[Any], done: int, wall: float) -> None:
        """Append the traffic, times and lost sites of one exchange."""
        facts = {name: dict(getattr(step, name)) for name in ("bytes_up", "bytes_down", "seconds", "lost")}
        self.write("round", round=done, wall=wall, asked=list(step.asked), job=step.request.job, **facts)
        for site, reason in step.lost.items():
            self.write("quarantine", round=done, site=site, reason=reason)

    def sync(self) -> int:
        """Force all lines to disk and return the length of the file."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
