"""Runs of a server, read as they grow: queue, progress, scores, traffic, faults and privacy spent."""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from polyclinic.console.tail import Tail, parsed, stamp_of
from polyclinic.engines.flare import flare_processes
from polyclinic.engines.flare.protocol.messages import printable
from polyclinic.engines.flare.protocol.paths import ServerFolder, SetupError
from polyclinic.engines.flare.server.job_queue import ACTIVE, OVER, Entry, Queue

PREFERRED = ("auc", "dice", "accuracy", "balanced_accuracy", "c_index", "mae", "loss")
LAST_FAULTS = 100


@dataclass
class ServerRun:
    """What is known of one run.

    Attributes:
        entry: Its entry in the queue. ``facts``: what does not change of it.
        progress: The contents of its status.json.
        rows: ``[round, {site: score}]`` for each scored round. ``metric``: of the scores.
        up: Bytes from each site. ``down``: bytes to each site.
        spent: The ε of each site.
        faults: Replies that were lost or refused.
        settled: Whether it has ended and everything is read, so that its files are not looked at again.
    """

    entry: Entry
    facts: dict[str, Any]
    stamp: Any
    progress: dict[str, Any] = field(default_factory=dict)
    progress_stamp: Any = None
    tail: Tail | None = None
    rows: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    metric: str = ""
    up: dict[str, int] = field(default_factory=dict)
    down: dict[str, int] = field(default_factory=dict)
    spent: dict[str, float] = field(default_factory=dict)
    faults: list[dict[str, Any]] = field(default_factory=list)
    count_of_faults: int = 0
    settled: bool = False

    def take(self, fact: Mapping[str, Any]) -> None:
        """Add one record."""
        match fact.get("kind"):
            case "scores":
                metrics = fact["metrics"]
                self.metric = self.metric or next((m for m in (*PREFERRED, *metrics) if m in metrics), "")
                value = metrics.get(self.metric)
                if isinstance(value, int | float) and math.isfinite(value):
                    if not self.rows or self.rows[-1][0] != fact["round"]:
                        self.rows.append((int(fact["round"]), {}))
                    self.rows[-1][1][str(fact["site"])] = round(value, 5)
            case "round":
                for total, key in ((self.up, "bytes_up"), (self.down, "bytes_down")):
                    for site, size in fact.get(key, {}).items():
                        total[site] = total.get(site, 0) + int(size)
            case "quarantine":
                self.count_of_faults += 1
                fault = {"round": fact["round"], "site": str(fact["site"])}
                fault["reason"] = printable(str(fact["reason"]), 500)
                self.faults = [*self.faults, fault][-LAST_FAULTS:]
            case "privacy":
                site = str(fact.get("site") or "")
                self.spent[site] = max(self.spent.get(site, 0.0), float(fact.get("epsilon") or 0.0))

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self.entry.state in OVER

    def waiting(self) -> dict[str, str]:
        """Return the sites that the run waits for, each with the reason."""
        if self.over:
            return {}
        reasons = {str(site): printable(str(why), 300) for site, why in self.progress.get("waiting", {}).items()}
        return reasons if self.entry.state == ACTIVE else {}


