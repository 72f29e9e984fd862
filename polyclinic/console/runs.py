"""A researcher's page: runs as they go, their curves, comparison, start, stop, resume, reports and disk use."""

import os
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from polyclinic.console.children import Child, Children
from polyclinic.console.page import Events, Refused, Sample, text_of
from polyclinic.console.run_reader import FINISHED, RUNNING, STOPPED, RunReader
from polyclinic.console.tail import open_regular
from polyclinic.errors import ConfigError
from polyclinic.studies.run.run_lock import ask_to_stop, delete

BUDGET = 0.1
"""Seconds that one look spends on reading what is behind; the rest follows at the next look."""
RESCAN_SECONDS = 5.0
READS = frozenset({"file"})
START, RESUME, REPORT, COMPARE = "run", "resume", "report", "compare"
MAX_STUDIES = 100
LOGS = ".console"
"""Folder in the folder of runs with the output of studies that were started here."""


class RunsPage:
    """The page of one folder of runs."""

    kind, title = "runs", "Runs"

    def __init__(self, root: Path, studies: Path | None = None) -> None:
        """Show the runs in ``root``; study files in ``studies`` (the current folder by default) can be started.

        Raises:
            ConfigError: If ``root`` is not a folder.
        """
        if root.exists() and not root.is_dir():
            raise ConfigError(f"{root} is a file: name a folder of runs")
        self.root, self.studies = root.resolve(), (studies or Path.cwd()).resolve()
        self.lock, self.version = threading.RLock(), 0
        self.children = Children()
        self.readers: dict[str, RunReader] = {}
        self.changed: dict[str, int] = {}
        self.gone: dict[str, int] = {}
        self.general = 0
        self._open: dict[tuple[str, str], _Open] = {}
        self._stamps: dict[str, int] = {}
        self._bad = set[str]()
        self._scanned, self._root_stamp = 0.0, 0
        self._results: dict[str, Any] = {}
        self._stamp: Any = None

    @property
    def pace(self) -> float:
        """Seconds between two readings: one while something runs."""
        busy = any(reader.process or reader.behind or not reader.version for reader in self.readers.values())
        return 1.0 if busy or any(child["code"] is None for child in self.children.facts()) else 2.0

    # Reading ----------------------------------------------------------------------------------------------------------

    def look(self) -> bool:
        """Read what is new everywhere; what is behind is read in pieces, the latest runs first."""
        until, before = time.monotonic() + BUDGET, self.version
        self._scan()
        waiting = []
        for name, reader in self.readers.items():
            if not reader.version or reader.behind:
                waiting.append(reader)  # long files are read below, within the budget
            elif self._read(reader):
                self._note(name)
        for reader in sorted(waiting, key=lambda r: str(r.info.get("created", "")), reverse=True):
            self._read(reader, until)
            reader.version = reader.version or 1
            self._note(reader.id)
            if time.monotonic() > until:
                break
        for reader in self.readers.values():
            if reader.process or (reader.needs_disk and time.monotonic() < until):
                size = reader.disk
                reader.read_disk()
                if reader.disk != size:
                    self._note(reader.id)
        for child in self.children.look():
            self._take(child)
        stamp = ([(c["number"], c["code"], c["output"]) for c in self.children.facts()], self.free // 2**24)
        if stamp != self._stamp:
            self._stamp, self.version = stamp, self.version + 1
            self.general = self.version
        for key, opened in list(self._open.items()):
            if not opened.watchers:
                del self._open[key]
            elif self._read(opened.reader, time.monotonic() + BUDGET):
                self.version += 1
        return self.version != before

    def _scan(self) -> None:
        """Find the run folders: in the folder, and one level deeper for the scenarios of a file."""
        stamp = _modified(self.root)
        if stamp == self._root_stamp and time.monotonic() - self._scanned < RESCAN_SECONDS:
            return
        self._root_stamp, self._scanned = stamp, time.monotonic()
        found = {str(path.relative_to(self.root)): path for path in _run_folders(self.root)}
        for name, path in found.items():
            stamp_of_info = _modified(path / "run.json")
            known = self._stamps.get(name) == stamp_of_info  # a run that was begun anew has another description
            if known and (name in self.readers or name in self._bad):
                continue
            self._stamps[name] = stamp_of_info
            try:
                self.readers[name] = RunReader(path, name)
                self._bad.discard(name)
                self.gone.pop(name, None)
                self._note(name)
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                self._bad.add(name)  # not listed until its description changes
        for name in self.readers.keys() - found.keys():
            del self.readers[name], self._stamps[name]
            self.changed.pop(name, None)
            self.version += 1
            self.gone[name] = self.version

    def _read(self, reader: RunReader, until: float = 0.0) -> bool:
        """Let a reader look, until it is not behind or the time is over; return whether it has read anything."""
        try:
            changed = reader.look()
            while reader.behind and time.monotonic() < until:
                changed |= reader.look()
            return changed
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False  # a line of another version: what was read before remains

    def _note(self, name: str) -> None:
        self.version += 1
        self.changed[name] = self.version

    def _take(self, child: Child) -> None:
        """Keep the result of a comparison."""
        if child.what == COMPARE:
            rows = child.result
            self._results[child.about] = {"rows": rows, "error": "" if rows is not None else child.output}
        self.version += 1
        self.general = self.version

    @property
    def free(self) -> int:
        """Free bytes on the disk of the runs."""
        with suppress(OSError):
            status = os.statvfs(self.root)
            return status.f_bavail * status.f_frsize
        return 0

    # What is shown ----------------------------------------------------------------------------------------------------

    def watch(self, query: Mapping[str, str]) -> "_RunsWatcher":
        """Return a watcher of the list and, if the query names one, of a run with a metric."""
        if not self._scanned:
            self.look()
        name, opened = query.get("run", ""), None
        if name in self.readers:
            key = name, query.get("metric", "")[:60]
            if key not in self._open:
                self._open[key] = _Open(RunReader(self.readers[name].path, name, True, key[1]))
                self._read(self._open[key].reader, time.monotonic() + BUDGET)
            opened = self._open[key]
        return _RunsWatcher(self, opened)

    def facts(self) -> dict[str, Any]:
        """Return what the page shows besides the runs."""
        return {
            "root": str(self.root),
            "free": self.free,
            "children": self.children.facts(),
            "studies": [str(path.relative_to(self.studies)) for path in self._study_files()],
            "folder": str(self.studies),
            "compared": self._results,
        }

    def _study_files(self) -> list[Path]:
        """Return the files in the folder of studies that look like study files."""
        found = []
        for path in sorted(self.studies.glob("*.toml")):
            with suppress(OSError):
                with open_regular(path) as file:
                    text = file.read(2**18)
                if b"[[methods]]" in text or b"[task]" in text:
                    found.append(path)
        return found[:MAX_STUDIES]

    # Acting -----------------------------------------------------------------------------------------------------------

    def reads(self) -> frozenset[str]:
        """Return the actions that change nothing."""
        return READS

    def act(self, name: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Carry out an action of the page."""
        match name:
            case "start":
                return self._start(text_of(body, "study", 300))
            case "stop":
                reader = self._reader(body)
                if not (pid := ask_to_stop(reader.path)):
                    raise Refused("no process works on this run")
                return {"say": f"Process {pid} stops after the current round."}
            case "resume":
                return self._resume(self._reader(body))
            case "report":
                return self._report(self._reader(body))
            case "file":
                return self._file(self._reader(body), text_of(body, "file", 200))
            case "compare":
                return self._compare(body)
            case "delete":
                return self._delete(self._reader(body), text_of(body, "confirm", 300))
        raise Refused("this page cannot do that", 404)

    def _reader(self, body: Mapping[str, Any]) -> RunReader:
        name = text_of(body, "run", 300)
        self._scan()
        if name not in self.readers:
            raise Refused(f"there is no run {name!r} in {self.root}", 404)
        return self.readers[name]

    def _start(self, study: str) -> dict[str, Any]:
        path = next((path for path in self._study_files() if path.name == study), None)
        if path is None:
            raise Refused(f"there is no study file {study!r} in {self.studies}", 404)
        if self.children.running(START, study):
            raise Refused(f"{study} was started here and still runs")
        self.root.mkdir(parents=True, exist_ok=True)
        log = self.root / LOGS / f"{path.stem}.log"
        child = self.children.start(START, ["run", str(path), "--out", str(self.root)], about=study, log=log)
        return {"say": f"Started process {child.process.pid}. Reading the data and building the models takes a moment."}

    def _resume(self, reader: RunReader) -> dict[str, Any]:
        if reader.state != STOPPED:
            raise Refused(f"this run is {reader.state}")
        if not reader.summary()["resumable"]:
            raise Refused("this run is one of several of a file: polyclinic run FILE --resume continues all of them")
        words = ["run", str(reader.path / "study.toml"), "--resume", "--out", str(reader.path.parent)]
        log = self.root / LOGS / f"{reader.path.name}.log"
        child = self.children.start(RESUME, words, about=reader.id, log=log)
        return {"say": f"Started process {child.process.pid}. It continues after the last complete round."}

    def _report(self, reader: RunReader) -> dict[str, Any]:
        if reader.state == RUNNING:
            raise Refused("the run writes its report when it is finished")
        if self.children.running(REPORT, reader.id):
            raise Refused("its report is being written")
        self.children.start(REPORT, ["report", str(reader.path)], about=reader.id)
        return {"say": "The report is being written; this takes about as long as loading PyTorch."}

    def _file(self, reader: RunReader, file: str) -> dict[str, Any]:
        if file not in [name for name, _ in reader.files()]:
            raise Refused("this page does not offer that file", 404)
        return {"file": str(reader.path / file)}

    def _compare(self, body: Mapping[str, Any]) -> dict[str, Any]:
        names = body.get("runs")
        if not isinstance(names, list) or not 2 <= len(names) <= 20 or any(name not in self.readers for name in names):
            raise Refused("choose 2 to 20 runs of this folder")
        if unfinished := [name for name in names if self.readers[name].state != FINISHED]:
            raise Refused(f"{unfinished[0]} is not finished, and its test data are not opened for a comparison")
        about = " ".join(names)
        if not self.children.running(COMPARE, about):
            words = ["compare", *(str(self.readers[name].path) for name in names), "--json"]
            self.children.start(COMPARE, words, about=about)
        return {"say": "Comparing the same test patients under each method."}

    def _delete(self, reader: RunReader, confirm: str) -> dict[str, Any]:
        if confirm != reader.id:
            raise Refused(f"to delete this run, type its name: {reader.id}")
        size = reader.disk
        delete(reader.path)
        self._scanned = 0.0
        self._scan()
        return {"say": f"Deleted {reader.id}, {size / 1e6:.1f} MB."}

    def opened(self, role: str) -> None:
        """Do nothing: a folder of runs has no journal of its own."""

    # Measuring --------------------------------------------------------------------------------------------------------

    def metrics(self) -> Iterator[Sample]:
        """Yield the measurements."""
        states = [reader.state for reader in self.readers.values()]
        for state in (RUNNING, STOPPED, FINISHED):
            yield Sample("runs", states.count(state), (("state", state),), "Runs by state.")
        rounds = sum(arm.round for reader in self.readers.values() for arm in reader.arms.values())
        yield Sample("rounds", rounds, help="Rounds in the records of all runs.")
        faults = sum(reader.count_of_faults for reader in self.readers.values())
        yield Sample("faults", faults, help="Replies that were lost or refused, in all runs.")
        disk = sum(reader.disk for reader in self.readers.values())
        yield Sample("runs_bytes", disk, help="Bytes of all run folders.")
        yield Sample("disk_free_bytes", self.free, help="Free bytes on their disk.")
        failed = sum(child["code"] not in (None, 0, 3) for child in self.children.facts())
        yield Sample("commands_failed", failed, help="Commands of this console that failed.")

    def close(self) -> None:
        """End what the page has open. Runs continue."""
        self.children.close()


class _Open:
    """The reader of a run with its curves, shared by all watchers of the same run and metric, and closed with them."""

    def __init__(self, reader: RunReader) -> None:
        self.reader = reader
        self.watchers = weakref.WeakSet[_RunsWatcher]()


class _RunsWatcher:
    """Watcher of the list of runs and of at most one run; sends only what it has not sent."""

    def __init__(self, page: RunsPage, opened: _Open | None) -> None:
        self.page, self.open = page, opened
        self._rows: dict[str, int] | None = None
        self._general = -1
        self._seen = 0
        self._generation = self._version = -1
        self._sent: dict[str, tuple[int, Any]] = {}
        if opened:
            opened.watchers.add(self)

    def updates(self) -> Events:
        """Return the rows of the list that changed, and the new rounds of the open run."""
        page, events = self.page, Events()
        if self._general != page.general:
            self._general = page.general
            events.append(("facts", page.facts()))
        if self._rows is None or self._seen != page.version:
            changed = [n for n, at in page.changed.items() if self._rows is None or self._rows.get(n) != at]
            gone = [name for name, at in page.gone.items() if self._rows is not None and at > self._seen]
            if changed or gone or self._rows is None:
                rows = [page.readers[name].summary() for name in changed if name in page.readers]
                events.append(("rows", {"rows": rows, "gone": gone, "whole": self._rows is None}))
            self._rows, self._seen = dict(page.changed), page.version
        if self.open:
            events += self._of_run(self.open.reader)
        return events

    def _of_run(self, reader: RunReader) -> Events:
        if (reader.generation, reader.version) == (self._generation, self._version):
            return []
        if reader.generation != self._generation:
            self._sent = {}
        self._generation, self._version = reader.generation, reader.version
        arms = []
        for arm in reader.arms.values():
            first, before = self._sent.get(arm.name, (0, None))
            first = max(0, first - 1)  # the last round may have got more sites
            facts = reader.arm(arm, first)
            if facts != before:
                arms.append(facts)
                self._sent[arm.name] = len(arm.rows), reader.arm(arm, max(0, len(arm.rows) - 1))
        listed = self.page.readers.get(reader.id)
        detail = {**reader.detail(), "disk": listed.disk if listed else 0}  # sizes are added up once, for the list
        return [("run", detail), ("arms", arms)]


def _run_folders(root: Path) -> Iterator[Path]:
    """Yield the run folders in ``root`` and in its folders; links are not followed."""
    for folder in _folders(root):
        if (folder / "run.json").is_file():
            yield folder
        elif not folder.name.startswith("."):
            yield from (inner for inner in _folders(folder) if (inner / "run.json").is_file())


def _folders(path: Path) -> Iterator[Path]:
    try:
        entries = sorted(os.scandir(path), key=lambda entry: entry.name)
    except OSError:
        return
    yield from (Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False))


def _modified(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
