"""A hospital's page: the connection, what runs, what left, what waits for a decision, policy, journal and budget.

It reads the site's folder and never its data. Decisions are the same signed acts as on the command line.
"""

import threading
import time
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from polyclinic.console.children import Child, Children
from polyclinic.console.page import Changed, Refused, Sample, WholeState, text_of
from polyclinic.console.tail import JournalTail
from polyclinic.core.audit_log import Broken, verify
from polyclinic.engines.flare import flare_processes
from polyclinic.engines.flare.client import agent_status, diagnosis, site_setup
from polyclinic.engines.flare.client.decisions import Review, shown_hash, this_person
from polyclinic.engines.flare.client.reviews import APPROVED, REFUSED, WAITING, NotShown, Reviews, record_decision
from polyclinic.engines.flare.client.study_description import Here, before, describe, methods_of
from polyclinic.engines.flare.pki import certificate_authority as authorities
from polyclinic.engines.flare.protocol.messages import printable
from polyclinic.engines.flare.protocol.paths import SetupError, SiteFolder, read_json, read_small
from polyclinic.engines.flare.protocol.run_request import code_hash
from polyclinic.engines.flare.protocol.shared_journals import SharedJournal

PORT_SECONDS, HANDSHAKE_SECONDS = 5.0, 60.0
"""Seconds between two checks of the server's port, and of its certificate. A dead server is shown within 15 s."""
BUDGET = 0.1
"""Seconds that one look spends on the part of the journal that is behind."""
LAST_ENTRIES, LAST_REPLIES = 60, 60
CHECK, LEDGERS, POLICY, COUNT = "checks", "privacy ledgers", "policy check", "patients"
ENDED = ("run ended", "memory deleted", "memory of an ended run removed", "memory of a silent run removed")
"""Events of the journal after which a run is not running here."""
READS = frozenset({"review", "count", "verify", "check"})


