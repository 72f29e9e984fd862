"""One run folder, read as it grows: its summary and, for the run that is open, its curves. Requires no PyTorch.

Test scores stay closed until every method run is done, so that no method is chosen by them.
"""

import json
import math
import os
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polyclinic.console.tail import Tail, open_regular, parsed, stamp_of
from polyclinic.engines import step_file
from polyclinic.engines.flare.protocol.messages import printable
from polyclinic.evaluation.records.method_runs import BASELINES, arm_name
from polyclinic.studies.run.run_lock import LOCK, holder

RUNNING, STOPPED, FINISHED = "running", "stopped", "finished"
LAST_EVENTS, LAST_FAULTS = 40, 100
MAX_INFO, MAX_NOW, MAX_METHOD_RUNS = 16 * 2**20, 2**20, 20_000


@dataclass
class MethodRunView:
    """What is known of one method run.

    Attributes:
        label: The method. ``seed`` and ``fold``: of the method run. ``name``: its folder.
        round: Number of complete rounds. ``wall``: seconds for them. ``up`` and ``down``: bytes from and to all sites.
        best: The best mean over training sites on validation data; None without scores.
        best_round: Its round. ``best_sites``: the scores of the sites in it.
        tested: Whether the test was opened. ``test``: the scores by site.
        trials: Number of settings that its search has tried.
        epsilon: The largest ε that a site has spent.
        now: Progress within the current round.
        rows: For the open run, ``[round, {site: score}]`` for each scored round.
    """

    label: str
    seed: int
    fold: int
    name: str
    round: int = 0
    wall: float = 0.0
    up: int = 0
    down: int = 0
    best: float | None = None
    best_round: int = 0
    best_sites: dict[str, float] = field(default_factory=dict)
    tested: bool = False
    test: dict[str, float] = field(default_factory=dict)
    trials: int = 0
    epsilon: float | None = None
    now: dict[str, Any] = field(default_factory=dict)
    rows: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    scored: tuple[int, dict[str, float]] = (0, {})


