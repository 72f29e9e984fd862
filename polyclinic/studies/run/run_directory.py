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
  .lock           held by the process that runs it   stop   asks it to stop after the round under way
```
With folds an arm's folder is ``<label>-seed<s>-fold<f>``.
"""

import fcntl
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyclinic.core import atomic
from polyclinic.core.audit_log import Journal, verify
from polyclinic.engines.plan import Plan
from polyclinic.errors import IntegrityError, PolyclinicError, RunError

log = logging.getLogger(__name__)
LOCK, STOP = ".lock", "stop"


class RunExists(RunError, ValueError):
    """The folder holds a run already. The message says how to go on."""


class RunHeld(RunError, ValueError):
    """Another process works in the run's folder. The message names it."""


class Stopped(PolyclinicError):
    """A run was asked to stop, and did so between two rounds. Nothing is lost."""


class ArmFolder:
    """One arm's part of a run's folder.

    Attributes:
        path: Where it is.
        note: Writes an entry to the run's journal, and says how often the same entry is there now.
        stop: The file that asks the run to stop.
    """

    def __init__(self, path: Path, note: "Note", stop: Path) -> None:
        self.path, self.note, self.stop = path, note, stop
        self._records: Any = None

    def check_stop(self) -> None:
        """Called between two rounds, when everything is on the disk.

        Raises:
            Stopped: If the run was asked to stop.
        """
        if self.stop.exists():
            raise Stopped(f"stopped as {self.stop} asked")

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
        self._lock: Any = None
        self._journal: Journal | None = None

    def hold(self) -> None:
        """Holds the folder for this process, until ``close``; the system lets go of it if the process is killed.

        Raises:
            RunHeld: If another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = open(self.path / LOCK, "a+", encoding="ascii")  # noqa: SIM115
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise RunHeld(
                f"{self.path}: process {holder(self.path) or '(just ended)'} works on this run. Wait for it, or stop "
                f"it: polyclinic stop {self.path}"
            ) from None
        except OSError as error:  # a file system without locks
            log.warning("%s: nothing keeps a second process away from this run (%s)", self.path, error)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        self._lock = lock
        (self.path / STOP).unlink(missing_ok=True)
        for folder in (self.path, *self.path.glob("arms/*")):
            atomic.remove_leftovers(folder)

    def begin(self, study: str, info: Mapping[str, Any], resume: bool) -> None:
        """Makes the folder, or takes up the one that is there.

        Raises:
            RunExists: Where a run is there and ``resume`` is not asked for.
            RunHeld: If another process works on it.
        """
        if self._lock is None:
            self.hold()
        if (self.path / "run.json").exists():
            if not resume:
                raise RunExists(
                    f"{self.path} holds this study already: --resume continues it, --fresh begins again, "
                    f"and `polyclinic report {self.path}` shows it"
                )
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            atomic.write(self.path / "study.toml", study)
            atomic.write_json(self.path / "run.json", dict(info))
        journal = self._journal = Journal(self.path / "journal.jsonl")
        for entry in verify(journal.path):
            self._notes[_said(entry)] += 1

    def note(self, event: str, details: dict[str, Any]) -> int:
        """Writes an entry to the journal, and says how often the same entry is there now."""
        assert self._journal is not None
        self._journal.write(event, details)
        said = _said({"event": event, **details})
        self._notes[said] += 1
        return self._notes[said]

    def finish(self, names: Sequence[str]) -> None:
        """Joins the records of all arms, in their order; a crash on the way is made good by doing it again."""
        parts = [self.path / "arms" / name / "records.jsonl" for name in names]
        if all(part.is_file() for part in parts):
            atomic.write(self.path / "records.jsonl", b"".join(part.read_bytes() for part in parts))
        for part in parts:
            part.unlink(missing_ok=True)

    def close(self) -> None:
        """Closes the journal and lets go of the folder."""
        if self._journal is not None:
            self._journal.close()
        if self._lock is not None:
            (self.path / STOP).unlink(missing_ok=True)
            self._lock.truncate(0)
            self._lock.close()
            self._lock = None


def holder(path: Path) -> int:
    """The process that works on the run in the folder at ``path``; 0 if there is none."""
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
    """Asks the process that works on the run at ``path`` to stop after the round under way; its number, 0 for none."""
    pid = holder(path)
    if pid:
        (path / STOP).touch()
    return pid


def _said(entry: Mapping[str, Any]) -> str:
    chain = ("seq", "previous", "hash")
    return json.dumps({k: v for k, v in entry.items() if k not in chain}, sort_keys=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, str] | None = None) -> None:
    """A plain safetensors file that any tool reads. Names may share a tensor; each is then written whole."""
    from safetensors.torch import save

    apart = {name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    atomic.write(path, save(apart, dict(meta or {})))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """What ``write_tensors`` wrote."""
    from safetensors.torch import load_file

    found: dict[str, Tensor] = load_file(path)
    return found


def read_plan(file: Path) -> Plan:
    """Read the plan in the metadata of a model file.

    Raises:
        IntegrityError: If the file carries no plan.
    """
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        meta = opened.metadata() or {}
    if "plan" not in meta:
        raise IntegrityError(f"{file}: carries no plan, so its network is unknown")
    return Plan.from_json(meta["plan"])