class SitePage:
    """The page of one site."""

    kind, title = "site", "Hospital"

    def __init__(self, home: Path) -> None:
        """Show the site in the folder ``home``.

        Raises:
            SetupError: If it is not a site's folder.
        """
        self.home, self.lock, self.version = SiteFolder(home.resolve()), threading.RLock(), 0
        self.settings = site_setup.settings(self.home)
        self.children = Children()
        self.journal = JournalTail(self.home.journal)
        self._entries: list[dict[str, Any]] = []
        self._left = _Left()
        self._last: dict[str, dict[str, Any]] = {}
        self._reviews: dict[str, tuple[tuple[int, int], Review]] = {}
        self._unreadable: dict[str, str] = {}
        self._probed = self._shaken = 0.0
        self._reachable: list[diagnosis.Finding] = []
        self._handshake: list[diagnosis.Finding] = []
        self._results: dict[str, dict[str, Any]] = {}
        self._stamp: Any = None
        self._now: dict[str, Any] = {}
        self._hashing: threading.Thread | None = None

    @property
    def pace(self) -> float:
        """Seconds between two readings: one while the journal is behind."""
        return 1.0 if self.journal.behind else 2.0

    # Reading ----------------------------------------------------------------------------------------------------------

    def look(self) -> bool:
        """Read what is new."""
        if self._stamp is not None:
            self._hash_code()  # after the first page, which it would delay
        self.settings = site_setup.settings(self.home)
        entries, anew = self.journal.more(BUDGET)
        if anew:
            self._entries, self._left, self._last = [], _Left(), {}
        for entry in entries:
            self._left.add(entry)
            if "run" in entry:
                self._last[str(entry["run"])] = entry
        self._entries = (self._entries + entries)[-LAST_ENTRIES:]
        self._read_reviews()
        self._probe()
        for child in self.children.look():
            self._take(child)
        up = site_setup.is_up(self.home)
        doing, problems = agent_status.runs(self.home)
        self._now = {
            "up": up,
            "server": agent_status.server(self.home, up) if "project" in self.settings else {"state": "not joined"},
            "doing": doing,
            "problems": [*problems, *({"run": "", "problem": p} for p in agent_status.keeper_problems(self.home, up))],
            "processes": len(flare_processes.working_in(self.home.kit)) if not up else 0,
        }
        heard = int(self._now["server"].get("heard", 0.0) / 10)  # the page shows it to ten seconds
        stamp = (
            self.journal.count,
            self.journal.broken,
            sorted((name, stamp) for name, (stamp, _) in self._reviews.items()),
            sorted(self._unreadable),
            self._reachable,
            self._handshake,
            {**self._now, "server": {**self._now["server"], "heard": heard}},
            _modified(self.home.policy),
            self.settings,
            len(self._results),
            [(child["number"], child["code"]) for child in self.children.facts()],
        )
        changed = bool(stamp != self._stamp)
        self._stamp = stamp
        self.version += changed
        return changed

    def _hash_code(self) -> threading.Thread:
        """Begin to compute the hash of the code, two seconds of computing in a thread, unless that was done."""
        if self._hashing is None:
            self._hashing = threading.Thread(target=code_hash, daemon=True)
            self._hashing.start()
        return self._hashing

    def _read_reviews(self) -> None:
        """Read the reviews whose files have changed. Checking a signature takes too long to do it every second."""
        reviews, found = Reviews(self.home.reviews), set()
        for path in self.home.reviews.glob("*.json"):
            found.add(path.stem)
            try:
                status = path.stat()
                stamp = status.st_mtime_ns, status.st_size
                known = path.stem in self._reviews and self._reviews[path.stem][0] == stamp
                if not known and (review := reviews.get(path.stem)) is not None:
                    self._reviews[path.stem] = stamp, review
                self._unreadable.pop(path.stem, None)
            except (SetupError, OSError) as error:
                self._reviews.pop(path.stem, None)
                self._unreadable[path.stem] = str(error)
        for gone in self._reviews.keys() - found:
            del self._reviews[gone]
        for gone in self._unreadable.keys() - found:
            del self._unreadable[gone]

    def _probe(self) -> None:
        """Check whether the server can be reached, with its own port and certificate and not by what a file says."""
        now = time.monotonic()
        if "project" not in self.settings or (self._probed and now - self._probed < PORT_SECONDS):
            return
        self._probed = now
        shake = not self._shaken or now - self._shaken > HANDSHAKE_SECONDS or not self._up(self._handshake)
        found = diagnosis.probe(self.home, shake)
        self._reachable = found[:1]
        if shake:
            self._handshake, self._shaken = found[1:], now

    @staticmethod
    def _up(found: Iterable[diagnosis.Finding]) -> bool:
        results = [good for _, good, _ in found]
        return bool(results) and all(results)

    def _take(self, child: Child) -> None:
        """Keep the result of a command that has ended."""
        result = child.result
        self._results[f"{child.what} {child.about}".strip()] = {
            "time": child.ended,
            "result": result,
            "error": "" if result is not None else child.output or f"the command ended with the code {child.code}",
        }

    # What is shown ----------------------------------------------------------------------------------------------------

    def watch(self, query: Mapping[str, str]) -> WholeState:
        """Return a watcher of the whole page."""
        if self._stamp is None:
            self.look()
        return WholeState(self)

    def state(self) -> dict[str, Any]:
        """Return everything that the page shows."""
        reviews = sorted((review for _, review in self._reviews.values()), key=lambda r: r.decided or r.seen)
        waiting = [review for review in reviews if review.state == WAITING]
        account = this_person()
        return {
            "site": self.settings["site"],
            "organization": self.settings.get("organization", ""),
            "home": str(self.home.path),
            "account": account.account,
            "now": time.time(),
            "connection": self._connection(),
            "doing": [{**one, "job": printable(str(one.get("job", "")), 80)} for one in self._now["doing"]],
            "problems": [*self._now["problems"], *({"run": r, "problem": p} for r, p in self._unreadable.items())],
            "running": list(self._running(reviews)),
            "waiting": _grouped(waiting),
            "decided": [_short(review) for review in reversed(reviews) if review.state != WAITING][:100],
            "left": self._left.facts(self._limit()),
            "policy": self._policy(),
            "privacy": self._privacy(),
            "journal": self._journal(),
            "results": {name: self._results[name] for name in (CHECK, LEDGERS, POLICY) if name in self._results},
            "busy": [name for name in (CHECK, LEDGERS, POLICY) if self.children.running(name)],
        }

    def _connection(self) -> dict[str, Any]:
        given, server = self.settings, self._now["server"]
        if "project" not in given:
            return {"state": "not joined"}
        try:
            root = authorities.load_certificate(read_small(self.home.kit / "startup" / "rootCA.pem"))
            mine = authorities.load_certificate(read_small(self.home.kit / "startup" / "client.crt"))
            days, print_ = (mine.not_valid_after_utc.timestamp() - time.time()) / 86400, authorities.fingerprint(root)
        except (SetupError, OSError, ValueError):
            days, print_ = 0.0, "its certificates cannot be read"
        dead = bool(self._reachable) and not self._up(self._reachable)
        wrong = bool(self._handshake) and not self._up(self._handshake)
        state = server["state"]
        if dead or wrong:
            state = "no server" if dead else "wrong server"
        elif not self._now["up"]:
            state = "not running"
        return {
            "state": state,
            "project": given["project"],
            "host": given["host"],
            "port": given["port"],
            "proxy": given.get("proxy", ""),
            "heard": server.get("heard", 0.0),
            "refused": printable(str(server.get("refused", "")), 500),
            "days": days,
            "authority": print_,
            "checks": [*self._reachable, *self._handshake],
            "processes": self._now["processes"],
            "data": given.get("data", ""),
        }

    def _running(self, reviews: Iterable[Review]) -> Iterator[dict[str, Any]]:
        """Yield the approved runs that have begun and not ended."""
        for review in reviews:
            run, entry = review.what.run, self._last.get(review.what.run)
            if review.state != APPROVED or entry is None or entry.get("event") in ENDED:
                continue
            links = read_json(self.home.path / "memory" / run / "chain.json", default={"links": []}).get("links", [])
            number = int(links[-1]["round"]) + 1 if links else 0
            yield {
                **_short(review),
                "round": number,
                "event": str(entry.get("event", "")),
                "reason": str(entry.get("reason", "")),
                "time": str(entry.get("time", "")),
            }

    def _limit(self) -> float:
        try:
            limits = tomllib.loads(read_small(self.home.policy)).get("limits", {})
            return float(limits.get("megabytes_per_round", 2000.0)) * 1e6
        except (OSError, ValueError, TypeError, AttributeError):
            return 0.0

    def _policy(self) -> dict[str, Any]:
        try:
            text = read_small(self.home.policy)
            table, error = tomllib.loads(text), ""
        except (OSError, ValueError) as problem:
            text, table, error = "", {}, str(problem)
        return {"path": str(self.home.policy), "text": text, "table": _jsonable(table), "error": error}

    def _privacy(self) -> list[dict[str, Any]]:
        """Return each privacy ledger, after checking its chain. ε needs PyTorch: see ``ledgers``."""
        found = list[dict[str, Any]]()
        for path in sorted(self.home.ledgers.glob("*.jsonl")) if self.home.ledgers.is_dir() else []:
            try:
                entries = list(verify(path))
            except (Broken, OSError) as error:
                found.append({"name": path.stem, "error": str(error)})
                continue
            budget: dict[str, Any] = next((e for e in entries if e["event"] == "budget"), {})
            raised = [e for e in entries if e["event"] == "raised"]
            found.append(
                {
                    "name": str(budget.get("data", path.stem)),
                    "budget": (raised or [budget])[-1].get("epsilon"),
                    "delta": budget.get("delta"),
                    "unit": budget.get("unit"),
                    "releases": sum(e["event"] == "spend" for e in entries),
                    "error": "",
                }
            )
        return found

    def _journal(self) -> dict[str, Any]:
        hidden = ("previous", "hash", "signature", "said", "packages")
        shown = [{k: v for k, v in entry.items() if k not in hidden} for entry in reversed(self._entries)]
        journal = self.journal
        facts = {"count": journal.count, "head": journal.head, "broken": journal.broken, "behind": journal.behind}
        return {**facts, "last": shown}

    # Acting -----------------------------------------------------------------------------------------------------------

    def reads(self) -> frozenset[str]:
        """Return the actions that change nothing."""
        return READS

    def act(self, name: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Carry out an action of the page."""
        match name:
            case "review":
                return self._review(text_of(body, "run", 64))
            case "decide":
                return self._decide(body)
            case "verify":
                return self._verify()
            case "check":
                return self._check(text_of(body, "what", 40))
            case "count":
                return self._count(text_of(body, "run", 64))
        raise Refused("this page cannot do that", 404)

    def _review(self, run: str) -> dict[str, Any]:
        """Describe what a person would decide about, with the hash that a decision must carry."""
        self._hash_code().join()
        reviews = Reviews(self.home.reviews)
        first, *others = reviews.subject(run)
        earlier = before(reviews, first)
        description = describe(first, earlier, others, self._here())
        return {
            **_short(first),
            "headline": description.headline,
            "sections": [
                {"title": s.title, "lines": [[depth, line.kind, line.text] for depth, line in s.lines]}
                for s in description.sections
            ],
            "shown": shown_hash([first, *others]),
            "runs": [review.what.run for review in (first, *others)],
            "problems": list(dict.fromkeys(p for review in (first, *others) for p in review.problems)),
            "stale": any(r.code != code_hash() or r.packages != r.what.packages for r in (first, *others)),
            "request": [review.order for review in (first, *others)],
            "first": earlier is None,
            "rehearsal": first.what.rehearsal,
        }

    def _here(self) -> Here:
        """Return what the policy hides in a survey. The patients are counted apart, by ``count``."""
        table = self._policy()["table"]
        limits, allow = table.get("limits", {}), table.get("allow", {})
        limits, allow = (one if isinstance(one, dict) else {} for one in (limits, allow))
        cell = limits.get("min_cell", 5)
        return Here(None, (), cell if isinstance(cell, int) else None, allow.get("class_names") is True, counted=False)

    def _decide(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Record a decision about exactly what was shown."""
        state, run = text_of(body, "state", 20), text_of(body, "run", 64)
        reason, by = text_of(body, "reason").strip(), text_of(body, "by", 100).strip()
        shown = text_of(body, "shown", 64)
        if state not in (APPROVED, REFUSED):
            raise Refused("a decision approves or refuses", 400)
        if state == APPROVED and body.get("read") is not True:
            raise Refused("confirm that you have read what would run and what would leave")
        if len(by) < 2:
            raise Refused("give your name: it is signed and recorded in the journal")
        if len(reason) < 3:
            raise Refused("give a reason, such as the number of the ethics vote: it is recorded in the journal")
        if len(shown) != 64:
            raise Refused("a decision carries the hash of what was shown", 400)
        try:
            decided = record_decision(self.home, run, state, reason, by, shown, place="console")
        except NotShown:
            raise Changed(
                "the study has changed since this page showed it. The new content is shown: read it"
            ) from None
        return {"state": state, "runs": [review.what.run for review in decided]}

    def _verify(self) -> dict[str, Any]:
        begun, count, head, first = time.perf_counter(), 0, "", ""
        try:
            for entry in verify(self.home.journal):
                first, head, count = first or str(entry.get("time", "")), entry["hash"], count + 1
        except (Broken, OSError) as error:
            return {"good": False, "problem": str(error)}
        return {"good": True, "count": count, "head": head, "first": first, "seconds": time.perf_counter() - begun}

    def _check(self, what: str) -> dict[str, Any]:
        home = ["--home", str(self.home.path), "--json"]
        commands = {
            CHECK: ["site", "diagnose", *home],
            POLICY: ["site", "policy", *home],
            LEDGERS: ["privacy", "ledger", str(self.home.path), "--json"],
        }
        if what not in commands:
            raise Refused("there is no such check", 404)
        if not self.children.running(what):
            self.children.start(what, commands[what])
        return {"started": what}

    def _count(self, run: str) -> dict[str, Any]:
        """Count the local patients of a study in a process of its own; return the result once it is there."""
        review = Reviews(self.home.reviews).subject(run)[0]
        key = f"{COUNT} {review.what.hash}"
        if (done := self._results.get(key)) is not None:
            return {"done": True, **done}
        if not self.children.running(COUNT, review.what.hash):
            words = [str(self.home.path), review.what.run]
            self.children.start(COUNT, words, about=review.what.hash, module="polyclinic.console.local_data")
        return {"done": False}

    def opened(self, role: str) -> None:
        """Record in the site's journal that a browser has opened the console."""
        journal = SharedJournal(self.home.journal)
        journal.write("console opened", {"role": role, "account": this_person().account})
        journal.close()

    # Measuring --------------------------------------------------------------------------------------------------------

    def metrics(self) -> Iterator[Sample]:
        """Yield the measurements."""
        connection, reviews = self._connection(), [review for _, review in self._reviews.values()]
        yield Sample("site_running", self._now["up"], help="Whether the site's supervisor runs.")
        reachable = self._up(self._reachable)
        yield Sample("server_reachable", reachable, help="Whether the server's port answers.")
        connected = connection["state"] == "connected"
        yield Sample("server_connected", connected, help="Whether the site is connected.")
        yield Sample("certificate_days", round(connection.get("days", 0.0), 2), help="Days until the certificate ends.")
        waiting = sum(review.state == WAITING for review in reviews)
        yield Sample("reviews_waiting", waiting, help="Runs that wait for a person's decision.")
        yield Sample("problems", len(self._now["problems"]), help="Problems that site status lists.")
        yield Sample("sent_bytes_total", self._left.total, help="Bytes of replies that have left.")
        yield Sample("journal_entries", self.journal.count, help="Entries of the journal.")
        yield Sample("journal_intact", not self.journal.broken, help="Whether its hash chain is complete.")

    def close(self) -> None:
        """End what the page has open."""
        self.children.close()


class _Left:
    """What has left this site, as its journal records it."""

    def __init__(self) -> None:
        self.total = 0
        self._by_job: dict[tuple[str, str], dict[str, Any]] = {}
        self._by_round: dict[tuple[str, int], int] = {}
        self._by_day: dict[str, int] = {}
        self._last: list[dict[str, Any]] = []

    def add(self, entry: Mapping[str, Any]) -> None:
        """Count an entry of the journal."""
        if entry.get("event") not in ("answered", "secure sum"):
            return
        run, size = str(entry.get("run", "")), int(entry.get("bytes") or 0)
        secure = entry["event"] == "secure sum"
        job = f"secure sum: {entry.get('stage', '')}" if secure else str(entry.get("job", ""))
        parts = {} if secure else dict(entry.get("parts") or {})
        row = self._by_job.setdefault(
            (run, job), {"run": run, "job": job, "times": 0, "bytes": 0, "parts": parts, "masked": entry.get("masked")}
        )
        row["times"], row["bytes"] = row["times"] + 1, row["bytes"] + size
        day, number = str(entry.get("time", ""))[:10], entry.get("round")
        self._by_day[day] = self._by_day.get(day, 0) + size
        if isinstance(number, int):
            self._by_round[run, number] = self._by_round.get((run, number), 0) + size
        shown = {"run": run, "round": None if number is None else number + 1, "job": job, "bytes": size}
        self._last = [*self._last[1 - LAST_REPLIES :], {**shown, "parts": parts, "time": str(entry.get("time", ""))}]
        self.total += size

    def facts(self, limit: float) -> dict[str, Any]:
        """Return what the page shows."""
        return {
            "total": self.total,
            "largest": max(self._by_round.values(), default=0),
            "limit": limit,
            "rows": list(self._by_job.values())[-200:],
            "last": self._last[::-1],
            "days": dict(sorted(self._by_day.items())[-30:]),
        }


def _short(review: Review) -> dict[str, Any]:
    """Return what lists show of a review."""
    an = review.what
    rounds = [an.plan.get("rounds", 0), *(arm["plan"].get("rounds", 0) for arm in an.arms)]
    return {
        "run": an.run,
        "study": str(an.study.get("name", "")),
        "methods": methods_of(an),
        "state": review.state,
        "seen": review.seen,
        "decided": review.decided,
        "by": printable(review.by, 100),
        "account": review.account,
        "reason": printable(review.reason, 2000),
        "of": review.of,
        "refused": bool(review.problems),
        "sites": list(an.everyone),
        "rounds": max(rounds),
        "mode": an.mode,
        "rehearsal": an.rehearsal,
        "data": printable(review.data, 500),
    }


def _grouped(waiting: Iterable[Review]) -> list[dict[str, Any]]:
    """Return one entry for each study that waits, with its runs: one decision covers them all."""
    groups: dict[str, list[Review]] = {}
    for review in waiting:
        groups.setdefault(review.group, []).append(review)
    return [{**_short(group[0]), "runs": [review.what.run for review in group]} for group in groups.values()]


def _modified(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def _jsonable(value: Any) -> Any:
    """Return a value of TOML as one of JSON: dates become text."""
    if isinstance(value, Mapping):
        return {str(key): _jsonable(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_jsonable(one) for one in value]
    return value if isinstance(value, str | int | float | bool) else str(value)