class RunReader:
    """Reader of one run folder.

    Attributes:
        path: The folder. ``id``: its path below the folder of runs.
        version: Number of the last change. ``generation``: number of times that it was read from the beginning.
        process: The process that works on it, or 0.
    """

    def __init__(self, path: Path, id: str, curves: bool = False, metric: str = "") -> None:
        """Read the description of the run; its records are read by ``look``.

        Args:
            path: The folder.
            id: Its name on the page.
            curves: Whether the scores of all rounds are kept.
            metric: The metric; the study's primary metric by default.

        Raises:
            OSError, ValueError, KeyError, TypeError: If the folder contains no readable description.
        """
        self.path, self.id, self.curves = path, id, curves
        self.info = _info(path)
        primary = str(self.info["metric"])
        self.metric = metric or primary
        self.primary = self.metric == primary
        self.metrics = {primary}
        self.training = [str(s["name"]) for s in self.info["sites"] if s.get("role", "training") == "training"]
        self.higher = bool(self.info.get("higher_is_better", True)) if self.primary else not _is_loss(self.metric)
        self.version = self.generation = self.process = 0
        self.disk, self._disk_read = 0, 0.0
        self._lock_stamp: Any = None
        self._quiet: Any = None
        self._begin()

    def _begin(self) -> None:
        """Forget what was read."""
        folds = range(int(self.info["folds"])) if self.info.get("folds") else [None]
        if len(self.info.get("seeds", [0])) * len(folds) * len(self.info["methods"]) > MAX_METHOD_RUNS:
            raise ValueError("run.json describes too many method runs")
        self.arms: dict[tuple[str, int, int], MethodRunView] = {}
        for seed in self.info.get("seeds", [0]):
            for fold in folds:
                for method in self.info["methods"]:
                    label = str(method["label"])
                    view = MethodRunView(label, int(seed), fold or 0, arm_name(label, int(seed), fold))
                    self.arms[label, view.seed, view.fold] = view
        self._whole = (self.path / "records.jsonl").is_file()
        parts = [self.path / "arms" / arm.name / "records.jsonl" for arm in self.arms.values()]
        self._tails = [Tail(path) for path in ([self.path / "records.jsonl"] if self._whole else parts)]
        self._journal = Tail(self.path / "journal.jsonl")
        self.events: list[dict[str, Any]] = []
        self.faults: list[dict[str, Any]] = []
        self.count_of_faults = 0
        self.finished = False
        self.generation += 1

    @property
    def behind(self) -> bool:
        """Whether there is more to read at once."""
        return any(tail.behind for tail in self._tails)

    @property
    def state(self) -> str:
        """``running``, ``stopped`` or ``finished``."""
        return RUNNING if self.process else FINISHED if self.finished else STOPPED

    def look(self) -> bool:
        """Read what is new, and return whether anything is."""
        changed = self._look_at_lock()
        if not changed and not self.process and not self.behind:  # it does not grow: its journal shows if it did
            stamp = stamp_of(self.path / "journal.jsonl")
            if stamp == self._quiet:
                return False
            self._quiet = stamp
        changed |= self._read_journal()
        changed |= self._read_records()
        if self.process:
            changed |= self._read_now()
        self.version += changed
        return changed

    def _look_at_lock(self) -> bool:
        """Look which process works on the run. The lock is tried only if it was taken since, or is held."""
        stamp = stamp_of(self.path / LOCK)
        if stamp == self._lock_stamp and not self.process:
            return False
        before, self._lock_stamp = self.process, stamp
        self.process = holder(self.path)
        return before != self.process

    def _read_journal(self) -> bool:
        lines, anew = self._journal.more()
        entries = [entry for line in lines if (entry := parsed(line)) is not None]
        resumed = sum(entry.get("event") == "resumed" for entry in entries)
        whole = (self.path / "records.jsonl").is_file()
        if anew or (resumed and self.version) or whole != self._whole:
            # A method run that resumes begins after its checkpoint; its records are cut there, and grow again.
            self._begin()
            lines, _ = self._journal.more()
            entries = [entry for line in lines if (entry := parsed(line)) is not None]
        for entry in entries:
            self.finished = entry.get("event") == "finished"
        hidden = ("previous", "hash")
        shown = [{k: v for k, v in entry.items() if k not in hidden} for entry in entries[-LAST_EVENTS:]]
        self.events = [*self.events, *shown][-LAST_EVENTS:]
        return bool(entries) or anew

    def _read_records(self) -> bool:
        changed = False
        for tail in self._tails:
            lines, anew = tail.more()
            if anew and not self._whole:
                self._begin()
                self._read_journal()
                return True
            for line in lines:
                if (fact := parsed(line)) is not None:
                    self._take(fact)
            changed |= bool(lines)
        return changed

    def _read_now(self) -> bool:
        """Read the progress within the current round of the method runs that have begun and not ended."""
        changed = False
        for arm in self.arms.values():
            if arm.tested:
                now: dict[str, Any] = {}
            else:
                now = _now(self.path / "arms" / arm.name, arm.round)
            changed |= now != arm.now
            arm.now = now
        return changed

    def _take(self, fact: Mapping[str, Any]) -> None:
        """Add one record. One of another version is left out."""
        with suppress(KeyError, TypeError, ValueError, AttributeError):
            self._add(fact)

    def _add(self, fact: Mapping[str, Any]) -> None:
        arm = self.arms.get((fact.get("method", ""), fact.get("seed", 0), fact.get("fold", 0)))
        kind = fact.get("kind")
        if arm is None or ("trial" in fact and kind != "trial"):
            return
        if kind != "scores":
            self._settle(arm)
        if kind == "round":
            arm.round, arm.wall = int(fact["round"]), arm.wall + float(fact.get("wall", 0.0))
            arm.up += sum(fact.get("bytes_up", {}).values())
            arm.down += sum(fact.get("bytes_down", {}).values())
        elif kind == "quarantine":
            self.count_of_faults += 1
            fault = {"method": arm.name, "round": fact["round"], "site": str(fact["site"])}
            self.faults = [*self.faults, {**fault, "reason": printable(str(fact["reason"]), 500)}][-LAST_FAULTS:]
        elif kind == "scores":
            self.metrics |= set(fact["metrics"]) if self.curves else set()
            self._score(arm, int(fact["round"]), str(fact["site"]), fact["metrics"].get(self.metric))
        elif kind == "test":
            value = fact["metrics"].get(self.metric)
            if isinstance(value, int | float) and math.isfinite(value):
                arm.test[str(fact["site"])] = value
        elif kind == "privacy":
            arm.epsilon = max(arm.epsilon or 0.0, float(fact.get("epsilon") or 0.0))
        elif kind == "sealed":
            arm.tested = True
        elif kind == "trial":
            arm.trials += 1

    def _score(self, arm: MethodRunView, number: int, site: str, value: Any) -> None:
        if not isinstance(value, int | float) or not math.isfinite(value):
            return
        if arm.scored[0] != number:
            self._settle(arm)
            arm.scored = (number, {})
            if self.curves:
                arm.rows.append(arm.scored)
        arm.scored[1][site] = round(value, 5)

    def _settle(self, arm: MethodRunView) -> None:
        """Compare the last scored round, which is complete, with the best one."""
        arm.best, arm.best_round, arm.best_sites = self.best(arm)

    def best(self, arm: MethodRunView) -> tuple[float | None, int, dict[str, float]]:
        """Return the best mean over training sites so far, its round, and the scores of the sites in it."""
        before, (number, sites) = (arm.best, arm.best_round, arm.best_sites), arm.scored
        mean = self.mean(sites)
        if mean is None or (arm.best is not None and len(sites) < len(arm.best_sites) and not arm.tested):
            return before
        better = arm.best is None or (mean > arm.best if self.higher else mean < arm.best)
        return (mean, number, sites) if better else before

    def mean(self, values: Mapping[str, float]) -> float | None:
        """Return the mean over the sites that train."""
        inside = [value for site, value in values.items() if site in self.training]
        return sum(inside) / len(inside) if inside else None

    def read_disk(self) -> None:
        """Add up the sizes of the files, at most every 30 seconds for a running run and once for others."""
        now = time.monotonic()
        if not self._disk_read or (self.process and now - self._disk_read > 30):
            self.disk, self._disk_read = _size(self.path), now

    @property
    def needs_disk(self) -> bool:
        """Whether the sizes were not added up yet."""
        return not self._disk_read

    def seconds_left(self) -> float | None:
        """Return the expected seconds until the last test, from the time of the rounds so far; None if unknown."""
        rounds = int(self.info.get("rounds", 0))
        known = {arm.label: arm.wall / arm.round for arm in self.arms.values() if arm.round}
        if not self.process or not known:
            return None
        usual = statistics.median(known.values())
        open_ = [arm for arm in self.arms.values() if not arm.tested]
        work = sum((rounds - arm.round) * known.get(arm.label, usual) for arm in open_)
        at_once = sum(1 for arm in open_ if arm.round or arm.now)
        return work / max(1, at_once)

    def summary(self) -> dict[str, Any]:
        """Return what the list of runs shows."""
        arms, rounds = list(self.arms.values()), int(self.info.get("rounds", 0))
        by_label: dict[str, list[float]] = {}
        for arm in arms:
            if (best_mean := self.best(arm)[0]) is not None and arm.label not in self.baselines:
                by_label.setdefault(arm.label, []).append(best_mean)
        means = {label: sum(values) / len(values) for label, values in by_label.items()}
        best = (max if self.higher else min)(means, key=lambda label: means[label]) if means else None
        return {
            "id": self.id,
            "name": str(self.info["name"]),
            "title": printable(str(self.info.get("title") or self.info["name"]), 200),
            "state": self.state,
            "reading": self.behind or not self.version,
            "created": str(self.info.get("created", "")),
            "metric": self.metric,
            "done": sum(rounds if arm.tested else min(arm.round, rounds) for arm in arms),
            "total": rounds * len(arms),
            "runs": len(arms),
            "tested": sum(arm.tested for arm in arms),
            "methods": len(self.info["methods"]),
            "sites": len(self.info["sites"]),
            "seeds": len(self.info.get("seeds", [0])),
            "faults": self.count_of_faults,
            "bytes": sum(arm.up + arm.down for arm in arms),
            "disk": self.disk,
            "left": self.seconds_left(),
            "best": None if best is None else {"label": best, "value": round(means[best], 5)},
            "report": (self.path / "report" / "report.html").is_file(),
            "process": self.process,
            "resumable": self.path.name == f"{self.info['name']}-{str(self.info.get('hash', ''))[:8]}",
        }

    @property
    def baselines(self) -> set[str]:
        """Labels of the methods that are not federated."""
        return {str(m["label"]) for m in self.info["methods"] if m.get("name") in BASELINES or m["label"] in BASELINES}

    def detail(self) -> dict[str, Any]:
        """Return what the page of this run shows, without the scores of single rounds."""
        data = self.info.get("data", {})
        return {
            **self.summary(),
            "primary": str(self.info["metric"]),
            "metrics": sorted(self.metrics),
            "higher": self.higher,
            "rounds": int(self.info.get("rounds", 0)),
            "hash": str(self.info.get("hash", "")),
            "task": str(self.info.get("task", "")),
            "parameters": int(self.info.get("parameters", 0)),
            "data": {key: data.get(key) for key in ("title", "license", "simulated", "sites_are")},
            "method": [{**_method(m), "baseline": m["label"] in self.baselines} for m in self.info["methods"]],
            "site": [_site(site) for site in self.info["sites"]],
            "seed": list(self.info.get("seeds", [0])),
            "folds": int(self.info.get("folds") or 0),
            "fault": self.faults,
            "events": self.events,
            "files": [[name, size] for name, size in self.files()],
            "generation": self.generation,
        }

    def arm(self, arm: MethodRunView, first_row: int) -> dict[str, Any]:
        """Return what the page shows of a method run, with the scored rounds from ``first_row`` on."""
        best, best_round, best_sites = self.best(arm)
        return {
            "name": arm.name,
            "label": arm.label,
            "seed": arm.seed,
            "fold": arm.fold,
            "round": arm.round,
            "wall": round(arm.wall, 3),
            "bytes": arm.up + arm.down,
            "best": best,
            "best_round": best_round,
            "best_sites": best_sites,
            "tested": arm.tested,
            "test": arm.test if self.finished else None,
            "trials": arm.trials,
            "epsilon": arm.epsilon,
            "now": arm.now,
            "from": first_row,
            "rows": arm.rows[first_row:],
        }

    def files(self) -> Iterator[tuple[str, int]]:
        """Yield the names and sizes of the files that the page offers: no predictions, and nothing else of patients."""
        named = ("study.toml", "run.json", "records.jsonl", "journal.jsonl")
        found = [self.path / name for name in named]
        folder = self.path / "report"
        found += sorted(folder.glob("*.*")) if folder.is_dir() and not folder.is_symlink() else []
        for path in found:
            if (
                path.is_file()
                and not path.is_symlink()
                and path.suffix in (".toml", ".json", ".jsonl", ".csv", ".html")
            ):
                yield str(path.relative_to(self.path)), path.stat().st_size


