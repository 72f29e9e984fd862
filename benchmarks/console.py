"""What the console costs: start, pages, an open page, and memory, with 200 runs and 100 sites.

``python benchmarks/console.py`` writes folders of synthetic runs, starts each console as a process of its own, and
requests what a browser requests. CPU seconds are those of the console's process, from ``/proc``; they do not depend on
what else the machine does, except for the sharing of caches. ``chrt --rr 1`` before the command, as root, also gives
times that other processes disturb little.
"""

import argparse
import http.client
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from polyclinic.core import atomic
from polyclinic.core.audit_log import Journal
from polyclinic.engines.flare.client.reviews import APPROVED, Reviews, record_decision
from polyclinic.engines.flare.pki import site_keys
from polyclinic.engines.flare.protocol.paths import ServerFolder, SiteFolder, private_folder
from polyclinic.engines.flare.protocol.shared_journals import SharedJournal
from tests.console.test_runs_page import SITES, Run
from tests.console.test_server_page import admitted, queue, record, server_folder, status
from tests.engines.flare.test_approval import survey
from tests.support.local_deployment import hospital

WIDE = [f"site-{i:03d}" for i in range(100)]
OPENED = 7
WATCHED_SECONDS = 10.0


def runs(root: Path, count: int = 200, rounds: int = 20) -> list[str]:
    """Write ``count`` finished runs of three methods, and a run of 100 sites; return the command that shows them."""
    methods = ("local", "fedavg", "fedprox")
    for i in range(count):
        run = Run(root / f"heart-{i:08d}", methods, rounds)
        for method in methods:
            for number in range(1, rounds + 1):
                run.round(method, number, dict.fromkeys(SITES, 0.5 + number / 100))
            run.test(method)
        run.finish()
        run.journal.close()
    sites = [{"name": site, "role": "training", "patients": {"train": 10}} for site in WIDE]
    wide = Run(root / "wide-00000000", ("fedavg",), 100, sites=sites)
    for number in range(1, 101):
        wide.round("fedavg", number, dict.fromkeys(WIDE, 0.5))
    wide.journal.close()
    return ["console", str(root), "--studies", str(root)]


def server(root: Path, count: int = 200) -> list[str]:
    """Write a server with 100 sites, ``count`` finished runs and an active one; return the command that shows it."""
    home: ServerFolder = server_folder(root / "server")
    atomic.write_json(home.admitted, {site: admitted() for site in WIDE})
    status(home, sites=dict.fromkeys(WIDE[:90], time.time()))
    waiting = dict.fromkeys(WIDE[:20], "waits for a person")
    queue(home, "run-1", progress={"waiting": waiting, "asked": WIDE, "trained": WIDE[:4]})
    for i in range(count + 1):
        name, sites = (f"done-{i:03d}", WIDE[:4]) if i < count else ("run-1", WIDE)
        if i < count:
            queue(home, name, "finished", {})
        facts: list[dict[str, Any]] = []
        for number in range(1, 21):
            moved = dict.fromkeys(sites, 1000)
            facts.append({"kind": "round", "round": number, "bytes_up": moved, "bytes_down": moved})
            facts += [{"kind": "scores", "round": number, "site": s, "metrics": {"auc": 0.5}} for s in sites]
        record(home, name, *facts)
    journal = Journal(home.path / "journal.jsonl")
    for i in range(2000):
        journal.write("asked", {"run": "run-1", "site": WIDE[i % 100], "round": i // 100})
    journal.close()
    return ["server", "console", "--home", str(home.path)]


def write_certificate(home: SiteFolder) -> None:
    """Give a site the certificate that a site has after joining, by which its decisions are verified."""
    key, now = site_keys.load(home.keys / "site.key"), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "site-0")])
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    made = made.serial_number(1).not_valid_before(now).not_valid_after(now + timedelta(days=700))
    text = made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    atomic.write_private(private_folder(home.certificates) / "1.crt", text)


