"""The run folder. A crash at any moment loses at most the current round.

```
runs/<name>-<hash8>/
  study.toml      the study                  records.jsonl   one record per line
  run-plan.toml   the plan that it names, from which every later command reads the study
  run.json        description of the run     journal.jsonl   the hash-chained journal
  arms/<label>-seed<s>/                         one method run:
                       checkpoint.safetensors   server state and site states after the last round
                       best.safetensors         the same, after the best round on validation data
                       model.safetensors        the tested model;  predictions.safetensors   its predictions
                       inputs.toml              how it scales rows of a table; inputs-<site>.toml if sites differ
                       search.jsonl             trials of a search;  chosen.toml   the chosen values, editable
                       records.jsonl            records of the method run, until the run ends and joins them
                       now.json                 progress within the current round
  linear/<baseline>-seed<s>.safetensors         test predictions of linear models of a table
  data.safetensors   hashes of the data's examples      stop   makes it stop after the current round
  profile.json    where the time went, of a run with --profile (profile-run.json, until the run ends)
  .lock           held by the process of the run
```
With folds, the folder of a method run is ``<label>-seed<s>-fold<f>``.
"""

import fcntl
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from polyclinic.core import atomic
from polyclinic.core.audit_log import Journal, verify
from polyclinic.data.preprocessing.table_statistics import Statistics
from polyclinic.engines.plan import Plan
from polyclinic.errors import IntegrityError, PolyclinicError, RunError
from polyclinic.evaluation.records.method_runs import PLAN
from polyclinic.studies.run.run_lock import LOCK, STOP, holder

log = logging.getLogger(__name__)


class RunExists(RunError, ValueError):
    """The folder already contains a run. The message says how to continue."""


class RunHeld(RunError, ValueError):
    """Another process works in the run's folder. The message names it."""


class Stopped(PolyclinicError):
    """A run stopped between two rounds because it was asked to. Nothing is lost."""


