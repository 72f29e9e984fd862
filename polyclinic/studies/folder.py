"""The run folder: what a run leaves on disk, written so that a crash at any moment loses at most the round under way.

```
runs/<name>-<hash8>/
  study.toml      the study as run           records.jsonl   one fact a line
  run.json        who, what, where           journal.jsonl   the hash-chained journal
  arms/<label>-seed<s>/checkpoint.safetensors   the server's state and the sites' memory after the last round
                       best.safetensors         the same, after the best round on validation data
                       model.safetensors        the tested model;  predictions.safetensors   what it said
```
"""

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyclinic import __version__
from polyclinic.core import state as states
from polyclinic.core.journal import Journal
from polyclinic.core.state import savable
from polyclinic.core.tree import Trees


@savable
@dataclass(frozen=True)
class Checkpoint:
    """Where an arm stands.

    Attributes:
        state: The server's. ``memory``: every site's.
        round: How many rounds are complete.
        records: The length of records.jsonl in bytes at that moment.
        best_round: The best round on validation data so far, and ``best_score`` its score.
        done: Whether the arm has been tested.
    """

    state: Any
    memory: Mapping[str, Trees]
    round: int
    records: int
    best_round: int
    best_score: float
    done: bool


class RunExists(ValueError):
    """The folder holds a run already. The message says how to go on."""


class Folder:
    """One run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._records: Any = None

    def begin(self, study: str, info: Mapping[str, Any], resume: bool) -> None:
        """Makes the folder, or takes up the one that is there.

        Raises:
            RunExists: Where a run is there and ``resume`` is not asked for.
        """
        if (self.path / "run.json").exists():
            if not resume:
                raise RunExists(
                    f"{self.path} holds this study already: --resume continues it, --fresh begins again, "
                    f"and `polyclinic report {self.path}` shows it"
                )
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            states.write_bytes(self.path / "study.toml", study.encode())
            states.write_bytes(self.path / "run.json", json.dumps(info, indent=1).encode())
        self.journal = Journal(self.path / "journal.jsonl")

    def arm(self, label: str, seed: int) -> Path:
        """The folder of one arm."""
        path = self.path / "arms" / f"{label}-seed{seed}"
        path.mkdir(parents=True, exist_ok=True)
        return path

    def open_records(self, length: int) -> None:
        """Opens the records for appending after their first ``length`` bytes; what follows is redone."""
        self.close_records()
        self._records = open(self.path / "records.jsonl", "ab")  # noqa: SIM115
        self._records.truncate(length)
        self._records.seek(0, os.SEEK_END)

    def record(self, kind: str, **facts: Any) -> None:
        """Appends one fact."""
        self._records.write(json.dumps({"kind": kind, **facts}, separators=(",", ":")).encode() + b"\n")

    def settle(self) -> int:
        """Forces the records to the disk and returns their length in bytes."""
        self._records.flush()
        os.fsync(self._records.fileno())
        return int(self._records.tell())

    def close_records(self) -> None:
        """Closes the records."""
        if self._records is not None:
            self._records.close()
            self._records = None

    def close(self) -> None:
        """Closes everything."""
        self.close_records()
        self.journal.close()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, str] | None = None) -> None:
    """A plain safetensors file that any tool reads. Names may share a tensor; each is then written whole."""
    from safetensors.torch import save

    apart = {name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    states.write_bytes(path, save(apart, dict(meta or {})))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """What ``write_tensors`` wrote."""
    from safetensors.torch import load_file

    found: dict[str, Tensor] = load_file(path)
    return found


def environment() -> dict[str, Any]:
    """What else a result may depend on."""
    packages = {}
    for name in ("torch", "monai", "numpy", "scipy", "safetensors"):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = "absent"
    return {
        "polyclinic": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda or "none",
        **packages,
    }
