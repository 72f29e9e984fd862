"""Supervisor of a server: starts FLARE, submits jobs, detects dead processes and resumes runs from checkpoints.

FLARE's status of a job is not sufficient: after a crash it remains ``RUNNING``. The run's status file and its process
number decide. Every attempt resumes from the last checkpoint; a site that was away joins the next attempt.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polyclinic.core.atomic import write_private
from polyclinic.engines.flare import flare_processes, service_manager
from polyclinic.engines.flare.protocol import flare_job as jobs
from polyclinic.engines.flare.protocol.paths import ServerFolder, read_toml
from polyclinic.engines.flare.protocol.shared_journals import SharedJournal
from polyclinic.engines.flare.server import study_runs
from polyclinic.engines.flare.server.admin_api import AdminConnection, NoAnswer
from polyclinic.engines.flare.server.job_queue import (
    ACTIVE,
    CANCELLED,
    FAILED,
    FINISHED,
    INTERRUPTED,
    OVER,
    WAITING,
    Entry,
    Queue,
)
from polyclinic.engines.notifications import Notifier

TRIES = 20
SILENCE = 180.0
REINSTATE_EVERY = 120.0
NOTIFY_EVERY = 10.0
NEWS_SECONDS = 20 * 3600.0
"""Seconds for which people are notified of a failure."""


@dataclass
class Supervisor:
    """Supervisor of one server. ``tick`` is called repeatedly; its persistent state is on disk."""

    home: ServerFolder
    stop: bool = False
    _sites: dict[str, float] = field(default_factory=dict)
    _asked: float = 0.0
    _reinstated: dict[str, float] = field(default_factory=dict)
    _problem: str = ""
    _notified: float = 0.0

    def __post_init__(self) -> None:
        self.settings = read_toml(self.home.settings, "polyclinic server init")
        self.queue = Queue(self.home)
        self.notifier = Notifier(self.home.path)
        self.journal = SharedJournal(self.home.path / "journal.jsonl")
        self.console = AdminConnection(self.home.admin, self.home.path / "console.log")
        self._server = flare_processes.KeptProcess(self._start_server, self._server_ended)

    def run(self, pause: float = 1.0) -> None:
        """Supervise until ``stop`` is set, and then end everything that was started."""
        self.journal.write("server started", {"pid": os.getpid()})
        try:
            while not self.stop:
                try:
                    self.tick()
                except OSError as error:  # such as a full disk: the write is retried
                    with suppress(OSError):  # the log is on the same disk
                        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
                service_manager.tell(service_manager.READY, service_manager.ALIVE)
                time.sleep(pause)
        finally:
            service_manager.tell(service_manager.STOPPING)
            self.console.close()
            flare_processes.end(self.home.kit)
            self.journal.write("server stopped", {})
            self._write_status("stopped")
            self.journal.close()

    def tick(self) -> None:
        """Check all processes and runs once."""
        self._server.look()
        self._look_for_sites()
        study_runs.advance(self.home)
        entries = self.queue.all()
        if time.time() - self._notified > NOTIFY_EVERY:
            self._notified = time.time()
            self._notify(entries)
        for run, entry in entries.items():
            if entry.state in OVER:
                continue
            try:
                self._look_after(run, entry)
            except NoAnswer as error:
                self.journal.write("no answer from the server", {"run": run, "why": str(error)})
        self._write_status("up" if self._sites or time.time() - self._asked < 10 else "starting")

    def _notify(self, entries: Mapping[str, Entry]) -> None:
        """Notify people of runs that failed and of studies that stopped."""
        project, news = self.settings["project"], time.time() - NEWS_SECONDS
        conditions = {
            f"failed {run}": f"{project}: the run {run} failed: {entry.why}. polyclinic server status shows more."
            for run, entry in entries.items()
            if entry.state == FAILED and entry.since > news
        }
        for title, study in study_runs.all_of(self.home).items():
            changed = (self.home.path / "studies" / title / "study.json").stat().st_mtime
            if study["state"] == study_runs.STOPPED and changed > news:
                conditions[f"stopped {title}"] = f"{project}: the study {title} stopped: {study['why']}"
        self.notifier.look(conditions)
        if self.notifier.problem not in ("", self._problem):
            print(self.notifier.problem, file=sys.stderr, flush=True)
        self._problem = self.notifier.problem

    def _start_server(self) -> subprocess.Popen[bytes]:
        flare_processes.end(self.home.kit)
        self.console.close()
        self._asked = 0.0
        log, organization = self.home.path / "server.log", self.settings["organization"]
        return flare_processes.start("server", self.home.kit, log, org=organization)

    def _server_ended(self, code: int, crashes: int) -> None:
        self.journal.write("FLARE's server process ended", {"code": code, "crashes": crashes})

    def _look_for_sites(self) -> None:
        if time.time() - self._asked < (5.0 if self._sites else 1.0):
            return
        try:
            self._sites = self.console.sites()
            self._asked = time.time()
        except NoAnswer:
            self._sites = {}

    def _look_after(self, run: str, entry: Entry) -> None:
        progress = self.queue.progress(run)
        phase = progress.get("phase", "")
        if phase == FINISHED:
            self._over(run, FINISHED, progress.get("why", ""))
        elif self.queue.cancelled(run):
            self._end_job(entry, progress)
            self._over(run, CANCELLED, "cancelled by a person")
        elif phase == FAILED and entry.state == ACTIVE and progress["beat"] >= entry.since:
            self._over(run, FAILED, progress["why"])
        elif entry.state == WAITING:
            self._maybe_submit(run, entry)
        else:
            self._watch(run, entry, progress)

    def _maybe_submit(self, run: str, entry: Entry) -> None:
        order, now = entry.what, time.time()
        active = sum(other.state == ACTIVE for other in self.queue.all().values())
        if now < entry.not_before or active >= self.settings["runs_at_once"]:
            return
        wanted = set(order.everyone)
        connected = wanted & self._sites.keys()
        enough = len(connected) >= max(order.min_replies, 1) and now - entry.since > self.settings["wait_for_all"]
        if not (connected == wanted or enough):
            why = f"waits for {', '.join(sorted(wanted - connected))}"
            if why != entry.why:
                self.queue.change(run, why=why)
            return
        (self.home.run(run) / "pause").unlink(missing_ok=True)  # the sites that the pause was for are in this attempt
        folder = jobs.write(self.home.path / "jobs" / run, order, dead_after=self.settings["dead_after"])
        number = self.console.submit(folder)
        self.queue.change(
            run, state=ACTIVE, why="", job=number, attempt=entry.attempt + 1, members=tuple(sorted(connected))
        )
        self.journal.write("submitted", {"run": run, "job": number, "attempt": entry.attempt + 1, "order": order.hash})

    def _watch(self, run: str, entry: Entry, progress: dict[str, Any]) -> None:
        """Check that an active run is still progressing and that no returned site is missing from it."""
        fresh = progress.get("beat", 0.0) >= entry.since
        if fresh and progress["phase"] == INTERRUPTED:
            self._again(run, entry, progress, progress["why"] or "interrupted")
        elif fresh and not flare_processes.alive(progress["pid"], progress.get("birth", "")):
            self._again(run, entry, progress, "its process at the server died")
        elif (status := self.console.status(entry.job)).startswith("FINISHED") and progress.get("phase") != FINISHED:
            if time.time() - entry.since > 10:
                self._again(run, entry, progress, f"FLARE ended it: {status}")
        elif not fresh and time.time() - entry.since > SILENCE:
            self._again(run, entry, progress, f"it did not begin within {SILENCE:g} s ({status})")
        else:
            members, away = set(entry.members), progress.get("away", {})
            # FLARE lists a site for a while after it is gone; one that came back has a later contact.
            back = {
                site
                for site in entry.what.everyone
                if site in self._sites and (site not in members or (site in away and self._sites[site] > away[site]))
            }
            if (
                back
                and fresh
                and progress["phase"] == "running"
                and time.time() - self._reinstated.get(run, 0.0) > REINSTATE_EVERY
            ):
                self._reinstated[run] = time.time()
                (self.home.run(run) / "pause").write_text(f"to reinstate {', '.join(sorted(back))}")
                self.journal.write("pause asked for", {"run": run, "sites": sorted(back)})

    def _again(self, run: str, entry: Entry, progress: dict[str, Any], why: str) -> None:
        """End this attempt and queue the run again, unless too many attempts have made no progress."""
        self._end_job(entry, progress)
        done = progress.get("round", 0)
        fruitless = 0 if done > entry.round or why.startswith("to reinstate") else entry.fruitless + 1
        if fruitless > TRIES:
            self._over(run, FAILED, f"{fruitless} attempts made no progress; the last ended because: {why}")
            return
        wait = 0.0 if not fruitless else min(300.0, 2.0**fruitless)
        self.queue.change(run, state=WAITING, why=why, not_before=time.time() + wait, round=done, fruitless=fruitless)
        self.journal.write("attempt ended", {"run": run, "job": entry.job, "why": why, "round": done})

    def _end_job(self, entry: Entry, progress: dict[str, Any]) -> None:
        """End FLARE's job, and the run's process if it outlives the job."""
        if entry.job:
            with suppress(NoAnswer):  # it is over, or the server is down
                self.console.abort(entry.job)
        pid, born = progress.get("pid", 0), progress.get("birth", "")
        until = time.monotonic() + 10
        while pid and flare_processes.alive(pid, born) and time.monotonic() < until:
            time.sleep(0.2)
        if pid and born and flare_processes.alive(pid, born):
            os.kill(pid, signal.SIGKILL)

    def _over(self, run: str, state: str, why: str) -> None:
        self.queue.change(run, state=state, why=why)
        self.journal.write(f"run {state}", {"run": run, "why": why})

    def _write_status(self, state: str) -> None:
        status = {
            "state": state,
            "pid": os.getpid(),
            "birth": flare_processes.birth(os.getpid()),
            "beat": time.time(),
            "sites": self._sites,
        }
        write_private(self.home.path / "status.json", json.dumps(status), durable=False)


def main(path: str) -> None:
    """Supervise the server in the folder at ``path`` until SIGTERM or Ctrl-C."""
    supervisor = Supervisor(ServerFolder(Path(path)))

    def stop(*_: object) -> None:
        supervisor.stop = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    supervisor.run()


if __name__ == "__main__":
    main(sys.argv[1])
