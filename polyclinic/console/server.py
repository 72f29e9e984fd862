"""A coordinator's page: sites, queue, progress, awaited sites, faults, privacy spent, export and report."""

import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from polyclinic.console.children import Children
from polyclinic.console.page import Events, Refused, Sample, text_of
from polyclinic.console.server_runs import ServerRuns
from polyclinic.console.tail import JournalTail, open_regular
from polyclinic.core import atomic
from polyclinic.core.audit_log import Broken, verify
from polyclinic.engines.flare.client.decisions import this_person
from polyclinic.engines.flare.pki import certificate_authority as authorities
from polyclinic.engines.flare.protocol.messages import printable
from polyclinic.engines.flare.protocol.paths import ServerFolder, SetupError, private_folder, read_small
from polyclinic.engines.flare.protocol.shared_journals import SharedJournal
from polyclinic.engines.flare.server import server_setup, study_runs
from polyclinic.engines.flare.server.job_queue import ACTIVE, FINISHED, OVER, WAITING
from polyclinic.engines.flare.server.server_status import state_of

BUDGET = 0.1
"""Seconds that one look spends on records that are behind, and half of it on the journal."""
LAST_ENTRIES = 60
READS = frozenset({"file", "verify"})
MAX_DAYS = 3650
REQUEST_BYTES = 50_000


