"""The documentation builds without a warning, and its pages request nothing from another host.

Needs ``pip install 'polyclinic[docs]'``; the second test also needs playwright and Chromium.
"""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
NEEDED = ("sphinx", "myst_parser", "furo", "latex2mathml")
LOADED = re.compile(
    r"""<(?:script|img|iframe|audio|video|source|embed)\b[^>]*\b(?:src|srcset)=["']?(?:https?:)?//[^"'>\s]+"""
    r"""|<link\b(?=[^>]*\brel=["']?(?:stylesheet|preload|icon|shortcut|preconnect))[^>]*\bhref=["']?(?:https?:)?//[^"'>\s]+""",
    re.I,
)
"""What a browser fetches by itself from another host. Links that a reader follows are allowed."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documentation, built strictly."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        pytest.skip(f"needs {', '.join(missing)}: polyclinic[docs]")
    folder = tmp_path_factory.mktemp("site")
    out = folder / "html"
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", str(folder / "doctrees")]
    done = subprocess.run([*command, "docs", str(out)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    return out


def test_nothing_is_loaded_from_another_host(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 100
    for page in pages:
        assert not (found := LOADED.findall(page.read_text(encoding="utf-8"))), (page.name, found)
    for style in site.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        assert not re.search(r"@import[^;]*//|url\(\s*['\"]?(?:https?:)?//", text), style.name


def test_equations_are_mathml(site: Path) -> None:
    text = (site / "reference" / "methods" / "fedavg.html").read_text(encoding="utf-8")
    assert "<math" in text
    assert not re.search(r"<script[^>]*mathjax", text.lower())


@pytest.mark.parametrize(
    "page",
    [
        "index.html",
        "reference/methods/fedavg.html",
        "reference/config.html",
        "tutorials/first-study.html",
        "search.html",
    ],
)
def test_a_browser_requests_local_files_only(site: Path, page: str) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: polyclinic[browser]")
    if (path := shutil.which("chromium")) is None:
        pytest.skip("needs a browser: apt-get install chromium")
    requests: list[str] = []
    errors: list[str] = []
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1400, "height": 1000})
        tab.on("request", lambda request: requests.append(request.url))
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto((site / page).as_uri(), wait_until="networkidle")
        width = tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        browser.close()
    assert requests
    assert all(url.startswith(("file:", "data:")) for url in requests), requests
    assert not errors
    assert width <= 0, "the page is wider than its window"
