"""Pages of other origins in the browser of a person who is logged in: what they send changes nothing and tells nothing.

The console runs as a process, in a browser for which the name ``evil.test`` leads to this machine, as after DNS rebinding.
"""

import http.server
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="the extra [console] is not installed")

from tests.console.test_runs_page import EVIL, Run
from tests.support.console import Running, console

pytestmark = pytest.mark.slow
ATTACK = """
async ([base, run, files]) => {
  const found = {};
  const body = JSON.stringify({act: "delete", run, confirm: run});
  const attempt = async (name, path, options) => {
    try {
      const answer = await fetch(base + path, options);
      found[name] = answer.type === "opaque" ? "opaque" : `${answer.status} ${await answer.text()}`;
    } catch { found[name] = "refused"; }
  };
  await attempt("simple", "/api/act", {method: "POST", mode: "no-cors", body});
  await attempt("json", "/api/act", {method: "POST", headers: {"content-type": "application/json"}, body});
  await attempt("guess", "/api/act", {method: "POST", headers: {"content-type": "application/json", "x-polyclinic-key": "x"}, body});
  await attempt("events", "/api/events", {});
  await attempt("metrics", "/metrics", {mode: "no-cors"});
  await attempt("page", "/", {});
  const frame = document.createElement("iframe");
  frame.name = "into";
  document.body.append(frame);
  const form = document.createElement("form");
  Object.assign(form, {action: base + "/api/act", method: "POST", enctype: "text/plain", target: "into"});
  const input = document.createElement("input");
  Object.assign(input, {name: body.slice(0, -1) + ',"x":"', value: '"}'});
  form.append(input);
  document.body.append(form);
  form.submit();
  const script = document.createElement("script");
  script.src = `${base}${files}/main.js`;
  await new Promise((go) => { script.onload = () => { found.script = "loaded"; go(); }; script.onerror = () => { found.script = "refused"; go(); }; document.body.append(script); });
  const shown = document.createElement("iframe");
  await new Promise((go) => { shown.onload = go; shown.onerror = go; shown.src = base + "/#/"; document.body.append(shown); });
  try { found.frame = String(shown.contentDocument?.body?.innerText); } catch { found.frame = "refused"; }
  found.key = localStorage.getItem("polyclinic-key");
  return found;
}
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: polyclinic[browser]")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("needs a browser: apt-get install chromium")
    with sync_api.sync_playwright() as play:
        rules = "--host-resolver-rules=MAP evil.test 127.0.0.1"
        started = play.chromium.launch(executable_path=path, args=["--no-sandbox", rules])
        yield started
        started.close()


@pytest.fixture
def elsewhere() -> Iterator[int]:
    """The port of another web server on this machine, with an empty page."""

    class Empty(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><title>Elsewhere</title><body></body>")

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Empty) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run in which every name is markup."""
    sites = [{"name": name, "role": "training", "patients": {"train": 10}} for name in (EVIL, "oslo")]
    made = Run(tmp_path / "runs" / "evil-00000000", (EVIL,), title=EVIL, task=EVIL, sites=sites, created=EVIL)
    for number in (1, 2):
        made.round(EVIL, number, {EVIL: 0.5, "oslo": 0.6})
        made.write(EVIL, "quarantine", round=number, site=EVIL, reason=EVIL)
        made.write(EVIL, "scores", round=number, role="val", site=EVIL, metrics={EVIL: 0.5, "auc": 0.5})
    made.journal.write(EVIL, {"method": EVIL, "seed": EVIL, "round": EVIL})
    return made


@pytest.fixture
def running(run: Run) -> Iterator[Running]:
    with console("console", str(run.path.parent), "--studies", str(run.path.parent), "--port", "0") as started:
        yield started


@pytest.mark.parametrize("name", ["evil.test", "127.0.0.1"])
def test_a_page_of_another_origin_changes_and_learns_nothing(
    name: str, browser: Any, elsewhere: int, running: Running, run: Run
) -> None:
    """Also one of the same machine at another port, which is of the same site for the browser."""
    context = browser.new_context()
    mine = context.new_page()
    mine.goto(f"{running.base}/#{running.token}")
    mine.wait_for_selector("tbody tr")
    assert mine.evaluate("localStorage.getItem('polyclinic-key')")
    files = mine.evaluate("document.querySelector('script').getAttribute('src')").rpartition("/")[0]
    page = context.new_page()
    page.goto(f"http://{name}:{elsewhere}/")
    found = page.evaluate(ATTACK, [running.base, run.path.name, files])
    assert found.pop("key") is None
    assert found.pop("frame") in ("refused", "null", "undefined", "")
    assert found.keys() == {"simple", "json", "guess", "events", "metrics", "page", "script"}
    assert set(found.values()) == {"refused"}
    page.wait_for_timeout(1500)
    assert (run.path / "run.json").is_file()
    mine.reload()
    mine.wait_for_selector("tbody tr")
    context.close()


def test_a_name_that_was_made_to_lead_here_is_refused(browser: Any, running: Running) -> None:
    page = browser.new_page()
    answer = page.goto(f"{running.base.replace('127.0.0.1', 'evil.test')}/#{running.token}")
    assert answer.status == 421
    assert "ssh -L" in page.inner_text("body")
    page.close()


def test_markup_in_every_name_stays_text_and_the_policy_of_the_page_holds(
    browser: Any, running: Running, elsewhere: int
) -> None:
    page, dialogs, asked = browser.new_page(), list[str](), list[str]()
    page.on("dialog", lambda dialog: dialog.dismiss())
    page.on("dialog", lambda dialog: dialogs.append(dialog.message))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{running.base}/#{running.token}")
    page.wait_for_selector("tbody tr")
    for place in ("/", "/run/evil-00000000", f"/compare/evil-00000000,{EVIL}"):
        page.goto(f"{running.base}/#{place}")
        page.wait_for_timeout(800)
        assert EVIL in page.inner_text("main")
        assert page.locator("main img, main script").count() == 0
    wrong = page.evaluate(
        """async (other) => {
          const tried = {};
          const attempt = async (name, what) => { try { await what(); tried[name] = "done"; } catch { tried[name] = "refused"; } };
          await attempt("markup", () => { document.querySelector("main").innerHTML = "<b>x</b>"; });
          await attempt("script", () => { const s = document.createElement("script"); s.textContent = "window.ran = 1"; document.head.append(s); });
          await attempt("elsewhere", () => fetch(other));
          const image = new Image();
          await new Promise((go) => { image.onload = go; image.onerror = go; image.src = other; });
          tried.image = String(image.naturalWidth);
          tried.ran = String(window.ran);
          return tried;
        }""",
        f"http://127.0.0.1:{elsewhere}/",
    )
    assert wrong == {"markup": "refused", "script": "refused", "elsewhere": "refused", "image": "0", "ran": "undefined"}
    assert dialogs == []
    assert [url for url in asked if not url.startswith((running.base, f"http://127.0.0.1:{elsewhere}/"))] == []
    page.close()
