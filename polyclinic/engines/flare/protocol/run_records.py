"""What a run found, line by line: rounds, scores, who was left out. A crash loses what came after the checkpoint."""

import json
import os
from pathlib import Path
from typing import Any

from polyclinic.core.rounds import Step


class Records:
    """A run's records.jsonl, from where the checkpoint says that it stood."""

    def __init__(self, path: Path, length: int, method: str, seed: int) -> None:
        """Opens the file and cuts it to ``length`` bytes; every line names ``method`` and ``seed``."""
        self._about = {"method": method, "seed": seed}
        self._file = open(path, "ab")  # noqa: SIM115
        self._file.truncate(length)
        self._file.seek(0, os.SEEK_END)

    def write(self, kind: str, **facts: Any) -> None:
        """Adds a line."""
        line = {"kind": kind, **self._about, **facts}
        self._file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")

    def step(self, step: Step[Any], done: int, wall: float) -> None:
        """Adds what one exchange did, and who was lost in it."""
        facts = {name: dict(getattr(step, name)) for name in ("bytes_up", "bytes_down", "seconds", "lost")}
        self.write("round", round=done, wall=wall, asked=list(step.asked), job=step.request.job, **facts)
        for site, reason in step.lost.items():
            self.write("quarantine", round=done, site=site, reason=reason)

    def sync(self) -> int:
        """Forces all lines to the disk; the file's length."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
