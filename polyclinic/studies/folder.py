"""The run folder: what a run leaves on disk, written so that a crash at any moment loses at most the round under way.

```
runs/<name>-<hash8>/
  study.toml      the study as run           records.jsonl   one fact a line
  run.json        who, what, where           journal.jsonl   the hash-chained journal
  arms/<label>-seed<s>/checkpoint.safetensors   the server's state and the sites' memory after the last round
                       best.safetensors         the same, after the best round on validation data
                       model.safetensors        the tested model;  predictions.safetensors   what it said
                       search.jsonl             what a search tried;  chosen.toml   what it chose, to read and change
                       records.jsonl            the arm's records, until the run is finished and joins them
```
With folds an arm's folder is ``<label>-seed<s>-fold<f>``.
"""

import json
import os
import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyclinic import __version__
from polyclinic.core import state as states
from polyclinic.core.journal import Journal, verify
from polyclinic.core.state import savable
from polyclinic.core.tree import Trees


@savable
@dataclass(frozen=True)
class Checkpoint:
    """Where an arm stands.

    Attributes:
        state: The server's. ``memory``: every site's.
        round: How many rounds are complete.
        records: The length of the arm's records.jsonl in bytes at that moment.
        best_round: The best round on validation data so far, and ``best_score`` its score.
        done: Whether the arm has been tested.
        clock: Virtual seconds so far, where machines are simulated.
    """

    state: Any
    memory: Mapping[str, Trees]
    round: int
    records: int
    best_round: int
    best_score: float
    done: bool
    clock: float = 0.0


class RunExists(ValueError):
    """The folder holds a run already. The message says how to go on."""


class ArmFolder:
    """One arm's part of a run's folder.

    Attributes:
        path: Where it is.
        note: Writes an entry to the run's journal, and says how often the same entry is there now.
    """

    def __init__(self, path: Path, note: "Note") -> None:
        self.path, self.note = path, note
        self._records: Any = None

    def open(self, length: int) -> None:
        """Opens the records for appending after their first ``length`` bytes; what follows is redone."""
        self.path.mkdir(parents=True, exist_ok=True)
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

    def close(self) -> None:
        """Closes the records."""
        if self._records is not None:
            self._records.close()
            self._records = None


Note = Callable[[str, dict[str, Any]], int]


class Folder:
    """One run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._notes: Counter[str] = Counter()

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
        self._journal = Journal(self.path / "journal.jsonl")
        for entry in verify(self._journal.path):
            self._notes[_said(entry)] += 1

    def note(self, event: str, details: dict[str, Any]) -> int:
        """Writes an entry to the journal, and says how often the same entry is there now."""
        self._journal.write(event, details)
        said = _said({"event": event, **details})
        self._notes[said] += 1
        return self._notes[said]

    def finish(self, names: Sequence[str]) -> None:
        """Joins the records of all arms, in their order; a crash on the way is made good by doing it again."""
        parts = [self.path / "arms" / name / "records.jsonl" for name in names]
        if all(part.is_file() for part in parts):
            states.write_bytes(self.path / "records.jsonl", b"".join(part.read_bytes() for part in parts))
        for part in parts:
            part.unlink(missing_ok=True)

    def close(self) -> None:
        """Closes the journal."""
        self._journal.close()


def _said(entry: Mapping[str, Any]) -> str:
    chain = ("seq", "previous", "hash")
    return json.dumps({k: v for k, v in entry.items() if k not in chain}, sort_keys=True)


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
