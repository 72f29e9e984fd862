"""A hospital's page: what it shows, and that a decision there is the signed act of the command line and nothing less."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("starlette", reason="the extra [console] is not installed")

from polyclinic.console.app import Console
from polyclinic.console.guard import VIEWER, Keys
from polyclinic.console.page import exposition
from polyclinic.console.site import COUNT, SitePage
from polyclinic.console.tail import PIECE, JournalTail, Tail
from polyclinic.core.audit_log import verify
from polyclinic.engines.flare.client.decisions import signed_bytes
from polyclinic.engines.flare.client.reviews import APPROVED, REFUSED, WAITING, Reviews, record_decision
from polyclinic.engines.flare.pki import site_keys
from polyclinic.engines.flare.protocol import shared_journals
from polyclinic.engines.flare.protocol.paths import SiteFolder
from polyclinic.engines.flare.protocol.shared_journals import SharedJournal
from tests.engines.flare.test_approval import survey
from tests.support.console import PORT, Response, request
from tests.support.local_deployment import hospital


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hospital(tmp_path_factory.mktemp("made"), count=1)["site-0"].path


@pytest.fixture
def home(made: Path, tmp_path: Path) -> SiteFolder:
    shutil.copytree(made, tmp_path / "site-0")
    return SiteFolder(tmp_path / "site-0")


class Browser:
    """What a page asks of the console."""

    def __init__(self, home: SiteFolder, role: str = "operator") -> None:
        self.page, self.keys = SitePage(home.path), Keys()
        self.app = Console(self.page, self.keys).app(PORT)
        made = self.keys.exchange(self.keys.token(role))
        assert made
        self.key = made[0]

    def act(self, name: str, **body: Any) -> Response:
        return request(self.app, "POST", "/api/act", {"act": name, **body}, headers={"x-polyclinic-key": self.key})

    def state(self) -> dict[str, Any]:
        self.page.look()
        return self.page.state()

    def decide(self, shown: str, state: str = APPROVED, run: str = "spots-survey", **body: Any) -> Response:
        given = {"read": True, "reason": "IRB 26-114", "by": "Anna Martin", **body}
        return self.act("decide", run=run, state=state, shown=shown, **given)


@pytest.fixture
def browser(home: SiteFolder) -> Browser:
    Reviews(home.reviews).offer(survey(seeds=(0, 1), rounds=5), ())
    return Browser(home)


def test_what_is_shown_is_what_the_command_shows(browser: Browser) -> None:
    shown = browser.act("review", run="spots-survey").json
    text = json.dumps(shown["sections"])
    for words in (
        "a survey. Nothing is trained.",
        "fedprox, seeds 0, 1, 5 rounds",
        "the change of the model",
        "request ",
    ):
        assert words in text
    assert "patients: unknown" not in text  # they are counted apart
    assert shown["runs"] == ["spots-survey"]
    assert len(shown["shown"]) == 64


def test_an_approval_on_the_page_is_signed_and_in_the_journal(browser: Browser, home: SiteFolder) -> None:
    shown = browser.act("review", run="spots-survey").json["shown"]
    answer = browser.decide(shown)
    assert answer.json == {"state": APPROVED, "runs": ["spots-survey"]}
    review = Reviews(home.reviews).get("spots-survey")
    assert review is not None
    assert (review.state, review.by, review.reason, review.shown) == (APPROVED, "Anna Martin", "IRB 26-114", shown)
    entry = list(verify(home.journal))[-1]
    assert (entry["event"], entry["by"], entry["place"]) == ("approved by a person", "Anna Martin", "console")
    statement = {name: entry[name] for name in review.statement}
    key = site_keys.load(home.keys / "site.key")
    assert shared_journals.signed_by_key(key.public_key(), entry["signature"], signed_bytes(statement))


@pytest.mark.parametrize("state", [APPROVED, REFUSED])
def test_what_was_not_shown_is_not_decided(browser: Browser, home: SiteFolder, state: str) -> None:
    """The server swaps the study between reading and deciding: 3,000 rounds in place of 5."""
    shown = browser.act("review", run="spots-survey").json["shown"]
    Reviews(home.reviews).offer(survey(seeds=(0, 1), rounds=3000), ())
    answer = browser.decide(shown, state)
    assert answer.status == 409
    assert Reviews(home.reviews).get("spots-survey").state == WAITING  # type: ignore[union-attr]
    again = browser.act("review", run="spots-survey").json
    assert "3000 rounds" in json.dumps(again["sections"])
    assert browser.decide(again["shown"], state).status == 200


def test_reading_on_the_page_approves_nothing_on_the_command_line(browser: Browser, home: SiteFolder) -> None:
    browser.act("review", run="spots-survey")
    with pytest.raises(ValueError, match="nothing was shown to you"):
        Reviews(home.reviews).decide("spots-survey", APPROVED, "", "because")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"read": False}, "have read"),
        ({"read": "yes"}, "have read"),
        ({"by": " "}, "name"),
        ({"by": "A\nB"}, "name"),
        ({"reason": ""}, "reason"),
        ({"reason": "one\ntwo"}, "reason"),
        ({"reason": "x" * 501}, "at most 500"),
        ({"state": "waiting"}, "approves or refuses"),
        ({"state": None}, "must be text"),
        ({"shown": "abcd1234"}, "hash"),
        ({"shown": ["x"]}, "must be text"),
        ({"run": "../../etc"}, "no study called"),
    ],
)
def test_a_decision_is_complete(browser: Browser, home: SiteFolder, change: dict[str, Any], words: str) -> None:
    shown = browser.act("review", run="spots-survey").json["shown"]
    answer = browser.decide(**{"shown": shown, **change})
    assert answer.status in (400, 422)
    assert words in answer.json["error"]
    assert Reviews(home.reviews).get("spots-survey").state == WAITING  # type: ignore[union-attr]


def test_a_viewer_reads_and_cannot_decide(browser: Browser, home: SiteFolder) -> None:
    viewer = Browser(home, VIEWER)
    shown = viewer.act("review", run="spots-survey").json["shown"]
    for state in (APPROVED, REFUSED):
        assert viewer.decide(shown, state).status == 403
    assert Reviews(home.reviews).get("spots-survey").state == WAITING  # type: ignore[union-attr]


def test_what_the_policy_refuses_cannot_be_approved(browser: Browser, home: SiteFolder) -> None:
    Reviews(home.reviews).offer(survey(run="bad", seeds=(0, 1), rounds=6), ("too many rounds",))
    shown = browser.act("review", run="bad").json
    assert shown["problems"] == ["too many rounds"]
    assert browser.decide(shown["shown"], run="bad").status == 422
    assert browser.decide(shown["shown"], REFUSED, run="bad").status == 200


def test_a_study_that_waits_is_listed_once_with_its_runs(browser: Browser) -> None:
    state = browser.state()
    assert [(r["study"], r["runs"]) for r in state["waiting"]] == [("spots", ["spots-survey"])]
    assert state["connection"]["state"] == "not joined"


def test_what_left_is_added_up_by_kind(browser: Browser, home: SiteFolder) -> None:
    """Entries as ``site_agent`` writes them; entries that were changed hide no other."""
    from polyclinic.core.aggregates import PerSite, Reply, WeightedMean
    from polyclinic.engines.flare.client.training_worker import kinds_of

    journal = SharedJournal(home.journal)
    strange_fields: list[dict[str, Any]] = [{"bytes": "x"}, {"parts": {"a": "b"}}, {"parts": [1, {}]}, {"job": []}]
    for strange in strange_fields:
        journal.write("answered", {"run": "strange", "round": 0, "job": "train", "bytes": 0, **strange})
    for number in range(3):
        parts = kinds_of(Reply({"update": WeightedMean.of({"w": torch.ones(3)}, 2.0)}))
        journal.write("answered", {"run": "r", "round": number, "job": "train", "bytes": 100, "parts": parts})
    scores = kinds_of(Reply({"score": PerSite({"site-0": {"n": torch.ones(1)}})}))
    journal.write("answered", {"run": "r", "round": 2, "job": "score/val", "bytes": 7, "parts": scores})
    journal.write("secure sum", {"run": "r", "number": 5, "stage": "mask", "bytes": 11})
    left = browser.state()["left"]
    assert left["total"] == 318
    assert left["largest"] == 107
    mine = [row for row in left["rows"] if row["run"] == "r"]
    rows = {row["job"]: (row["times"], row["bytes"]) for row in mine}
    assert rows == {"train": (3, 300), "score/val": (1, 7), "secure sum: mask": (1, 11)}
    assert [row["parts"] for row in mine] == [{"update": "WeightedMean"}, {"score": "PerSite"}, {}]


def test_a_run_is_running_until_its_journal_says_that_it_ended(browser: Browser, home: SiteFolder) -> None:
    reviews = Reviews(home.reviews)
    reviews.remember(reviews.subject("spots-survey"))
    record_decision(home, "spots-survey", APPROVED, "IRB 26-114", "Anna Martin")
    journal = SharedJournal(home.journal)
    for events, running in (
        (("asked", "answered"), ["spots-survey"]),
        (("run ended",), []),
        (("memory of an ended run removed",), []),
        (("asked",), ["spots-survey"]),
        (("memory of a silent run removed",), []),
    ):
        for event in events:
            journal.write(event, {"run": "spots-survey"})
        assert [one["run"] for one in browser.state()["running"]] == running


def test_the_certificate_of_a_server_that_is_gone_is_not_shown_as_checked(
    home: SiteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = SitePage(home.path)
    page.settings = {**page.settings, "project": "spots"}
    shakes: list[bool] = []

    def probe(good: bool) -> None:
        def found(_: Any, shake: bool) -> list[tuple[str, bool, str]]:
            shakes.append(shake)
            return [("port", good, ""), *([("server", True, "")] if shake and good else [])]

        monkeypatch.setattr("polyclinic.console.site.diagnosis.probe", found)
        page._probed = 0.0
        page._probe()

    probe(True)
    probe(True)
    assert (shakes, len(page._handshake)) == ([True, False], 1)
    probe(False)
    assert (page._up(page._reachable), page._handshake) == (False, [])
    probe(True)
    assert (shakes[-1], len(page._handshake)) == (True, 1)


def test_a_changed_line_of_the_journal_is_shown(browser: Browser, home: SiteFolder) -> None:
    journal = SharedJournal(home.journal)
    for number in range(5):
        journal.write("asked", {"run": "r", "number": number})
    assert browser.state()["journal"]["broken"] == ""
    text = home.journal.read_text()
    home.journal.write_text(text.replace('"number":3', '"number":9'))
    other = Browser(home)
    assert "entry 4" in other.state()["journal"]["broken"]
    assert "4" in other.act("verify").json["problem"]
    home.journal.write_text(text)
    verified = Browser(home).act("verify").json
    assert (verified["good"], verified["count"]) == (True, 5)


def test_a_name_from_the_server_stays_text(home: SiteFolder) -> None:
    """Names are restricted; reasons and labels are not, and reach the page as JSON strings without control characters."""
    evil = "<img src=x onerror=alert(1)>"
    home.settings.write_text(home.settings.read_text() + f'organization = "{evil}"\n')
    Reviews(home.reviews).offer(survey(), (), (f"note {evil}\x1b[31m",))
    browser = Browser(home)
    shown = browser.act("review", run="spots-survey").json
    record_decision(home, "spots-survey", REFUSED, evil, evil)
    assert evil in json.dumps(shown["sections"])
    assert "\\u001b" not in json.dumps(shown["sections"])
    state = browser.state()
    assert state["decided"][0]["reason"] == evil
    assert evil.encode() not in request(browser.app, "GET", "/").body


def test_patients_are_counted_in_a_process_of_its_own(browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(browser.page.children, "start", lambda what, words, **more: started.append((what, words, more)))
    assert browser.act("count", run="spots-survey").json == {"done": False}
    (what, words, more), *_ = started
    assert (what, words[1], more["module"]) == (COUNT, "spots-survey", "polyclinic.console.local_data")
    request_hash = more["about"]
    browser.page._results[f"{COUNT} {request_hash}"] = {"time": 0.0, "result": {"patients": {}}, "error": ""}
    assert browser.act("count", run="spots-survey").json["done"] is True
    Reviews(SiteFolder(browser.page.home.path).reviews).offer(replace(survey(), data={"split": [0.5, 0.2, 0.3]}), ())
    assert browser.act("count", run="spots-survey").json == {"done": False}  # another request: counted again


def test_a_review_that_cannot_be_read_is_a_problem_and_hides_no_other(browser: Browser, home: SiteFolder) -> None:
    (home.reviews / "broken.json").write_text("{")
    state = browser.state()
    assert [p["run"] for p in state["problems"]] == ["broken"]
    assert [r["run"] for r in state["waiting"]] == ["spots-survey"]
    (home.reviews / "broken.json").unlink()
    assert browser.state()["problems"] == []


def test_a_forged_decision_is_not_shown_as_one(browser: Browser, home: SiteFolder) -> None:
    path = home.reviews / "spots-survey.json"
    path.write_text(path.read_text().replace('"state": "waiting"', '"state": "approved"'))
    assert [r["run"] for r in browser.state()["waiting"]] == ["spots-survey"]


def test_metrics_name_nobody(browser: Browser) -> None:
    browser.state()
    text = exposition(browser.page.metrics())
    assert "polyclinic_reviews_waiting 1" in text
    assert "polyclinic_journal_intact 1" in text
    for word in ("spots", "site-0", "survey"):
        assert word not in text


def test_the_page_changes_when_something_has_changed(browser: Browser, home: SiteFolder) -> None:
    watcher = browser.page.watch({})
    assert [name for name, _ in watcher.updates()] == ["state"]
    assert not browser.page.look()
    assert watcher.updates() == []
    Reviews(home.reviews).offer(survey(run="second"), ())
    assert browser.page.look()
    second = browser.page.watch({})
    assert len(watcher.updates()) == len(second.updates()) == 1  # each watcher sees each change


def test_the_page_imports_no_pytorch() -> None:
    code = (
        "import sys, polyclinic.console.site, polyclinic.console.app, polyclinic.console.serve; "
        "print([name for name in ('torch', 'numpy', 'monai', 'nvflare', 'scipy', 'pandas') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_tail_reads_whole_lines_and_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    tail = Tail(path)
    assert tail.more() == ([], False)
    path.write_bytes(b'{"a":1}\n{"a":')
    assert tail.more() == ([b'{"a":1}'], False)
    with path.open("ab") as file:
        file.write(b"2}\n")
    assert tail.more() == ([b'{"a":2}'], False)
    path.write_bytes(b'{"b":1}\n')
    assert tail.more() == ([b'{"b":1}'], True)
    (tmp_path / "y").write_bytes(b'{"c":1}\n{"c":2}\n{"c":3}\n')
    (tmp_path / "y").rename(path)
    assert tail.more() == ([b'{"c":1}', b'{"c":2}', b'{"c":3}'], True)


def test_a_long_file_is_read_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes((b'{"a":"' + b"x" * 1000 + b'"}\n') * (PIECE // 1000 + 10))
    tail, total, pieces = Tail(path), 0, 0
    while True:
        lines, _ = tail.more()
        total, pieces = total + len(lines), pieces + 1
        if not tail.behind:
            break
    assert pieces == 2
    assert total == PIECE // 1000 + 10


def test_a_journal_that_was_cut_and_written_anew_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    for name in "abc":
        SharedJournal(path).write(name)
    tail = JournalTail(path)
    assert len(tail.more()[0]) == 3
    path.unlink()
    SharedJournal(path).write("d")
    entries, anew = tail.more()
    assert ([e["event"] for e in entries], anew, tail.count, tail.broken) == (["d"], True, 1, "")
