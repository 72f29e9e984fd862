"""The console over a real server and real sites: a study from its file to its report, and a server that dies and returns.

The pages are used in a browser; set POLYCLINIC_PICTURES to a folder for pictures of them.
"""

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="the extra [console] is not installed")
pytest.importorskip("nvflare", reason="the extra [flare] is not installed")

from polyclinic.core.audit_log import verify
from polyclinic.engines.flare.client.reviews import APPROVED, Reviews, record_decision
from tests.console.test_browser import Tab, chromium  # noqa: F401
from tests.support.console import Running, console
from tests.support.flare_deployment import Hospitals, until

pytestmark = [pytest.mark.slow, pytest.mark.deploy]
STUDY = """
name = "spots"
title = "Is there a spot in the picture?"
rounds = 3
[data]
kind = "npz"
path = "spots.npz"
[task]
network = "cnn"
options = { width = 4, depth = 2 }
[training]
lr = 0.05
batch_size = 8
[[methods]]
name = "fedavg"
"""


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hospitals]:
    with Hospitals(Path(tmp_path_factory.mktemp("hospitals")), count=2) as made:
        yield made


def picture(page: Any, name: str) -> None:
    """A picture of the page for the documentation."""
    if folder := os.environ.get("POLYCLINIC_PICTURES"):
        page.wait_for_timeout(800)
        page.screenshot(path=f"{folder}/{name}.png")


def opened(chromium: Any, running: Running) -> Tab:  # noqa: F811
    tab = Tab(chromium, running.base)
    tab.page.goto(f"{running.base}/#{running.token}")
    tab.page.wait_for_selector("h2")
    return tab


def test_a_study_goes_from_its_file_to_its_report(
    hospitals: Hospitals,
    chromium: Any,  # noqa: F811
) -> None:
    (hospitals.server.path / "spots.toml").write_text(STUDY)
    name, other = hospitals.homes
    home = hospitals.homes[name]
    coordinator = console("server", "console", "--home", str(hospitals.server.path), "--port", "0")
    hospital = console("site", "console", "--home", str(home.path), "--port", "0")
    with coordinator as at_server, hospital as at_site:
        server, site = opened(chromium, at_server), opened(chromium, at_site)
        page, mine = server.page, site.page
        page.get_by_text("2 / 2").wait_for(timeout=60_000)
        mine.get_by_text("Connected", exact=True).wait_for(timeout=60_000)

        # The coordinator queues the study; the hospital reads it and approves it.
        page.get_by_role("button", name="Queue for all sites").click()
        mine.get_by_text("A study waits for a decision").wait_for(timeout=180_000)
        picture(mine, "console-waits")
        mine.get_by_role("link", name="Read and decide").click()
        mine.get_by_text("Patients at this site:").wait_for(timeout=180_000)
        picture(mine, "console-review")
        mine.get_by_label("I have read").check()
        mine.get_by_label("Your name").fill("Anna Martin")
        mine.get_by_label(re.compile("^Reason")).fill("IRB 26-114")
        mine.get_by_role("button", name="Approve exactly this").click()
        mine.get_by_text("Nothing waits for a decision").wait_for(timeout=30_000)
        page.get_by_text(f"{other}: a person there has not decided yet").wait_for(timeout=60_000)
        picture(page, "console-coordinator")
        reviews = Reviews(hospitals.homes[other].reviews)
        first, *_ = until(lambda: reviews.named("spots"), "the study to arrive")
        reviews.remember(reviews.subject(first.what.run))
        record_decision(hospitals.homes[other], "spots", APPROVED, "REK 2026/88", "Kari Nordmann")

        # It runs to its end; what left is listed at the hospital, and the report is written at the server.
        page.get_by_role("button", name="Export", exact=True).wait_for(timeout=300_000)
        rows = mine.get_by_role("region", name=re.compile("Every reply"))
        rows.get_by_text("WeightedMean").first.wait_for(timeout=60_000)
        assert "train" in rows.inner_text()
        page.get_by_role("button", name="Export", exact=True).click()
        page.get_by_role("button", name="Write report").click(timeout=180_000)
        with server.context.expect_page(timeout=300_000) as report:
            page.get_by_role("button", name="Open report").click(timeout=240_000)
        report.value.wait_for_load_state()
        assert "Is there a spot" in report.value.inner_text("body")
        report.value.close()
        events = [entry["event"] for entry in verify(home.journal)]
        assert "approved by a person" in events
        assert "console opened" in events

        server.check()
        site.check()


def test_a_server_that_stops_and_returns_is_shown_at_the_hospital(
    hospitals: Hospitals,
    chromium: Any,  # noqa: F811
) -> None:
    home = next(iter(hospitals.homes.values()))
    coordinator = console("server", "console", "--home", str(hospitals.server.path), "--port", "0")
    hospital = console("site", "console", "--home", str(home.path), "--port", "0")
    with coordinator as at_server, hospital as at_site:
        server, site = opened(chromium, at_server), opened(chromium, at_site)
        page, mine = server.page, site.page
        page.get_by_text("2 / 2").wait_for(timeout=60_000)
        mine.get_by_text("Connected", exact=True).wait_for(timeout=60_000)
        page.get_by_role("button", name="Stop", exact=True).click()
        page.get_by_label(re.compile("Type tests to confirm")).fill("tests")
        page.get_by_role("button", name="Stop the server").click()
        page.get_by_role("heading", name="The server is not running").wait_for(timeout=60_000)
        stopped = time.monotonic()
        mine.get_by_text("The server does not answer").wait_for(timeout=15_000)
        print(f"shown {time.monotonic() - stopped:.1f} s after the server had ended")
        picture(mine, "console-no-server")
        page.get_by_role("button", name="Start the server").click()
        mine.get_by_text("Connected", exact=True).wait_for(timeout=180_000)
        picture(mine, "console-site")
        server.check()
        site.check()
