"""What a person at a hospital reads before deciding, and what the commands then do."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from polyclinic.cli import site as commands
from polyclinic.core.atomic import write_private
from polyclinic.core.audit_log import verify
from polyclinic.engines.flare.client.decisions import signed_bytes
from polyclinic.engines.flare.client.reviews import APPROVED, REFUSED, WAITING, Reviews
from polyclinic.engines.flare.pki import site_keys
from polyclinic.engines.flare.protocol import shared_journals
from polyclinic.engines.flare.protocol.paths import SetupError, SiteFolder
from polyclinic.engines.flare.protocol.request_comparison import differences, kind
from polyclinic.engines.flare.protocol.run_request import RunRequest
from tests.engines.flare.test_approval import study, survey, surveyed
from tests.support.known import known
from tests.support.local_deployment import hospital, order, read_and_approve

Read = pytest.CaptureFixture[str]


@pytest.fixture
def home(tmp_path: Path) -> SiteFolder:
    return hospital(tmp_path, count=1)["site-0"]


def shown(home: SiteFolder, name: str, capsys: Read) -> str:
    capsys.readouterr()
    commands.review(name, home=home.path)
    return capsys.readouterr().out


def rehearsal(run: str = "rehearsal") -> RunRequest:
    plan = {**order().plan, "network": "mlp", "inputs": [4], "network_options": {}}
    return RunRequest(run, plan, data={"rehearsal": True}, score_every=1)


def test_a_survey_is_shown_as_what_it_is(home: SiteFolder, capsys: Read) -> None:
    """Nothing is trained: no change of a model, no number of times."""
    bare = RunRequest("ask", survey().plan, mode="survey")
    Reviews(home.reviews).offer(bare, ())
    text = shown(home, "ask", capsys)
    assert "a survey. Nothing is trained." in text
    assert "the shape of an" in text
    assert "number of patients, of examples and of each class" in text
    assert "counts below 5 are hidden; the number of classes, without their names" in text
    assert "change of the model" not in text
    assert "1 times" not in text
    assert "fedavg" not in text
    home.policy.write_text("[allow]\nclass_names = true\n[limits]\nmin_cell = 7\n")
    text = shown(home, "ask", capsys)
    assert "counts below 7 are hidden; the number of classes, with their names" in text


def test_a_study_is_shown_whole(home: SiteFolder, capsys: Read) -> None:
    one = study(
        "x",
        seeds=(0, 1),
        rounds=5,
        score_every=2,
        test="predict/test",
        sites_per_round=2,
        min_replies=2,
        deadline=60.0,
        best={"metric": "auc", "higher": True},
        identities={"site-0": "ab" * 32},
        data={"split": [0.5, 0.2, 0.3]},
    )
    whole = replace(
        survey(seeds=(0, 1), rounds=5),
        **{
            key: getattr(one, key)
            for key in (
                "score_every",
                "test",
                "sites_per_round",
                "min_replies",
                "deadline",
                "best",
                "identities",
                "data",
            )
        },
    )
    Reviews(home.reviews).offer(whole, ())
    text = shown(home, "spots", capsys)
    assert "One decision covers the whole study" in text
    assert "fedavg, seeds 0, 1, 5 rounds" in text
    assert "fedprox, seeds 0, 1, 5 rounds" in text
    assert "fedavg: the change of the model, in each of 5 rounds" in text
    assert "scores on validation data every 2 rounds" in text
    assert "each validation patient and each test patient" in text
    assert "each round asks 2 of the sites, drawn at random, and needs 2 usable replies" in text
    assert "after 60 seconds" in text
    assert "the round with the best auc" in text
    assert "keys for secure aggregation: site-0 abababababab" in text
    assert "the study asks for split = [0.5, 0.2, 0.3]" in text
    assert re.search(r"patients: \d+ train, \d+ val", text)
    assert f"request {whole.hash}" in text


def test_two_plans_under_one_label_are_both_shown(home: SiteFolder, capsys: Read) -> None:
    """A study that lists a harmless arm and another with the same label and another seed."""
    one = study("x")
    arm = one.study["arms"][0]
    wild = {"label": "fedavg", "plan": {**arm["plan"], "seed": 7, "training": {"lr": 9.5}}, "external": ["mallory"]}
    of = {**one.study, "arms": [*one.study["arms"], wild]}
    Reviews(home.reviews).offer(replace(survey(), study=of, external=("mallory",)), ())
    text = shown(home, "spots", capsys)
    assert "training.lr = 9.5" in text
    assert "fedavg, seed 0," in text
    assert "fedavg, seed 7," in text
    assert "fedavg is also scored at mallory, which does not train" in text


def test_what_differs_from_what_this_site_said_is_shown(home: SiteFolder, capsys: Read) -> None:
    reviews = surveyed(home)
    reviews.offer(study("spots-1", plan={"outputs": 20_000}), ())
    reviews.offer(study("spots-2", arm=1, plan={"outputs": 20_000}), ())
    text = shown(home, "spots", capsys)
    assert text.count("! outputs = 20000; the data here have 2 classes") == 2
    assert "spots-1: fedavg, seed 0; inputs = [1, 8, 8]; outputs = 20000" in text
    for run in ("spots-1", "spots-2"):
        assert re.search(rf"request {known(reviews.get(run)).what.hash}  {run}", text)


def test_a_rehearsal_says_so_and_opens_nothing(home: SiteFolder, capsys: Read) -> None:
    (home.path / "data").rename(home.path / "away")
    Reviews(home.reviews).offer(rehearsal(), ())
    text = shown(home, "rehearsal", capsys)
    assert "A REHEARSAL" in text
    assert "none are read: the data are synthetic" in text
    commands.review(home=home.path)
    assert "(synthetic data)" in capsys.readouterr().out
    commands.approve("rehearsal", reason="imaginary data", home=home.path)
    assert "(synthetic data)" in capsys.readouterr().out
    (entry,) = [e for e in verify(home.journal) if e["event"] == "approved by a person"]
    assert entry["rehearsal"] is True


def test_studies_are_compared_with_their_kind(home: SiteFolder, capsys: Read) -> None:
    """The first real study is not held against the rehearsal; the next one is, against the first."""
    reviews = Reviews(home.reviews)
    reviews.offer(rehearsal(), ())
    read_and_approve(home, "rehearsal")
    reviews.offer(survey(), ())
    assert "Compared with" not in shown(home, "spots", capsys)
    read_and_approve(home, "spots")
    reviews.offer(survey("next-survey", name="next", rounds=9), ())
    text = shown(home, "next", capsys)
    assert "Compared with spots" in text
    assert "differs in: all methods (1)" in text
    assert "    - rounds = 3\n    + rounds = 9" in text
    assert "the code is the same" in text
    reviews.offer(order(), ())
    assert "Compared with" not in shown(home, "run-1", capsys)


def test_differences_are_grouped() -> None:
    old, new = study("a"), study("b", rounds=4, data={"split": [0.5, 0.2, 0.3]}, min_replies=3)
    arms = [*new.study["arms"][:1], {"label": "fedsgd", "plan": {"method": "fedsgd", "seed": 0}}]
    found = differences(replace(new, study={**new.study, "arms": arms}), old)
    assert found == {
        "fedavg, seed 0": ["- rounds = 3", "+ rounds = 4"],
        "fedprox, seed 0": ["- the entire method"],
        "fedsgd, seed 0": ["+ the entire method"],
        "how it is run": ["- min_replies = 1", "+ min_replies = 3"],
        "the data": ["+ split = [0.5, 0.2, 0.3]"],
    }
    assert differences(old, study("another-name")) == {}
    both = differences(study("b", rounds=4, identities={"site-0": "ab"}), old)
    assert both == {"all methods": ["- rounds = 3", "+ rounds = 4"], "keys for secure sums": ['+ site-0 = "ab"']}
    single = differences(order(rounds=9), order())
    assert single == {"fedavg, seed 3": ["- rounds = 3", "+ rounds = 9"]}
    assert [kind(an) for an in (order(), study("x"), survey(), rehearsal())] == ["run", "study", "study", "rehearsal"]


def test_review_then_approve_is_signed_and_in_the_journal(home: SiteFolder, capsys: Read) -> None:
    Reviews(home.reviews).offer(order(), ())
    with pytest.raises(SetupError, match="not what you were shown"):
        commands.approve("run-1", reason="IRB 1", home=home.path)
    text = shown(home, "run-1", capsys)
    (hash,) = re.findall(r"^shown    ([0-9a-f]{16})$", text, re.MULTILINE)
    commands.approve("run-1", reason="IRB 1", by="Anna Berg", home=home.path)
    (entry,) = [e for e in verify(home.journal) if e["event"] == "approved by a person"]
    assert (entry["run"], entry["by"], entry["uid"], entry["reason"]) == ("run-1", "Anna Berg", os.getuid(), "IRB 1")
    assert entry["shown"].startswith(hash)
    review = known(Reviews(home.reviews).get("run-1"))
    statement = {key: entry[key] for key in review.statement}
    key = site_keys.load(home.keys / "site.key")
    assert shared_journals.signed_by(key, entry["signature"], signed_bytes(statement))
    assert not shared_journals.signed_by(key, entry["signature"], signed_bytes({**statement, "by": "somebody"}))
    commands.refuse("run-1", reason="no", home=home.path)
    assert known(Reviews(home.reviews).get("run-1")).state == REFUSED
    assert [e["state"] for e in verify(home.journal) if "by a person" in e["event"]] == [APPROVED, REFUSED]


def test_a_script_approves_by_the_hash_that_was_printed(home: SiteFolder, capsys: Read) -> None:
    Reviews(home.reviews).offer(order(), ())
    (hash,) = re.findall(r"^shown    (\w+)$", shown(home, "run-1", capsys), re.MULTILINE)
    Reviews(home.reviews).offer(order(rounds=2000), ())
    with pytest.raises(SetupError, match="not what you were shown"):
        commands.approve("run-1", reason="IRB", hash=hash, home=home.path)
    assert known(Reviews(home.reviews).get("run-1")).state == WAITING


def test_the_list_of_what_waits_is_no_reading(home: SiteFolder, capsys: Read) -> None:
    Reviews(home.reviews).offer(order(), ())
    commands.review(home=home.path)
    assert "run-1" in capsys.readouterr().out
    with pytest.raises(SetupError, match="nothing was shown to you under this name"):
        commands.approve("run-1", reason="IRB", home=home.path)


def test_a_study_that_contradicts_the_hospitals_table_is_not_approved(home: SiteFolder, capsys: Read) -> None:
    data = home.path / "data"
    for path in data.iterdir():
        path.unlink()
    (data / "data.toml").write_text('kind = "npz"\npath = "x.npz"\nsplit = [0.6, 0.2, 0.2]\n')
    Reviews(home.reviews).offer(order(data={"split": [0.5, 0.2, 0.3]}), ())
    text = shown(home, "run-1", capsys)
    assert "patients: unknown" in text
    with pytest.raises(SetupError, match=r"the study asks for \[0\.5, 0\.2, 0\.3\], and data\.toml here says"):
        commands.approve("run-1", reason="IRB", home=home.path)
    assert known(Reviews(home.reviews).get("run-1")).state == WAITING


def test_refused_keys_and_the_hospitals_own_findings_are_shown(home: SiteFolder, capsys: Read) -> None:
    reviews = Reviews(home.reviews)
    reviews.offer(order(data={"label": "postcode"}), ("the study sets label",))
    reviews.note_data("run-1", "/srv/data is not there")
    text = shown(home, "run-1", capsys)
    assert '! the study sets label = "postcode" of the data, which only the hospital sets, in data.toml' in text
    assert "! /srv/data is not there" in text
    assert "Refused by this site, whatever a person decides\n  the study sets label" in text
    assert "polyclinic site approve" not in text
    capsys.readouterr()
    commands.status(home=home.path)
    assert "! /srv/data is not there" in capsys.readouterr().out


def test_what_comes_from_the_server_cannot_write_on_the_terminal(home: SiteFolder, capsys: Read) -> None:
    plan = {
        **order().plan,
        "sites": ["site-0", "a\x1b[2Jb"],
        "method": "fed\x1bavg",
        "options": {"x": "\x1b[2J" + "y" * 9000},
    }
    Reviews(home.reviews).offer(RunRequest("run-1", plan, data={"k\x1b[0m": 1}), ("p\x1b[1m",), ("n\x07",))
    text = shown(home, "run-1", capsys)
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "y" * 9000 in text, "nothing of what would be approved is cut off"


def test_a_method_that_is_not_installed_can_be_reviewed(home: SiteFolder, capsys: Read) -> None:
    Reviews(home.reviews).offer(order("nonsense"), ("it cannot be built here",))
    assert "unknown, because this method is not installed here" in shown(home, "run-1", capsys)


def test_one_run_is_shown_with_its_own_hashes(home: SiteFolder, capsys: Read) -> None:
    reviews = Reviews(home.reviews)
    review = reviews.offer(order(test="score/test"), ())
    text = shown(home, "run-1", capsys)
    assert f"method  {review.what.method_hash}" in text
    assert f"code    {review.code}" in text
    assert "at the end scores on test data" in text
    assert "One decision" not in text
    path = home.reviews / "run-1.json"
    write_private(
        path, json.dumps({**json.loads(path.read_text()), "code": "0" * 64, "packages": [["p", "1", "a" * 64]]})
    )
    text = shown(home, "run-1", capsys)
    assert "the code here has changed since this study arrived" in text
    assert f"package p==1@{'a' * 64}" in text