class MethodRunFolder:
    """Folder of one method run.

    Attributes:
        path: The folder.
        note: Writes an entry to the run's journal, and returns the number of equal entries.
        stop: Path of the file that makes the run stop.
    """

    def __init__(self, path: Path, note: "Note", stop: Path) -> None:
        self.path, self.note, self.stop = path, note, stop
        self._records: Any = None

    def check_stop(self) -> None:
        """Stop if it was requested. Called between two rounds, when everything is on disk.

        Raises:
            Stopped: If the run was asked to stop.
        """
        if self.stop.exists():
            raise Stopped(f"stopped as {self.stop} asked")

    def open(self, length: int) -> None:
        """Open the records for appending after their first ``length`` bytes, and delete the rest."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._records = open(self.path / "records.jsonl", "ab")  # noqa: SIM115
        self._records.truncate(length)
        self._records.seek(0, os.SEEK_END)

    def record(self, kind: str, **facts: Any) -> None:
        """Append one record."""
        self._records.write(json.dumps({"kind": kind, **facts}, separators=(",", ":")).encode() + b"\n")

    def settle(self) -> int:
        """Force the records to disk, and return their length in bytes."""
        self._records.flush()
        os.fsync(self._records.fileno())
        return int(self._records.tell())

    def close(self) -> None:
        """Close the records."""
        if self._records is not None:
            self._records.close()
            self._records = None


Note = Callable[[str, dict[str, Any]], int]


class Folder:
    """Folder of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._notes: Counter[str] = Counter()
        self._lock: Any = None
        self._journal: Journal | None = None

    def hold(self) -> None:
        """Lock the folder for this process until ``close``, or until the process ends.

        Raises:
            RunHeld: If another process holds it.
        """
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / LOCK, "a+", encoding="ascii")  # noqa: SIM115
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                raise RunHeld(
                    f"{self.path}: process {holder(self.path) or '(just ended)'} works on this run. Wait for it, or "
                    f"stop it: polyclinic stop {self.path}"
                ) from None
            except OSError as error:  # a file system without locks
                log.warning("%s: the file system has no locks: do not start a second process (%s)", self.path, error)
            if _is_at(lock, self.path / LOCK):
                break
            lock.close()  # the process that held it deleted the folder
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        self._lock = lock
        (self.path / STOP).unlink(missing_ok=True)
        for folder in (self.path, self.path / "report", *self.path.glob("arms/*")):
            atomic.remove_leftovers(folder)

    @property
    def running(self) -> bool:
        """Whether the run in the folder has begun or resumed, and not ended."""
        return self._journal is not None

    @property
    def begun(self) -> bool:
        """Whether the folder contains a run."""
        return (self.path / "run.json").exists()

    def clear(self) -> None:
        """Delete everything except the lock."""
        for entry in self.path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != LOCK:
                entry.unlink()

    def begin(self, study: str, info: Mapping[str, Any], resume: bool, plan: bytes | None = None) -> None:
        """Write the description of the run, or continue with the existing run. The folder is locked.

        Args:
            study: The study file.
            info: The content of ``run.json``.
            resume: Whether to continue an existing run.
            plan: The plan that the study names, if any.

        Raises:
            RunExists: If the folder contains a run and ``resume`` is not set.
        """
        if not self.begun:
            atomic.write(self.path / "study.toml", study)
            if plan is not None:
                atomic.write(self.path / PLAN, plan)
            atomic.write_json(self.path / "run.json", dict(info))
        elif not resume:
            raise RunExists(
                f"{self.path} already contains this study: --resume continues it, --fresh starts again, "
                f"and `polyclinic report {self.path}` shows it"
            )
        journal = self._journal = Journal(self.path / "journal.jsonl")
        for entry in verify(journal.path):
            self._notes[_identity(entry)] += 1

    def note(self, event: str, details: dict[str, Any]) -> int:
        """Write an entry to the journal, and return the number of equal entries."""
        assert self._journal is not None
        self._journal.write(event, details)
        same = _identity({"event": event, **details})
        self._notes[same] += 1
        return self._notes[same]

    def finish(self, names: Sequence[str]) -> None:
        """Join the records of all method runs in their order. After a crash this can be repeated."""
        parts = [self.path / "arms" / name / "records.jsonl" for name in names]
        if all(part.is_file() for part in parts):
            atomic.write(self.path / "records.jsonl", b"".join(part.read_bytes() for part in parts))
        for part in parts:
            part.unlink(missing_ok=True)

    def close_journal(self) -> None:
        """Close the journal. The folder remains locked."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def close(self) -> None:
        """Close the journal and unlock the folder. A folder without a run is deleted if nothing else is in it."""
        self.close_journal()
        if self._lock is not None:
            (self.path / STOP).unlink(missing_ok=True)
            if [entry.name for entry in self.path.iterdir()] == [LOCK]:
                shutil.rmtree(self.path, ignore_errors=True)
            self._lock.truncate(0)
            self._lock.close()
            self._lock = None


@contextmanager
def held(path: Path) -> Iterator[Folder]:
    """Lock the run folder at ``path`` for this process within the context.

    Raises:
        RunHeld: If another process holds it.
    """
    folder = Folder(path)
    folder.hold()
    try:
        yield folder
    finally:
        folder.close()


def _is_at(file: IO[str], path: Path) -> bool:
    """Return whether the open ``file`` is the one at ``path``."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _identity(entry: Mapping[str, Any]) -> str:
    chain = ("seq", "previous", "hash")
    return json.dumps({k: v for k, v in entry.items() if k not in chain}, sort_keys=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, str] | None = None) -> None:
    """Write a plain safetensors file. A tensor that several names share is written once for each name.

    Equal contents give equal bytes: the library writes the metadata in an order that changes from call to call.
    """
    from safetensors.torch import save

    apart = {name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    data = save(apart, dict(meta or {}))
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    atomic.write(path, len(text).to_bytes(8, "little") + text + data[end:])


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a file of ``write_tensors``.

    Raises:
        IntegrityError: If it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise IntegrityError(f"{path} is damaged ({error})") from None
    return tensors


def read_plan(file: Path) -> Plan:
    """Read the plan in the metadata of a model file.

    Raises:
        IntegrityError: If the file is damaged, or carries no plan.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            meta = opened.metadata() or {}
    except SafetensorError as error:
        raise IntegrityError(f"{file} is damaged ({error}): train this method and seed again") from None
    if "plan" not in meta:
        raise IntegrityError(f"{file}: carries no plan, so its network is unknown")
    return Plan.from_json(meta["plan"])


def write_statistics(folder: Path, statistics: Mapping[str, Statistics]) -> None:
    """Write how the rows of a table are filled and scaled: one file, or one for each site if sites differ."""
    texts = {site: fit.text() for site, fit in statistics.items()}
    if len(set(texts.values())) == 1:
        texts = {"": next(iter(texts.values()))}
    for site, text in texts.items():
        atomic.write(folder / (f"inputs-{site}.toml" if site else "inputs.toml"), text)


def statistics_file(folder: Path, site: str = "") -> Path | None:
    """Return the file with which rows are filled and scaled, of all sites or of ``site``; None if there is none."""
    files = [folder / "inputs.toml", *([folder / f"inputs-{site}.toml"] if site else [])]
    return next((file for file in files if file.is_file()), None)
