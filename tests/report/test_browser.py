"""The report in a real browser: it fetches nothing, complains of nothing, fits, can be read by everybody, and prints.

Needs Debian's Chromium (or another under that name), playwright without a browser of its own, and axe-core, which
comes with the package axe-playwright-python: ``pip install 'polyclinic[browser]'``.
"""

import io
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyclinic.evaluation.run_evaluation import Options
from polyclinic.learning.tasks.classification import Classification
from polyclinic.report import build_report
from tests.support.synthetic_run import write_groups, write_maps, write_run

pytestmark = pytest.mark.slow
TASKS = ("classification", "segmentation", "regression", "multilabel")
WIDTHS = (400, 1400)
OPEN = "document.querySelectorAll('details').forEach(d => { d.open = true; })"
STICKING_OUT = """() => [...document.querySelectorAll('body *')]
  .filter(e => !e.closest('.scroll, pre, .skip') && e.getBoundingClientRect().right > innerWidth + 1)
  .map(e => e.tagName + ' ' + e.className)"""
SIZES = """() => { const found = []; const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) { const e = walk.currentNode.parentElement;
    if (!walk.currentNode.textContent.trim() || !e.getClientRects().length) continue;
    const scale = e.closest('svg') ? e.getScreenCTM().a : 1;
    found.push([scale * parseFloat(getComputedStyle(e).fontSize), walk.currentNode.textContent.trim()]); }
  return found; }"""


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


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A report of every kind of task; that of a classification has all the sections there are."""
    made = {}
    for task in TASKS:
        path = write_run(tmp_path_factory.mktemp("runs") / task, task=task, seeds=(0, 1))
        if task == "classification":
            write_groups(path)
            write_maps(path)
        made[task] = build_report(path, options=Options())
    return made


@pytest.fixture(params=WIDTHS)
def opened(request: pytest.FixtureRequest, chromium: Any) -> Iterator[Any]:
    """Opens a page at a width, and notes all that it asks for and says."""
    context = chromium.new_context(viewport={"width": request.param, "height": 1000})
    tab = context.new_page()
    tab.asked, tab.said = [], []
    tab.on("request", lambda r: tab.asked.append(r.url))
    tab.on("console", lambda m: tab.said.append(m.text))
    tab.on("pageerror", lambda e: tab.said.append(str(e)))
    yield lambda file: (tab.goto(Path(file).as_uri(), wait_until="networkidle"), tab)[1]
    context.close()


@pytest.mark.parametrize("task", TASKS)
def test_it_asks_for_nothing_and_complains_of_nothing(opened: Any, reports: Any, task: Classification) -> None:
    tab = opened(reports[task])
    assert tab.asked == [reports[task].as_uri()]
    assert tab.said == []


@pytest.mark.parametrize("task", TASKS)
def test_it_fits_its_window(opened: Any, reports: Any, task: Classification) -> None:
    tab = opened(reports[task])
    tab.evaluate(OPEN)
    assert tab.evaluate("document.documentElement.scrollWidth") <= tab.viewport_size["width"]
    assert tab.evaluate(STICKING_OUT) == []


def test_no_letter_is_too_small_to_read(opened: Any, reports: Any) -> None:
    tab = opened(reports["classification"])
    tab.evaluate(OPEN)
    small = [found for found in tab.evaluate(SIZES) if 0 < found[0] < 8.9]
    assert small == []


@pytest.mark.parametrize("task", TASKS)
def test_axe_finds_no_fault(opened: Any, reports: Any, task: Classification) -> None:
    axe = pytest.importorskip("axe_playwright_python", reason="needs axe-core: polyclinic[browser]")
    tab = opened(reports[task])
    tab.evaluate(OPEN)
    tab.evaluate((Path(axe.__file__).parent / "axe.min.js").read_text(encoding="utf-8"))
    found = tab.evaluate("axe.run(document, {resultTypes: ['violations']})")
    assert found["passes"]
    assert [(v["id"], v["impact"], v["nodes"][0]["html"]) for v in found["violations"]] == []


def test_axe_would_find_one(opened: Any, tmp_path: Path) -> None:
    axe = pytest.importorskip("axe_playwright_python", reason="needs axe-core: polyclinic[browser]")
    (tmp_path / "bad.html").write_text(
        "<!doctype html><html><body><img src='data:,'><p style='color:#ddd;background:#fff'>Words too pale to read.</p>"
    )
    tab = opened(tmp_path / "bad.html")
    tab.evaluate((Path(axe.__file__).parent / "axe.min.js").read_text(encoding="utf-8"))
    found = tab.evaluate("axe.run(document, {resultTypes: ['violations']})")
    assert {"image-alt", "html-has-lang", "color-contrast"} <= {v["id"] for v in found["violations"]}


def test_a_screenshot_shows_the_result_first_and_is_the_same_twice(opened: Any, reports: Any) -> None:
    """Both boxes at the top are in the first window of a desk's screen; nothing is painted at the page's right edge."""
    from PIL import Image

    tab = opened(reports["classification"])
    first, again = tab.screenshot(), tab.screenshot()
    assert first == again
    pixels = np.asarray(Image.open(io.BytesIO(tab.screenshot(full_page=True))).convert("RGB"))
    assert pixels.shape[1] == tab.viewport_size["width"]
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    assert (pixels[:, -6:] > 200).all()
    if tab.viewport_size["width"] == 1400:
        for box in (".short", ".look"):
            at = tab.locator(box).bounding_box()
            assert at["y"] + at["height"] < 1000


def test_every_place_can_be_reached_with_the_keyboard(opened: Any, reports: Any) -> None:
    tab = opened(reports["classification"])
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.textContent") == "Skip to the report"
    tab.keyboard.press("Enter")
    reached = set()
    for _ in range(400):
        tab.keyboard.press("Tab")
        if (name := tab.evaluate("document.activeElement.tagName")) == "BODY":
            break
        reached.add(name)
    assert {"SUMMARY", "DIV", "PRE"} <= reached


@pytest.mark.parametrize("task", TASKS)
def test_it_prints_with_everything_unfolded(chromium: Any, reports: Any, task: Classification, tmp_path: Path) -> None:
    tab = chromium.new_page()
    tab.goto(reports[task].as_uri())
    tab.pdf(path=tmp_path / "page.pdf", prefer_css_page_size=True)
    tab.emulate_media(media="print")
    hidden = "[...document.querySelectorAll('details table')].filter(e => !e.getBoundingClientRect().height).length"
    assert tab.evaluate(hidden) == 0
    tab.close()
    data = (tmp_path / "page.pdf").read_bytes()
    assert data.startswith(b"%PDF")
    assert 4 <= len(re.findall(rb"/Type ?/Page\b(?!s)", data)) <= 30