class ServerPage:
    """The page of one server."""

    kind, title = "server", "Coordinator"

    def __init__(self, home: Path, studies: Path | None = None) -> None:
        """Show the server in the folder ``home``; study files in ``studies`` (by default there) can be queued.

        Raises:
            SetupError: If it is not a server's folder.
        """
        self.home, self.lock, self.version = ServerFolder(home.resolve()), threading.RLock(), 0
        self.settings = server_setup.settings(self.home)
        self.studies = (studies or self.home.path).resolve()
        self.children = Children()
        self.runs = ServerRuns(self.home)
        self.journal = JournalTail(self.home.path / "journal.jsonl")
        self._entries: list[dict[str, Any]] = []
        self._stamp: Any = None
        self._state, self._well = "", False
        self._sites: dict[str, dict[str, Any]] = {}
        self._heard: dict[str, float] = {}
        self._studies: dict[str, dict[str, Any]] = {}
        self._studies_stamp: Any = None

    @property
    def pace(self) -> float:
        """Seconds between two readings: one while records are behind."""
        return 1.0 if self.runs.reading or self.journal.behind else 2.0

    # Reading ----------------------------------------------------------------------------------------------------------

    def look(self) -> bool:
        """Read what is new."""
        changed = self.runs.look(BUDGET)
        entries, anew = self.journal.more(BUDGET / 2)
        self._entries = [*([] if anew else self._entries), *entries][-LAST_ENTRIES:]
        self._state, self._well = state_of(self.home)
        heard = server_setup.status(self.home).get("sites", {}) if self._well else {}
        self._heard = {str(site): float(at) for site, at in heard.items()}
        self._sites = server_setup.sites(self.home)
        files = sorted((self.home.path / "studies").glob("*/study.json"))
        studies_stamp = [(str(path), path.stat().st_mtime_ns) for path in files]
        if studies_stamp != self._studies_stamp:
            self._studies_stamp, self._studies = studies_stamp, study_runs.all_of(self.home)
        self.children.look()
        stamp = (
            self.journal.count,
            self.journal.broken,
            self._state,
            sorted(self._heard),
            int(time.time() / 15),  # ages such as "30 s ago"
            self._sites,
            self._studies_stamp,
            [(child["number"], child["code"], child["output"]) for child in self.children.facts()],
            self._exports(),
        )
        changed = changed or anew or bool(entries) or stamp != self._stamp
        self._stamp = stamp
        self.version += changed
        return changed

    def _exports(self) -> list[dict[str, Any]]:
        """Return the exported run folders, the latest first."""
        folder = self.home.path / "exports"
        found = []
        for path in sorted(folder.glob("*")) if folder.is_dir() else []:
            if path.is_dir() and not path.is_symlink():
                page = path / "report" / "report.html"
                report = page.is_file() and not page.is_symlink() and not page.parent.is_symlink()
                found.append({"name": path.name, "report": report, "run": (path / "run.json").is_file()})
        return found[::-1]

    # What is shown ----------------------------------------------------------------------------------------------------

    def watch(self, query: Mapping[str, str]) -> "_ServerWatcher":
        """Return a watcher of the page and, if the query names one, of the scores of a run."""
        if self._stamp is None:
            self.look()
        return _ServerWatcher(self, query.get("run", ""))

    def state(self) -> dict[str, Any]:
        """Return everything that the page shows, except the scores of single rounds."""
        runs = list(self.runs.facts())
        return {
            "project": self.settings["project"],
            "host": self.settings["host"],
            "port": self.settings["port"],
            "organization": self.settings["organization"],
            "home": str(self.home.path),
            "account": this_person().account,
            "now": time.time(),
            "state": self._state,
            "well": self._well,
            "authority": self._authority(),
            "own_days": self._own_days(),
            "sites": self._site_rows(),
            "runs": runs[:300],
            "hidden": max(0, len(runs) - 300),
            "unreadable": self.runs.unreadable,
            "reading": self.runs.reading,
            "studies": self._study_rows(),
            "faults": self.runs.faults(),
            "journal": self._journal(),
            "children": self.children.facts(),
            "files": [path.name for path in self._study_files()],
            "folder": str(self.studies),
            "exports": self._exports(),
        }

    def _authority(self) -> str:
        with suppress(SetupError, OSError, ValueError):
            return authorities.fingerprint(authorities.load_certificate(read_small(self.home.authority / "ca.crt")))
        return "its certificate cannot be read"

    def _own_days(self) -> float | None:
        """Return the days until the server's certificate ends; None if it cannot be read."""
        with suppress(SetupError, OSError, ValueError):
            own = authorities.load_certificate(read_small(self.home.kit / "startup" / "server.crt"))
            return (own.not_valid_after_utc.timestamp() - time.time()) / 86400
        return None

    def _site_rows(self) -> list[dict[str, Any]]:
        totals = self.runs.totals()
        none: dict[str, Any] = {"sent": 0, "received": 0, "epsilon": None, "waits": [], "faults": 0}
        rows = []
        for name, entry in self._sites.items():
            state = "revoked" if entry["revoked"] else "connected" if name in self._heard else "away"
            days = (datetime.fromisoformat(entry["expires"]).timestamp() - time.time()) / 86400
            facts = {"name": name, "state": state, "heard": self._heard.get(name, 0.0), "days": days}
            known = {"organization": str(entry["organization"]), "version": str(entry["polyclinic"])}
            rows.append({**facts, **known, "revoked": entry["revoked"], **totals.get(name, none)})
        return rows

    def _study_rows(self) -> list[dict[str, Any]]:
        rows = []
        for title, study in self._studies.items():
            known = [self.runs.all[run] for run in study["runs"] if run in self.runs.all]
            over, finished = sum(run.over for run in known), sum(run.entry.state == FINISHED for run in known)
            rows.append(
                {
                    "name": title,
                    "state": study["state"],
                    "why": printable(str(study["why"]), 500),
                    "runs": len(study["runs"]),
                    "over": over,
                    "finished": finished,
                    "busy": self.children.running("export", title),
                }
            )
        return rows[::-1]

    def _journal(self) -> dict[str, Any]:
        hidden = ("previous", "hash", "signers")
        shown = [{k: v for k, v in entry.items() if k not in hidden} for entry in reversed(self._entries)]
        journal = self.journal
        facts = {"count": journal.count, "head": journal.head, "broken": journal.broken, "behind": journal.behind}
        return {**facts, "last": shown}

    def _study_files(self) -> list[Path]:
        found = []
        for path in sorted(self.studies.glob("*.toml")):
            with suppress(OSError), open_regular(path) as file:
                if path.name != "server.toml" and b"[[methods]]" in file.read(2**18):
                    found.append(path)
        return found[:100]

    # Acting -----------------------------------------------------------------------------------------------------------

    def reads(self) -> frozenset[str]:
        """Return the actions that change nothing."""
        return READS

    def act(self, name: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Carry out an action of the page. What cannot be undone is confirmed by typing a name."""
        home = ["--home", str(self.home.path)]
        match name:
            case "start":
                self._start("start", ["server", "start", "--background", *home])
                return {"say": "The server is starting."}
            case "stop":
                self._confirm(body, str(self.settings["project"]))
                self._start("stop", ["server", "stop", *home])
                return {"say": "The server is stopping. Runs continue from their checkpoints when it starts again."}
            case "rehearse":
                self._start("rehearse", ["server", "rehearse", "--no-wait", *home])
                return {"say": "A rehearsal on synthetic data is being queued."}
            case "request":
                return self._read_request(body)
            case "admit":
                return self._admit(body)
            case "revoke" | "reinstate":
                site = text_of(body, "site", 63)
                if site not in self._sites:
                    raise Refused(f"no site {site!r} is admitted", 404)
                self._confirm(body, site)
                self._start(name, ["server", name, site, *home], site)
                return {"say": f"{site} is being {'revoked' if name == 'revoke' else 'reinstated'}."}
            case "queue":
                return self._queue(text_of(body, "study", 300), home)
            case "cancel":
                return self._cancel(body, home)
            case "export":
                return self._export(text_of(body, "study", 63), home)
            case "report":
                path = self._exported(body)
                self._start("report", ["report", str(path)], path.name)
                return {"say": "The report is being written."}
            case "file":
                path = self._exported(body)
                if not next(one["report"] for one in self._exports() if one["name"] == path.name):
                    raise Refused("this export has no report", 404)
                return {"file": str(path / "report" / "report.html")}
            case "verify":
                return self._verify()
        raise Refused("this page cannot do that", 404)

    @staticmethod
    def _confirm(body: Mapping[str, Any], name: str) -> None:
        if text_of(body, "confirm", 100).strip() != name:
            raise Refused(f"to confirm, type the name: {name}")

    def _start(self, what: str, words: list[str], about: str = "") -> None:
        """Start a command, unless the same one runs, and record who asked for it."""
        if self.children.running(what, about):
            raise Refused("this is being done already")
        self._note(what, about)
        self.children.start(what, words, about=about)

    def _note(self, what: str, about: str) -> None:
        journal = SharedJournal(self.journal.path)
        journal.write("console", {"action": what, "about": about, "account": this_person().account})
        journal.close()

    def _read_request(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Check a site's request, and return what the coordinator compares before admitting the site."""
        table = self._request_of(body)
        authorities.check_request(table)
        before = self._sites.get(table["site"])
        known = "" if before is None else "revoked" if before["revoked"] else "admitted"
        return {
            "site": str(table["site"]),
            "organization": str(table["organization"]),
            "version": printable(str(table["polyclinic"]), 40),
            "known": known,
            "other": before is not None and before["organization"] != table["organization"],
        }

    @staticmethod
    def _request_of(body: Mapping[str, Any]) -> Any:
        try:
            return json.loads(text_of(body, "text", REQUEST_BYTES))
        except (ValueError, RecursionError) as error:
            if isinstance(error, Refused):
                raise
            raise Refused("this file is not a site's request") from None

    def _admit(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Admit the site of a request, and return its join file."""
        shown, days = self._read_request(body), body.get("days", authorities.DAYS)
        self._confirm(body, shown["site"])
        if isinstance(days, bool) or not isinstance(days, int | float) or not 0 < days <= MAX_DAYS:
            raise Refused(f"a certificate is valid for 1 to {MAX_DAYS} days")
        file = private_folder(self.home.path / "requests") / f"{shown['site']}.request"
        atomic.write_private(file, text_of(body, "text", REQUEST_BYTES))
        site, join = server_setup.admit(self.home, file, float(days))
        self._note("admit", site)
        path = private_folder(self.home.path / "joins") / f"{site}.join"
        atomic.write_json(path, join, private=True)
        say = f"Admitted {site} until {join['expires'][:10]}. Give the join file to the site."
        return {"say": say, "file": str(path)}

    def _queue(self, study: str, home: list[str]) -> dict[str, Any]:
        path = next((path for path in self._study_files() if path.name == study), None)
        if path is None:
            raise Refused(f"there is no study file {study!r} in {self.studies}", 404)
        self._start("queue", ["server", "run", str(path), *home], study)
        return {"say": f"{study} is being checked and queued for all admitted sites."}

    def _cancel(self, body: Mapping[str, Any], home: list[str]) -> dict[str, Any]:
        run = text_of(body, "run", 63)
        if run not in self.runs.all or self.runs.all[run].over:
            raise Refused(f"no run {run!r} waits or is active", 404)
        self._confirm(body, run)
        self._start("cancel", ["server", "cancel", run, *home], run)
        return {"say": f"{run} is being canceled. Its last checkpoint is kept."}

    def _export(self, study: str, home: list[str]) -> dict[str, Any]:
        if study not in self._studies:
            raise Refused(f"there is no study {study!r}", 404)
        out = private_folder(self.home.path / "exports") / f"{study}-{time.strftime('%Y%m%d-%H%M%S')}"
        self._start("export", ["server", "export", study, str(out), *home], study)
        return {"say": f"{study} is being exported to exports/{out.name}."}

    def _exported(self, body: Mapping[str, Any]) -> Path:
        name = text_of(body, "export", 100)
        if name not in [one["name"] for one in self._exports()]:
            raise Refused("there is no such export", 404)
        return self.home.path / "exports" / name

    def _verify(self) -> dict[str, Any]:
        count, first, head = 0, "", ""
        try:
            for entry in verify(self.journal.path):
                count, first, head = count + 1, first or str(entry.get("time", "")), entry["hash"]
        except (Broken, OSError) as error:
            return {"good": False, "problem": str(error)}
        return {"good": True, "count": count, "first": first, "head": head}

    def opened(self, role: str) -> None:
        """Record in the server's journal that a browser has opened the console."""
        journal = SharedJournal(self.journal.path)
        journal.write("console opened", {"role": role, "account": this_person().account})
        journal.close()

    # Measuring --------------------------------------------------------------------------------------------------------

    def metrics(self) -> Iterator[Sample]:
        """Yield the measurements."""
        yield Sample("server_running", self._well, help="Whether the server runs and responds.")
        states = [row["state"] for row in self._site_rows()]
        for state in ("connected", "away", "revoked"):
            yield Sample("sites", states.count(state), (("state", state),), "Admitted sites by state.")
        runs = [run.entry.state for run in self.runs.all.values()]
        for state in (WAITING, ACTIVE, *OVER):
            yield Sample("runs", runs.count(state), (("state", state),), "Runs by state.")
        waiting = {site for run in self.runs.all.values() for site in run.waiting()}
        yield Sample("sites_waited_for", len(waiting), help="Sites for which an active run waits.")
        faults = sum(run.count_of_faults for run in self.runs.all.values())
        yield Sample("faults", faults, help="Replies that were lost or refused, in all runs.")
        days = [row["days"] for row in self._site_rows() if row["state"] != "revoked"]
        yield Sample(
            "certificate_days", round(self._own_days() or 0.0, 2), help="Days until the server's certificate ends."
        )
        yield Sample("site_certificate_days", round(min(days, default=0.0), 2), help="Of the site whose ends first.")
        yield Sample("journal_intact", not self.journal.broken, help="Whether the journal's hash chain is complete.")

    def close(self) -> None:
        """End what the page has open. The server continues."""
        self.children.close()


class _ServerWatcher:
    """Watcher of a server's page and of the scores of at most one run."""

    def __init__(self, page: ServerPage, run: str) -> None:
        self.page, self.run = page, run
        self._seen, self._rows = -1, -1

    def updates(self) -> Events:
        """Return the state if it has changed, and the scores of the run if they have."""
        events = Events()
        if self._seen != self.page.version:
            self._seen = self.page.version
            events.append(("state", self.page.state()))
        run = self.page.runs.all.get(self.run)
        if run is not None and (count := sum(len(sites) for _, sites in run.rows)) != self._rows:
            self._rows = count
            events.append(("scores", {"run": self.run, "metric": run.metric, "rows": run.rows}))
        return events
