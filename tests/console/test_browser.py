"""The console in a real browser over real processes: a study from its start to its report, a decision, and what fails.

Needs Debian's Chromium, playwright without a browser of its own, and axe-core: ``pip install 'polyclinic[browser]'``.
"""

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="the extra [console] is not installed")

from polyclinic.core.audit_log import verify
from polyclinic.engines.flare.client.reviews import APPROVED, REFUSED, WAITING, Reviews, record_decision
from polyclinic.engines.flare.protocol.paths import ServerFolder, SiteFolder
from tests.console.test_runs_page import EVIL, Run
from tests.console.test_server_page import admitted, queue, record, status
from tests.engines.flare.test_approval import survey
from tests.support.console import Running, console
from tests.support.local_deployment import hospital

pytestmark = pytest.mark.slow
STUDY = """
name = "small"
title = "Small study"
rounds = 3
[data]
path = "table.csv"
kind = "table"
label = "y"
site = "site"
[task]
network = "mlp"
options = { width = 4, depth = 1 }
[[methods]]
name = "local"
[[methods]]
name = "fedavg"
"""
WIDE = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: polyclinic[browser]")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("needs a browser: apt-get install chromium")
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


class Tab:
    """A tab that fails a test if its page asks another host, or complains."""

    def __init__(self, chromium: Any, base: str, **options: Any) -> None:
        self.base, self.foreign, self.complaints = base, list[str](), list[str]()
        self.context = chromium.new_context(**{"viewport": {"width": 1400, "height": 900}, **options})
        self.context.on("request", self._asked)
        self.page = self.context.new_page()
        self.page.on("console", lambda m: self.complaints.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def _asked(self, request: Any) -> None:
        if not request.url.startswith((self.base, "about:", "data:")):
            self.foreign.append(request.url)

    def check(self, complaints: str = "") -> None:
        """No other host was asked, and no error was printed, except those that match ``complaints``."""
        assert self.foreign == []
        assert [text for text in self.complaints if not (complaints and re.search(complaints, text))] == []

    def close(self) -> None:
        self.context.close()


@pytest.fixture
def tabs(chromium: Any) -> Iterator[Callable[..., Tab]]:
    opened: list[Tab] = []

    def open_(running: Running, **options: Any) -> Tab:
        tab = Tab(chromium, running.base, **options)
        if not opened:
            tab.page.goto(f"{running.base}/#{running.token}")
        else:  # another tab of the same person
            key = opened[0].page.evaluate("localStorage.getItem('polyclinic-key')")
            tab.context.add_init_script(f"localStorage.setItem('polyclinic-key', {json.dumps(key)})")
            tab.page.goto(f"{running.base}/#/")
        tab.page.wait_for_selector("h1")
        opened.append(tab)
        return tab

    yield open_
    for tab in opened:
        tab.close()


def without_barriers(page: Any) -> None:
    """axe finds nothing serious, and the page does not scroll sideways."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe: polyclinic[browser]").Axe()
    found = axe.run(page).response["violations"]
    serious = [
        (v["id"], [n["html"][:120] for n in v["nodes"]][:3]) for v in found if v["impact"] in ("serious", "critical")
    ]
    assert serious == []
    assert page.evaluate(WIDE) <= 0


def busy() -> float:
    """By how much this machine is overloaded: the bars are those of a machine with a free core."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def looked_at(tabs: Callable[..., Tab], running: Running, places: list[str], ready: str) -> None:
    """Each place, at both widths and in both themes, without barriers, complaints or markup from names."""
    for width, theme in ((1400, "light"), (1400, "dark"), (400, "light"), (400, "dark")):
        tab = tabs(running, viewport={"width": width, "height": 900}, color_scheme=theme)
        for place in places:
            tab.page.goto(f"{running.base}/#{place}")
            tab.page.wait_for_selector(ready)
            tab.page.wait_for_timeout(400)
            tab.page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
            without_barriers(tab.page)
            assert tab.page.locator("main img, main script").count() == 0
        tab.check()


# A researcher ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    """A folder with a study file and its table."""
    rng = np.random.default_rng(0)
    rows = ["site,a,b,y"]
    for i in range(240):
        y = i % 2
        rows.append(f"{'lyon' if i < 120 else 'oslo'},{rng.normal(y):.3f},{rng.normal():.3f},{y}")
    (tmp_path / "table.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "study.toml").write_text(STUDY)
    return tmp_path


def test_a_study_is_started_followed_and_its_report_opened(studies: Path, tabs: Callable[..., Tab]) -> None:
    with console("console", str(studies / "runs"), "--studies", str(studies), "--port", "0", cwd=studies) as running:
        tab = tabs(running)
        page = tab.page
        assert running.token not in page.url
        page.get_by_role("button", name="Run", exact=True).click()
        page.get_by_role("link", name="Small study").wait_for(timeout=180_000)
        page.get_by_role("link", name="Small study").click()
        page.get_by_role("heading", name="Small study").wait_for()
        page.get_by_text("finished", exact=True).wait_for(timeout=300_000)
        page.get_by_role("button", name="Open report").wait_for(timeout=180_000)
        assert "closed" not in page.get_by_role("region", name=re.compile("At the best round")).inner_text()
        with tab.context.expect_page() as opened:
            page.get_by_role("button", name="Open report").click()
        report = opened.value
        report.wait_for_load_state()
        assert "Small study" in report.inner_text("body")
        assert report.evaluate("window.origin") == "null"  # an origin of its own: no key of the console is in reach
        report.close()
        page.get_by_role("button", name="Delete this run").click()
        page.get_by_label(re.compile("Type its name")).fill("wrong")
        page.get_by_role("button", name="Delete for good").click()
        page.get_by_text("type its name", exact=False).first.wait_for()
        (run,) = (studies / "runs").glob("small-*")
        page.get_by_label(re.compile("Type its name")).fill(run.name)
        page.get_by_role("button", name="Delete for good").click()
        page.get_by_text("No runs yet.").wait_for()
        assert not run.exists()
        tab.check("422")  # the refused deletion is a response that the browser prints


def test_a_run_stops_and_resumes_from_the_page_to_the_same_bits(studies: Path, tabs: Callable[..., Tab]) -> None:
    import hashlib

    (studies / "study.toml").write_text(STUDY.replace("rounds = 3", "rounds = 3000"))
    models = {}
    with console("console", str(studies / "runs"), "--studies", str(studies), "--port", "0", cwd=studies) as running:
        tab = tabs(running)
        page = tab.page
        page.get_by_role("button", name="Run", exact=True).click()
        page.get_by_role("button", name="Stop", exact=True).click(timeout=180_000)
        page.get_by_role("button", name="Press again to stop").click()
        page.get_by_role("button", name="Resume").click(timeout=120_000)
        page.get_by_text("running", exact=True).first.wait_for(timeout=120_000)
        page.locator("tbody .pill", has_text="finished").wait_for(timeout=400_000)
        (run,) = (studies / "runs").glob("small-*")
        events = [entry["event"] for entry in verify(run / "journal.jsonl")]
        assert events.count("resumed") == 1
        models["watched"] = [
            hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(run.glob("arms/*/model.safetensors"))
        ]
        tab.check()
    command = ["python", "-m", "polyclinic.cli.app", "run", "study.toml", "--out", "plain"]
    import sys

    subprocess.run([sys.executable, *command[1:]], cwd=studies, check=True, capture_output=True)
    (plain,) = (studies / "plain").glob("small-*")
    models["plain"] = [
        hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(plain.glob("arms/*/model.safetensors"))
    ]
    assert models["watched"] == models["plain"]
    assert len(models["plain"]) == 2


def test_a_study_that_cannot_run_says_why(studies: Path, tabs: Callable[..., Tab]) -> None:
    (studies / "study.toml").write_text(STUDY.replace('label = "y"', 'label = "z"'))
    with console("console", str(studies / "runs"), "--studies", str(studies), "--port", "0", cwd=studies) as running:
        tab = tabs(running)
        tab.page.get_by_role("button", name="Run", exact=True).click()
        tab.page.get_by_text("failed, code 2").wait_for(timeout=120_000)
        assert "'z'" in tab.page.get_by_role("region", name="Output of run").inner_text()
        tab.check()


def test_200_runs_in_the_browser(tmp_path: Path, tabs: Callable[..., Tab]) -> None:
    for i in range(200):
        run = Run(
            tmp_path / "runs" / f"heart-{i:08d}", title=f"{EVIL} {i}", created=f"2026-11-{i % 28 + 1:02d}T00:00:00Z"
        )
        for number in (1, 2, 3):
            run.round("fedavg", number, {"lyon": 0.5 + number / 10, "oslo": 0.6})
        run.journal.close()
    with console("console", str(tmp_path / "runs"), "--studies", str(tmp_path), "--port", "0") as running:
        tab = tabs(running)
        page = tab.page
        page.wait_for_selector("tbody tr")
        times = []
        for _ in range(5):
            page.reload()
            page.wait_for_selector("tbody tr")
            times.append(page.evaluate("performance.now()"))
        cpu, _ = running.usage()
        time.sleep(10)
        later, megabytes = running.usage()
        page.get_by_label("Find").fill("heart-00000007")
        page.get_by_role("link", name=re.compile("7")).first.click()
        page.wait_for_selector(".plot canvas")
        tab.check()
        print(
            f"page {min(times):.0f} ms at load {busy():.1f}, CPU {(later - cpu) / 10:.2%}, {megabytes:.0f} MB, start {running.begun:.2f} s"
        )
        assert min(times) < 300 * busy()
        assert (later - cpu) / 10 <= 0.01
        assert megabytes <= 80
        looked_at(tabs, running, ["/", "/run/heart-00000007", "/compare/heart-00000007,heart-00000008"], "h1")


# A hospital -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path) -> SiteFolder:
    home = hospital(tmp_path, count=1)["site-0"]
    home.settings.write_text(home.settings.read_text() + f"organization = {json.dumps(EVIL)}\n")
    reviews = Reviews(home.reviews)
    old = survey(seeds=(0, 1), rounds=3)
    reviews.offer(replace(old, run="old-survey", study={**old.study, "name": "old", "hash": "e" * 64}), ())
    reviews.remember(reviews.subject("old-survey"))
    record_decision(home, "old-survey", APPROVED, EVIL, EVIL)
    reviews.offer(survey(seeds=(0, 1), rounds=5), (), (EVIL,))
    return home


def test_a_hospital_reads_refuses_and_approves_by_keyboard_alone(home: SiteFolder, tabs: Callable[..., Tab]) -> None:
    with console("site", "console", "--home", str(home.path), "--port", "0") as running:
        tab = tabs(running)
        page = tab.page

        def go_to(name: str, role: str) -> None:
            """Press Tab until the element has the focus."""
            target = page.get_by_role(role, name=name)
            target.wait_for()
            for _ in range(80):
                page.keyboard.press("Tab")
                if target.evaluate("el => el === document.activeElement"):
                    assert target.evaluate("el => getComputedStyle(el).outlineStyle") != "none"  # the focus is visible
                    return
            raise AssertionError(f"{name} cannot be reached by keyboard")

        go_to("Read and decide", "link")
        page.keyboard.press("Enter")
        page.get_by_role("heading", name="What would leave this site").wait_for(timeout=30_000)
        text = page.inner_text("main")
        assert "approved before: rounds = 3" in text
        assert "requested now: rounds = 5" in text
        go_to("Approve exactly this", "button")
        page.keyboard.press("Enter")  # without the tick: refused, with a sentence
        page.get_by_text("confirm that you have read").wait_for()
        go_to("Your name", "textbox")
        page.keyboard.type("Anna Martin")
        page.keyboard.press("Tab")
        page.keyboard.type("IRB 26-114")
        Reviews(home.reviews).offer(survey(seeds=(0, 1), rounds=3000), ())  # the server swaps the study now
        page.wait_for_timeout(1500)
        assert page.get_by_label("Your name").input_value() == "Anna Martin"
        assert page.get_by_label(re.compile("^Reason")).input_value() == "IRB 26-114"
        page.get_by_label("I have read").check()
        page.get_by_role("button", name="Approve exactly this").click()
        page.get_by_text("has changed since this page showed it").wait_for()
        page.get_by_text("requested now: rounds = 3000").wait_for()
        assert Reviews(home.reviews).get("spots-survey").state == WAITING  # type: ignore[union-attr]
        assert not page.get_by_label("I have read").is_checked()
        assert page.get_by_label("Your name").input_value() == "Anna Martin"
        page.get_by_role("button", name="Refuse").click()
        page.get_by_text("Nothing waits for a decision").wait_for()
        assert Reviews(home.reviews).get("spots-survey").state == REFUSED  # type: ignore[union-attr]
        fresh = survey(run="again-survey", seeds=(0, 1), rounds=4)
        Reviews(home.reviews).offer(replace(fresh, study={**fresh.study, "hash": "d" * 64}), ())
        page.get_by_text("A study waits for a decision").wait_for()
        assert page.title().startswith("(1)")
        page.get_by_role("link", name="Read and decide").click()
        page.get_by_text("Patients at this site:").wait_for(timeout=120_000)  # counted by a process of its own
        page.get_by_label("I have read").check()
        page.get_by_label("Your name").fill("Anna Martin")
        page.get_by_label(re.compile("^Reason")).fill("IRB 26-115")
        page.get_by_role("button", name="Approve exactly this").click()
        page.get_by_text("Nothing waits for a decision").wait_for()
        last = list(verify(home.journal))[-1]
        assert (last["event"], last["by"], last["reason"]) == ("approved by a person", "Anna Martin", "IRB 26-115")
        tab.check("409|422")


def test_the_pages_of_a_hospital_have_no_barriers(home: SiteFolder, tabs: Callable[..., Tab]) -> None:
    with console("site", "console", "--home", str(home.path), "--port", "0") as running:
        looked_at(tabs, running, ["/", "/review/spots-survey", "/review/old-survey"], "h2")


def test_a_viewer_sees_no_form_and_cannot_decide(home: SiteFolder, tabs: Callable[..., Tab]) -> None:
    with console("site", "console", "--home", str(home.path), "--port", "0", "--viewer") as running:
        tab = tabs(running)
        tab.page.get_by_role("link", name="Read", exact=True).click()
        tab.page.get_by_text("This link may look only").wait_for(timeout=30_000)
        assert tab.page.get_by_role("button", name="Approve exactly this").count() == 0
        status_ = tab.page.evaluate(
            "async () => (await fetch('/api/act', {method: 'POST', headers: {'content-type': 'application/json', "
            "'x-polyclinic-key': localStorage.getItem('polyclinic-key')}, "
            "body: JSON.stringify({act: 'decide', run: 'spots-survey', state: 'approved', shown: 'x'})})).status"
        )
        assert status_ == 403
        tab.check("403")


def test_a_used_link_opens_nothing_and_another_does(home: SiteFolder, chromium: Any, tabs: Callable[..., Tab]) -> None:
    from polyclinic.console.serve import new_link

    with console("site", "console", "--home", str(home.path), "--port", "0") as running:
        tabs(running).check()
        other = Tab(chromium, running.base)
        other.page.goto(f"{running.base}/#{running.token}")
        other.page.get_by_text("This console is locked").wait_for()
        other.page.get_by_text("this link was used already").wait_for()
        other.page.get_by_label("Link or token").fill(new_link("site", home.path, viewer=True))
        other.page.get_by_role("button", name="Open").click()
        other.page.get_by_text("viewer: may look only").wait_for()
        other.check("403")
        other.close()


def test_the_end_and_return_of_the_console_are_shown(home: SiteFolder, tabs: Callable[..., Tab]) -> None:
    with console("site", "console", "--home", str(home.path), "--port", "0") as running:
        tab = tabs(running)
        tab.page.get_by_text("live", exact=True).wait_for()
        begun = time.monotonic()
        running.process.terminate()
        running.process.wait(20)
        assert time.monotonic() - begun < 5  # open streams do not delay the end
        tab.page.get_by_text("connection lost, trying again").wait_for(timeout=5_000)
        tab.check("ERR_|Failed to fetch|network")


# A coordinator --------------------------------------------------------------------------------------------------------


def test_the_page_of_a_coordinator_with_100_sites(tmp_path: Path, tabs: Callable[..., Tab]) -> None:
    from polyclinic.core.atomic import write_json
    from polyclinic.engines.flare.protocol.paths import toml

    home = ServerFolder(tmp_path / "server")
    home.path.mkdir()
    home.settings.write_text(
        toml({"project": "spots", "host": "localhost", "port": 8002, "organization": "umc", "scheme": "grpc"})
    )
    sites = [f"site-{i:03d}" for i in range(100)]
    write_json(home.admitted, {site: admitted(organization=EVIL) for site in sites})
    status(home, sites=dict.fromkeys(sites[:90], time.time()))
    waiting = {sites[3]: f"waits for a person at {sites[3]}", sites[95]: EVIL}
    queue(home, "run-1", progress={"waiting": waiting, "asked": sites[:5], "trained": sites[:4]})
    for number in (1, 2, 3):
        scores = [
            {"kind": "scores", "round": number, "site": s, "metrics": {"auc": 0.5 + number / 10}} for s in sites[:4]
        ]
        record(home, "run-1", {"kind": "round", "round": number, "bytes_up": {sites[0]: 5}}, *scores)
    record(home, "run-1", {"kind": "quarantine", "round": 3, "site": sites[1], "reason": EVIL})
    for i in range(200):
        queue(home, f"done-{i:03d}", "finished", {})
    with console("server", "console", "--home", str(home.path), "--port", "0") as running:
        tab = tabs(running)
        page = tab.page
        page.wait_for_selector("tbody tr")
        times = []
        for _ in range(5):
            page.reload()
            page.wait_for_selector("tbody tr")
            times.append(page.evaluate("performance.now()"))
        cpu, _ = running.usage()
        time.sleep(10)
        later, megabytes = running.usage()
        print(
            f"page {min(times):.0f} ms at load {busy():.1f}, CPU {(later - cpu) / 10:.2%}, {megabytes:.0f} MB, start {running.begun:.2f} s"
        )
        assert "a person there has not decided yet" in page.inner_text("main")
        site = page.locator("[data-do=revoke]").first.get_attribute("data-site")
        assert site == sites[95]  # a run waits for it, and it is away: it comes first
        page.locator("[data-do=revoke]").first.click()
        page.get_by_label(f"Type {site} to confirm").fill("site-001")
        page.locator("form[data-do=confirm] button.danger").click()
        page.get_by_text(f"to confirm, type the name: {site}").wait_for()
        tab.check("422")
        assert min(times) < 300 * busy()
        assert (later - cpu) / 10 <= 0.01
        assert megabytes <= 80
        looked_at(tabs, running, ["/", "/run/run-1"], "h1")