class ServerRuns:
    """All runs of a server. A file is read again only when it has changed."""

    def __init__(self, home: ServerFolder) -> None:
        self.home, self._queue = home, Queue(home)
        self.all: dict[str, ServerRun] = {}
        self.unreadable: dict[str, str] = {}

    @property
    def reading(self) -> int:
        """The number of runs whose records were not read to their end yet."""
        return sum(run.tail is None or run.tail.behind for run in self.all.values())

    def look(self, seconds: float) -> bool:
        """Read what is new, and return whether anything is.

        Args:
            seconds: What may be spent on records. The rest is read at the next look, the runs at work first.
        """
        until, changed = time.monotonic() + seconds, self._read_queue()
        waiting = [(name, run) for name, run in self.all.items() if not run.settled]
        for name, run in waiting:
            stamp = stamp_of(self.home.run(name) / "status.json")
            if stamp != run.progress_stamp:
                run.progress_stamp = stamp
                changed |= self._read_progress(name, run)
        ended = 0
        for name, run in sorted(waiting, key=lambda item: (not item[1].over, item[1].entry.since), reverse=True):
            if ended and time.monotonic() > until:
                break  # every look reads one that has ended, so that all are read some time
            changed |= self._read_records(name, run, until)
            ended += run.over
        return changed

    def _read_records(self, name: str, run: ServerRun, until: float) -> bool:
        """Read new records, at least one piece of them, and return whether there are any."""
        ended, changed = run.over, False
        run.tail = run.tail or Tail(self.home.run(name) / "records.jsonl")
        while True:
            lines, anew = run.tail.more()
            if anew:  # cut to its checkpoint by a new attempt
                run.rows, run.up, run.down, run.spent, run.faults = [], {}, {}, {}, []
                run.count_of_faults = 0
            for line in lines:
                if (fact := parsed(line)) is not None:
                    _suppressed(run, fact)
            changed |= bool(lines) or anew
            if not run.tail.behind or time.monotonic() > until:
                run.settled = ended and not run.tail.behind
                return changed

    def _read_queue(self) -> bool:
        changed, found = False, set()
        for path in self.home.queue.glob("*.json") if self.home.queue.is_dir() else ():
            name, stamp = path.stem, stamp_of(path)
            found.add(name)
            known = self.all.get(name)
            if known is not None and known.stamp == stamp:
                continue
            changed = True
            try:
                entry = self._queue.get(name)
                if entry is None:
                    continue
                if known is None:
                    self.all[name] = ServerRun(entry, _facts(entry), stamp)
                else:
                    known.entry, known.stamp, known.settled = entry, stamp, False
                self.unreadable.pop(name, None)
            except (SetupError, OSError, ValueError, TypeError, KeyError) as error:
                self.unreadable[name] = printable(str(error), 300)
        for gone in self.all.keys() - found:
            del self.all[gone]
            changed = True
        return changed

    def _read_progress(self, name: str, run: ServerRun) -> bool:
        """Read status.json, and return whether more than its time has changed."""
        try:
            progress = self._queue.progress(name)
        except (SetupError, OSError):
            return False
        before = {key: value for key, value in run.progress.items() if key != "beat"}
        run.progress = progress
        return before != {key: value for key, value in progress.items() if key != "beat"}

    def facts(self) -> Iterator[dict[str, Any]]:
        """Yield what the page shows of each run, the latest first."""
        for name, run in sorted(self.all.items(), key=lambda item: (item[1].entry.since, item[0]), reverse=True):
            progress, entry = run.progress, run.entry
            working = (
                bool(progress)
                and not run.over
                and flare_processes.alive(progress.get("pid", 0), progress.get("birth", ""))
            )
            yield {
                **run.facts,
                "run": name,
                "state": entry.state,
                "why": printable(entry.why, 300),
                "attempt": entry.attempt,
                "since": entry.since,
                "working": working,
                "phase": str(progress.get("phase", "")),
                "round": int(progress.get("round", 0)),
                "rounds": int(progress.get("rounds", run.facts["planned"])),
                "waiting": run.waiting(),
                "asked": len(progress.get("asked", ())),
                "trained": len(progress.get("trained", ())),
                "absent": {str(s): printable(str(w), 300) for s, w in progress.get("missing", {}).items()},
                "faults": run.count_of_faults,
                "scored": bool(run.rows),
                "last": run.rows[-1][1] if run.rows else {},
                "metric": run.metric,
            }

    def totals(self) -> dict[str, dict[str, Any]]:
        """Return for each site the bytes sent and received, the largest ε spent, and the runs that wait for it."""
        sites: dict[str, dict[str, Any]] = {}

        def of(site: str) -> dict[str, Any]:
            return sites.setdefault(site, {"sent": 0, "received": 0, "epsilon": None, "waits": [], "faults": 0})

        for name, run in self.all.items():
            for site, size in run.up.items():
                of(site)["sent"] += size
            for site, size in run.down.items():
                of(site)["received"] += size
            for site, epsilon in run.spent.items():
                of(site)["epsilon"] = max(of(site)["epsilon"] or 0.0, epsilon)
            for site, why in run.waiting().items():
                of(site)["waits"].append({"run": name, "why": why})
            for fault in run.faults:
                of(fault["site"])["faults"] += 1
        return sites

    def faults(self) -> list[dict[str, Any]]:
        """Return the faults of all runs, of the latest runs first."""
        runs = sorted(self.all.items(), key=lambda item: item[1].entry.since, reverse=True)
        return [{"run": name, **fault} for name, run in runs for fault in reversed(run.faults)][:LAST_FAULTS]


def _suppressed(run: ServerRun, fact: Mapping[str, Any]) -> None:
    """Add a record; one of another version is left out."""
    try:
        run.take(fact)
    except (KeyError, TypeError, ValueError, AttributeError):
        return


def _facts(entry: Entry) -> dict[str, Any]:
    """Return what the page shows of a run request."""
    an = entry.what
    return {
        "study": str(an.study.get("name", "")),
        "method": an.label or str(an.plan["method"]),
        "seed": an.plan.get("seed", 0),
        "mode": an.mode,
        "rehearsal": an.rehearsal,
        "sites": list(an.everyone),
        "planned": int(an.plan.get("rounds", 0)),
        "request": an.hash,
    }