def site(root: Path, decided: int = 50, entries: int = 5000) -> list[str]:
    """Write a site with decided studies and a journal of what left; return the command that shows it."""
    home: SiteFolder = hospital(root, count=1)["site-0"]
    write_certificate(home)
    reviews = Reviews(home.reviews)
    for i in range(decided):
        an = survey(seeds=(0,), rounds=3)
        reviews.offer(replace(an, run=f"old-{i}", study={**an.study, "name": f"old-{i}", "hash": f"{i:064x}"}), ())
        reviews.remember(reviews.subject(f"old-{i}"))
        record_decision(home, f"old-{i}", APPROVED, "IRB 26-114", "Anna Martin")
    reviews.offer(survey(seeds=(0, 1), rounds=5), ())
    journal = SharedJournal(home.journal)
    for i in range(entries):
        facts = {"run": f"old-{i % decided}", "round": i // decided, "job": "train", "bytes": 1000}
        journal.write("answered", {**facts, "parts": {"update": "WeightedMean"}})
    journal.close()
    return ["site", "console", "--home", str(home.path)]


class Console:
    """A console that runs as a process."""

    def __init__(self, process: "subprocess.Popen[str]", port: int, token: str, begun: float) -> None:
        self.process, self.port, self.begun = process, port, begun
        self.start_cpu = self.cpu()
        self.key = json.loads(self.request("POST", "/api/login", {"token": token}))["key"]

    def cpu(self) -> float:
        """Return the CPU seconds of the process so far."""
        words = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")

    def megabytes(self) -> float:
        """Return its memory."""
        found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{self.process.pid}/status").read_text())
        assert found
        return int(found[1]) / 1000

    def request(self, method: str, path: str, body: Any = None) -> bytes:
        """Return the body of a response."""
        line = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {"content-type": "application/json", "x-polyclinic-key": getattr(self, "key", "")}
        line.request(method, path, None if body is None else json.dumps(body), headers)
        answer = line.getresponse()
        data = answer.read()
        assert answer.status == 200, (path, answer.status, data)
        line.close()
        return data

    def page(self, query: str = "") -> int:
        """Request what a browser does, until all that it shows has come; return the bytes."""
        shell = self.request("GET", "/").decode()
        size = sum(len(self.request("GET", path)) for path in re.findall(r"/static/[^\"' ]+", shell))
        with self.stream(query) as events:
            for name, data in events:
                size += len(data)
                if name in (("arms", "scores") if query else ("rows", "state")):
                    return size
        raise AssertionError("the stream ended")

    @contextmanager
    def stream(self, query: str = "") -> Iterator[Iterator[tuple[str, bytes]]]:
        """Yield the events of a stream."""
        line = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        line.request("GET", f"/api/events{query}", headers={"x-polyclinic-key": self.key})
        answer = line.getresponse()

        def events() -> Iterator[tuple[str, bytes]]:
            name = ""
            while text := answer.readline():
                if text.startswith(b"event: "):
                    name = text[7:].strip().decode()
                elif text.startswith(b"data: "):
                    yield name, text[6:]

        yield events()
        answer.close()
        line.close()


@contextmanager
def console(words: list[str]) -> Iterator[Console]:
    """Start ``polyclinic WORDS``; end it by SIGTERM."""
    begun = time.perf_counter()
    command = [sys.executable, "-m", "polyclinic.cli.app", *words, "--port", "0"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout
    try:
        found = next(filter(None, (re.search(r"http://127\.0\.0\.1:(\d+)/#(\S+)", text) for text in process.stdout)))
        yield Console(process, int(found[1]), found[2], time.perf_counter() - begun)
    finally:
        process.terminate()
        process.wait(20)
        process.stdout.close()


def measure(name: str, words: list[str], opened: str) -> dict[str, Any]:
    """Return what a console costs; ``opened`` is the query of the page of one run."""
    with console(words) as one:

        def cost(query: str) -> tuple[float, float]:
            cpu, wall = one.cpu(), time.perf_counter()
            one.page(query)
            return one.cpu() - cpu, time.perf_counter() - wall

        first = cost("")
        pages = {"list": [cost("") for _ in range(OPENED)]}
        if opened:
            pages["run"] = [cost(opened) for _ in range(OPENED)]
        with one.stream() as events:
            next(events)
            time.sleep(WATCHED_SECONDS)  # what the first page left to be read is read in pieces
            cpu = one.cpu()
            time.sleep(WATCHED_SECONDS)
            watched = (one.cpu() - cpu) / WATCHED_SECONDS
        return {
            "console": name,
            "start: CPU s": round(one.start_cpu, 2),
            "start: s": round(one.begun, 2),
            "first page: CPU s": round(first[0], 3),
            "first page: s": round(first[1], 3),
            **{
                f"{kind} page: {what}": round(statistics.median(pair[i] for pair in costs), 3)
                for kind, costs in pages.items()
                for i, what in enumerate(("CPU s", "s"))
            },
            "open page: share of a core": f"{watched:.2%}",
            "MB": round(one.megabytes()),
        }


def in_browser(name: str, words: list[str], opened: str) -> dict[str, Any]:
    """Return the milliseconds from a reload until Chromium has laid out the rows of a page; needs polyclinic[browser]."""
    from playwright.sync_api import sync_playwright

    with console(words) as one, sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        base, times = f"http://127.0.0.1:{one.port}", dict[str, float]()
        page.goto(base)
        page.evaluate("key => localStorage.setItem('polyclinic-key', key)", one.key)
        for kind, place in {"list": "/", **({"run": f"/run/{opened.partition('=')[2]}"} if opened else {})}.items():
            page.goto(f"{base}/#{place}")
            taken = []
            for _ in range(OPENED):
                page.reload()
                page.wait_for_selector("tbody tr", state="attached")
                taken.append(page.evaluate("document.body.offsetHeight && performance.now()"))
            times[f"{kind} page in Chromium: ms"] = round(statistics.median(taken))
        browser.close()
        return {"console": name, **times}


def main() -> None:
    """Write the folders, measure, and print one JSON document per console."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("consoles", nargs="*", default=["runs", "server", "site"])
    parser.add_argument("--browser", action="store_true", help="measure the pages in Chromium as well")
    given = parser.parse_args()
    make: dict[str, tuple[Callable[[Path], list[str]], str]] = {
        "runs": (runs, "?run=wide-00000000"),
        "server": (server, "?run=run-1"),
        "site": (site, ""),
    }
    with tempfile.TemporaryDirectory() as temporary:
        for name in given.consoles:
            build, opened = make[name]
            words = build(Path(temporary) / name)
            print(json.dumps(measure(name, words, opened), indent=1), flush=True)
            if given.browser:
                print(json.dumps(in_browser(name, words, opened), indent=1), flush=True)


if __name__ == "__main__":
    main()
