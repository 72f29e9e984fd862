"""Takes the README's picture of a report: ``python benchmarks/report_picture.py RUN``, after ``polyclinic demo``.

Needs Chromium and playwright (``pip install 'polyclinic[browser]'``). Writes docs/pictures/report.png from the first
window of a page 960 pixels wide, as it is: nothing is drawn in.
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from polyclinic.report import build_report

OUT = Path(__file__).parents[1] / "docs" / "pictures" / "report.png"


def main(run: str) -> None:
    page = build_report(run)
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 960, "height": 1340})
        tab.goto(page.resolve().as_uri())
        tab.screenshot(path=OUT)
        browser.close()
    print(OUT)


if __name__ == "__main__":
    main(sys.argv[1])