def _info(path: Path) -> dict[str, Any]:
    """Read ``run.json``."""
    with open_regular(path / "run.json") as file:
        info = json.loads(file.read(MAX_INFO))
    if not isinstance(info, dict) or not isinstance(info["methods"], list) or not isinstance(info["sites"], list):
        raise ValueError("run.json describes no run")
    return info


def _method(method: Mapping[str, Any]) -> dict[str, Any]:
    return {key: str(method.get(key) or "") for key in ("label", "name", "title", "leaves")}


def _site(site: Mapping[str, Any]) -> dict[str, Any]:
    patients = {str(role): int(count) for role, count in site.get("patients", {}).items()}
    return {"name": str(site["name"]), "role": str(site.get("role", "training")), "patients": patients}


def _now(folder: Path, done: int) -> dict[str, Any]:
    """Return the progress within a round, unless that round is complete: sites, and minibatches of those that train."""
    try:
        with open_regular(folder / "now.json") as file:
            now = json.loads(file.read(MAX_NOW))
        asked, arrived = len(now["asked"]), len(now["arrived"])
        waits = [site for site in now["asked"] if site not in now["arrived"]][:20]
        if int(now["round"]) <= done:
            return {}
        steps = {
            one["site"]: [one["done"], one["total"]]
            for one in step_file.read(folder)
            if one["round"] == now["round"] and one["site"] in waits and one["total"] > 0
        }
        started = {"round": int(now["round"]), "asked": asked, "arrived": arrived, "waits": waits, "steps": steps}
        return {**started, "since": float(now["since"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _size(path: Path) -> int:
    total, folders = 0, [path]
    while folders:
        try:
            entries = list(os.scandir(folders.pop()))
        except OSError:
            continue
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                folders.append(Path(entry.path))
            elif entry.is_file(follow_symlinks=False):
                total += entry.stat(follow_symlinks=False).st_size
    return total


def _is_loss(metric: str) -> bool:
    """Return whether smaller values of a metric are better."""
    losses = ("loss", "error", "brier", "ibs", "ece", "mae", "mse", "hd95", "distance", "asd")
    return any(word in metric for word in losses)
