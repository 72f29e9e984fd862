"""What an approval binds: the content as read, once, by a person, signed by the site; and what the agent does with it."""

import json
import os
import pwd
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from polyclinic.core.atomic import write_private
from polyclinic.core.audit_log import verify
from polyclinic.core.method import Request
from polyclinic.core.plugin_packages import Package
from polyclinic.engines.flare.client.decisions import Review, read, shown_hash, signed_bytes, this_person, to_json
from polyclinic.engines.flare.client.reviews import APPROVED, REFUSED, WAITING, Reviews, _unlike
from polyclinic.engines.flare.client.site_agent import take_in
from polyclinic.engines.flare.client.training_worker import Training
from polyclinic.engines.flare.pki import site_keys
from polyclinic.engines.flare.protocol import run_request as orders
from polyclinic.engines.flare.protocol import shared_journals, tensor_file
from polyclinic.engines.flare.protocol.messages import VERSION, Call
from polyclinic.engines.flare.protocol.paths import SetupError, SiteFolder
from polyclinic.engines.flare.protocol.run_request import RunRequest
from tests.support.known import known
from tests.support.local_deployment import Inline, LocalCarrier, hospital, order, read_and_approve

SHAPE = {"inputs": [1, 8, 8], "outputs": 2}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys, which take long to make: short ones."""
    folder = tmp_path_factory.mktemp("keys") / "keys"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(site_keys, "BITS", 1024)
        site_keys.make(folder)
    return folder


@pytest.fixture
def home(made: Path, tmp_path: Path) -> SiteFolder:
    shutil.copytree(made, tmp_path / "site" / "keys")
    return SiteFolder(tmp_path / "site")


def study(
    run: str, arm: int = 0, rounds: int = 3, seeds: tuple[int, ...] = (0,), name: str = "spots", **changes: Any
) -> RunRequest:
    """One run of a study of FedAvg and FedProx; ``changes`` of the run's plan go in ``plan``."""
    base = {k: v for k, v in order(rounds=rounds).plan.items() if k not in SHAPE}
    arms: list[dict[str, Any]] = [
        {"label": label, "plan": {**base, "method": label, "seed": seed}}
        for label in ("fedavg", "fedprox")
        for seed in seeds
    ]
    plan = {**arms[arm]["plan"], **SHAPE, **changes.pop("plan", {})}
    fields = {"label": arms[arm]["label"], "study": {"name": name, "hash": "ab", "arms": arms}, **changes}
    return RunRequest.from_json(json.dumps({"run": run, "plan": plan, **fields}))


def survey(run: str = "spots-survey", **how: Any) -> RunRequest:
    one = study("x", **how)
    plan = orders.survey_plan(one.plan["sites"])
    return RunRequest.from_json(json.dumps({"run": run, "plan": plan, "mode": "survey", "study": one.study}))


def surveyed(home: SiteFolder, said: dict[str, Any] = SHAPE) -> Reviews:
    """A site whose person has approved the study, and which has answered its survey."""
    reviews = Reviews(home.reviews)
    reviews.offer(survey(), ())
    read_and_approve(home, "spots")
    reviews.answered(survey(), dict(said))
    return reviews


# What was read --------------------------------------------------------------------------------------------------------


def test_nothing_is_approved_that_was_not_shown(home: SiteFolder) -> None:
    reviews = Reviews(home.reviews)
    reviews.offer(order(), ())
    with pytest.raises(SetupError, match=r"not what you were shown.*read it again: `polyclinic site review run-1`"):
        reviews.decide("run-1", APPROVED, "anna", "IRB")
    assert known(reviews.get("run-1")).state == WAITING
    reviews.remember(reviews.subject("run-1"))
    (done,) = reviews.decide("run-1", APPROVED, "anna", "IRB")
    assert done.state == known(reviews.get("run-1")).state == APPROVED


@pytest.mark.parametrize(
    "change", [{"rounds": 3000}, {"test": "predict/test"}, {"data": {"split": [0.5, 0.1, 0.4]}}, {"plan": {"seed": 9}}]
)
def test_what_changed_after_it_was_read_is_not_approved(home: SiteFolder, change: dict[str, Any]) -> None:
    """The server offers the same run again, with other content, between reading and approving."""
    reviews = Reviews(home.reviews)
    reviews.offer(order(), ())
    reviews.remember(reviews.subject("run-1"))
    reviews.offer(order(**change), ())
    with pytest.raises(SetupError, match="not what you were shown: it has changed since"):
        reviews.decide("run-1", APPROVED, "anna", "IRB")
    assert known(reviews.get("run-1")).state == WAITING


def test_what_is_put_back_after_it_was_swapped_is_read_again(home: SiteFolder) -> None:
    """Only what was shown last counts, not what was shown before that."""
    reviews = Reviews(home.reviews)
    first, second = order(), order(rounds=2000)
    for an in (first, second):
        reviews.offer(an, ())
        reviews.remember(reviews.subject("run-1"))
    reviews.offer(first, ())
    with pytest.raises(SetupError, match="has changed since"):
        reviews.decide("run-1", APPROVED, "anna", "IRB")


@pytest.mark.parametrize("what", ["problems", "notes", "code", "packages"])
def test_the_hash_of_what_is_shown_covers_everything_that_is_shown(home: SiteFolder, what: str) -> None:
    reviews = Reviews(home.reviews)
    review = reviews.offer(order(), ())
    changes: dict[str, Any] = {
        "problems": ("x",),
        "notes": ("x",),
        "code": "0" * 64,
        "packages": (("a", "1", "0" * 64),),
    }
    assert replace(review, **{what: changes[what]}).hash != review.hash
    assert replace(review, order=order(rounds=4).to_json()).hash != review.hash


def test_a_script_approves_by_hash_and_only_that(home: SiteFolder) -> None:
    reviews = Reviews(home.reviews)
    reviews.offer(order(), ())
    shown = shown_hash(reviews.subject("run-1"))
    for wrong in ("0" * 16, shown[:7], shown[1:], shown + "0"):
        with pytest.raises(SetupError, match="not what you were shown"):
            reviews.decide("run-1", APPROVED, "anna", "IRB", wrong)
    (done,) = reviews.decide("run-1", APPROVED, "anna", "IRB", shown[:8])
    assert done.shown == shown


def test_a_name_of_two_studies_approves_neither_and_lists_both(home: SiteFolder) -> None:
    reviews = Reviews(home.reviews)
    reviews.offer(study("zz-other", rounds=2000), ())
    reviews.offer(study("spots-1"), ())
    acts: tuple[Callable[[], object], ...] = (
        lambda: reviews.subject("spots"),
        lambda: reviews.decide("spots", APPROVED, "anna", "IRB"),
        lambda: reviews.decide("spots", REFUSED, "anna", "IRB"),
    )
    for act in acts:
        with pytest.raises(SetupError, match="'spots' is the name of 2 different studies:") as told:
            act()
        assert [line.split()[0] for line in str(told.value).splitlines()] == ["'spots'", "zz-other", "spots-1", "name"]
    read_and_approve(home, "spots-1")
    assert {r.what.run: r.state for r in reviews.all()} == {"spots-1": APPROVED, "zz-other": WAITING}
    by_hash = known(reviews.get("zz-other")).what.hash
    assert reviews.subject(by_hash[:8]) == [reviews.get("zz-other")]
    with pytest.raises(SetupError, match="no study called"):
        reviews.subject(by_hash[:7])
    read_and_approve(home, by_hash[:12])
    assert known(reviews.get("zz-other")).state == APPROVED


def test_a_study_that_takes_the_name_of_another_is_not_approved_with_it(home: SiteFolder) -> None:
    """It was read under this name, and then another study has replaced it."""
    reviews = Reviews(home.reviews)
    reviews.offer(study("spots-1"), ())
    reviews.remember(reviews.subject("spots"))
    reviews.offer(study("spots-1", rounds=2000), ())
    with pytest.raises(SetupError, match="has changed since"):
        reviews.decide("spots", APPROVED, "anna", "IRB")


def test_a_run_that_came_after_reading_is_read_too(home: SiteFolder) -> None:
    reviews = Reviews(home.reviews)
    reviews.offer(survey(), ())
    reviews.remember(reviews.subject("spots"))
    reviews.offer(study("spots-1"), ())
    with pytest.raises(SetupError, match="has changed since"):
        reviews.decide("spots", APPROVED, "anna", "IRB")
    read_and_approve(home, "spots")
    assert {r.state for r in reviews.all()} == {APPROVED}


@pytest.mark.parametrize("slow", ["_taking_part", "_put"])
def test_a_refusal_and_an_offer_at_the_same_moment_do_not_cross(
    home: SiteFolder, monkeypatch: pytest.MonkeyPatch, slow: str
) -> None:
    """The agent finds the study approved, a person refuses it, and only then the agent writes: it must not win."""
    reviews, begun = surveyed(home), threading.Event()
    whole = getattr(Reviews, slow)

    def slowly(self: Reviews, review: Review) -> Review | None:
        begun.set()
        time.sleep(0.3)
        return whole(self, review)

    monkeypatch.setattr(Reviews, slow, slowly)
    offer = threading.Thread(target=lambda: reviews.offer(study("spots-1"), ()))
    offer.start()
    assert begun.wait(10)
    monkeypatch.undo()
    Reviews(home.reviews).decide("spots", REFUSED, "anna", "the committee met")
    offer.join()
    assert {r.what.run: r.state for r in reviews.all()} == {"spots-survey": REFUSED, "spots-1": REFUSED}


def test_an_offer_waits_while_a_person_decides(home: SiteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checked and written under one lock: what is offered meanwhile is not approved, and not lost."""
    reviews, checked = Reviews(home.reviews), threading.Event()
    reviews.offer(order(), ())
    reviews.remember(reviews.subject("run-1"))
    whole = Reviews._check_shown

    def slowly(self: Reviews, *given: Any) -> str:
        found = whole(self, *given)
        checked.set()
        time.sleep(0.3)
        return found

    monkeypatch.setattr(Reviews, "_check_shown", slowly)
    person = threading.Thread(target=lambda: reviews.decide("run-1", APPROVED, "anna", "IRB"))
    person.start()
    assert checked.wait(10)
    Reviews(home.reviews).offer(order(rounds=3000), ())
    person.join()
    last = known(reviews.get("run-1"))
    assert (last.what.plan["rounds"], last.state) == (3000, WAITING)


# One approval, finite runs --------------------------------------------------------------------------------------------


def test_an_arm_runs_once_under_one_name(home: SiteFolder) -> None:
    reviews = surveyed(home)
    assert reviews.offer(study("spots-1"), ()).state == APPROVED
    assert reviews.offer(study("spots-2", arm=1), ()).state == APPROVED
    again = reviews.offer(study("again"), ())
    assert again.state == WAITING
    assert again.notes == ("this method run was already executed as spots-1",)
    assert reviews.offer(study("spots-1"), ()).state == APPROVED  # the same run, offered again by an honest server
    read_and_approve(home, "again")
    third = reviews.offer(study("third"), ())
    assert third.state == WAITING
    assert third.notes == (
        "this method run was already executed as spots-1",
        "this method run was already executed as again",
    )
    read_and_approve(home, "third")
    read_and_approve(home, "spots")  # all of it once more, which is noted once
    parts = json.loads((home.reviews / "records" / "parts").read_text())
    assert sorted(len(taken) for taken in parts.values()) == [1, 1, 3]


def test_a_survey_is_answered_once(home: SiteFolder) -> None:
    reviews = surveyed(home)
    again = reviews.offer(survey("another-survey"), ())
    assert again.state == WAITING
    assert again.notes == ("this survey was already executed as spots-survey",)
    assert reviews.offer(survey(), ()).state == APPROVED


def test_each_seed_of_a_method_is_an_arm(home: SiteFolder) -> None:
    reviews, seeds = Reviews(home.reviews), (0, 1)
    reviews.offer(survey(seeds=seeds), ())
    read_and_approve(home, "spots")
    reviews.answered(survey(seeds=seeds), dict(SHAPE))
    for i in range(4):
        assert reviews.offer(study(f"spots-{i}", arm=i, seeds=seeds), ()).state == APPROVED
    assert reviews.offer(study("spots-9", arm=1, seeds=seeds), ()).state == WAITING


def test_a_runs_name_belongs_to_one_order(home: SiteFolder) -> None:
    """A server that puts one method run in another's place, and back, to have it trained for ever."""
    reviews = surveyed(home)
    assert reviews.offer(study("spots-1"), ()).state == APPROVED
    swapped = reviews.offer(study("spots-1", arm=1), ())
    assert swapped.state == WAITING
    assert swapped.notes == ("another run request was already executed under the name spots-1",)
    assert reviews.offer(study("spots-2"), ()).notes == ("this method run was already executed as spots-1",)


@pytest.mark.parametrize(
    ("said", "plan", "note"),
    [
        (SHAPE, {"outputs": 20_000}, "outputs = 20000; the data here have 2 classes"),
        (SHAPE, {"outputs": 1}, "outputs = 1; the data here have 2 classes"),
        (SHAPE, {"inputs": [1, 64, 64]}, "inputs = [1, 64, 64]; the data here are [1, 8, 8]"),
        ({**SHAPE, "outputs": 3}, {}, "outputs = 2; the data here have 3 classes"),
    ],
)
def test_what_the_data_are_is_what_this_site_said(
    home: SiteFolder, said: dict[str, Any], plan: dict[str, Any], note: str
) -> None:
    reviews = surveyed(home, said)
    filled = reviews.offer(study("spots-1", plan=plan), ())
    assert filled.state == WAITING
    assert filled.notes == (note,)
    read_and_approve(home, "spots-1")
    assert known(reviews.get("spots-1")).state == APPROVED  # a person may allow it
    assert reviews.offer(study("spots-2", arm=1, plan=plan), ()).state == WAITING  # and only this run


def test_without_an_answer_to_the_survey_nothing_confirms_the_data(home: SiteFolder) -> None:
    reviews = Reviews(home.reviews)
    reviews.offer(survey(), ())
    read_and_approve(home, "spots")
    waiting = reviews.offer(study("spots-1"), ())
    assert waiting.state == WAITING
    assert "this site has answered no survey" in waiting.notes[0]
    reviews.answered(study("spots-1"), dict(SHAPE))  # it was not approved: its answer does not count
    assert reviews.offer(study("spots-2", arm=1), ()).state == WAITING


def test_a_study_that_says_what_the_data_are_needs_no_survey(home: SiteFolder) -> None:
    base = order().plan
    arms: list[dict[str, Any]] = [
        {"label": label, "plan": {**base, "method": label}} for label in ("fedavg", "fedprox")
    ]
    of = {"name": "spots", "hash": "ab", "arms": arms}
    first, second = (RunRequest(f"spots-{i}", arm["plan"], label=arm["label"], study=of) for i, arm in enumerate(arms))
    reviews = Reviews(home.reviews)
    reviews.offer(first, ())
    read_and_approve(home, "spots")
    assert reviews.offer(second, ()).state == APPROVED
    assert known(reviews.get("spots-1")).of == "spots-0"
    assert reviews.offer(replace(second, run="third", plan={**second.plan, "outputs": 3}), ()).state == WAITING


@pytest.mark.parametrize(
    "change",
    [
        {"external": ["mallory"]},
        {"identities": {"site-0": "00" * 32}},
        {"test": "predict/test"},
        {"score_every": 1},
        {"data": {"split": [0.1, 0.1, 0.8]}},
        {"min_replies": 2},
        {"deadline": 9.0},
        {"sites_per_round": 1},
        {"best": {"metric": "auc", "higher": True}},
        {"patience": 9.0},
        {"mode": "buffered"},
        {"label": "fedprox"},
        {"plan": {"rounds": 4}},
        {"plan": {"seed": 1}},
        {"plan": {"training": {"lr": 9.0}}},
        {"plan": {"sites": ["site-0"]}},
        {"plan": {"network": "mlp"}},
        {"plan": {"method": "fedsgd"}},
    ],
)
def test_an_approval_covers_nothing_else(home: SiteFolder, change: dict[str, Any]) -> None:
    reviews = surveyed(home)
    assert reviews.offer(study("other", **change), ()).state == WAITING


@pytest.mark.parametrize(
    "change", [{"plan": {"sites": ["site-0"]}}, {"external": ("osaka",)}, {"label": "x"}, {"plan": {"rounds": 2}}]
)
def test_a_survey_is_the_one_of_its_study(home: SiteFolder, change: dict[str, Any]) -> None:
    plan = {**survey().plan, **change.pop("plan", {})} if "plan" in change else survey().plan
    assert survey().of_study
    assert not replace(survey(), **{**change, "plan": plan}).of_study


def test_external_sites_are_part_of_the_arm(home: SiteFolder) -> None:
    one = study("spots-1")
    arms = [{**arm, "external": ["osaka"]} if arm["label"] == "fedavg" else arm for arm in one.study["arms"]]
    of = {**one.study, "arms": arms}
    assert replace(one, study=of, external=("osaka",)).of_study
    assert not replace(one, study=of).of_study
    assert not replace(study("x", arm=1), study=of, external=("osaka",)).of_study
    whole = replace(survey(), study=of)
    assert replace(whole, external=("osaka",)).of_study
    assert not whole.of_study


def test_a_refusal_is_of_the_whole_study_and_of_what_comes_later(home: SiteFolder) -> None:
    reviews = surveyed(home)
    reviews.offer(study("spots-1"), ())
    done = reviews.decide("spots", REFUSED, "anna", "the committee met")
    assert {r.what.run: r.state for r in done} == {"spots-survey": REFUSED, "spots-1": REFUSED}
    late = reviews.offer(study("spots-2", arm=1), ())
    assert (late.state, late.by, late.reason) == (REFUSED, "anna", "the committee met")
    read_and_approve(home, "spots")  # everything was refused, so everything is shown and approved
    assert {r.state for r in reviews.all()} == {APPROVED}


def test_a_study_that_the_policy_refuses_is_not_approved_by_its_kin(home: SiteFolder) -> None:
    reviews = surveyed(home)
    assert reviews.offer(study("spots-1"), ("too many rounds",)).state == WAITING
    reviews.remember(reviews.subject("spots"))
    with pytest.raises(SetupError, match="too many rounds"):
        reviews.decide("spots", APPROVED, "anna", "IRB")


def test_other_code_is_another_study(home: SiteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    from polyclinic.engines.flare.client import decisions
    from polyclinic.engines.flare.client import reviews as module

    reviews = Reviews(home.reviews)
    reviews.offer(order(), ())
    reviews.remember(reviews.subject("run-1"))
    for one in (module, decisions):
        monkeypatch.setattr(one, "code_hash", lambda: "1" * 64)
    with pytest.raises(SetupError, match="polyclinic was changed here"):
        reviews.decide("run-1", APPROVED, "anna", "IRB")
    monkeypatch.undo()
    read_and_approve(home, "run-1")
    assert known(reviews.current(order())).state == APPROVED
    for one in (module, decisions):
        monkeypatch.setattr(one, "code_hash", lambda: "1" * 64)
    assert reviews.current(order()) is None
    assert reviews.offer(order(), ()).state == WAITING


# Signatures -----------------------------------------------------------------------------------------------------------


def test_who_decided_is_typed_and_known_to_the_system(home: SiteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SUDO_USER", "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "mallory")
    reviews, account = Reviews(home.reviews), pwd.getpwuid(os.getuid()).pw_name
    reviews.offer(order(), ())
    reviews.remember(reviews.subject("run-1"))
    (done,) = reviews.decide("run-1", APPROVED, "Dr. Anna Berg", "IRB")
    assert (done.by, done.account, done.uid) == ("Dr. Anna Berg", account, os.getuid())
    reviews.remember(reviews.subject("run-1"))
    (done,) = reviews.decide("run-1", APPROVED, "", "IRB")
    assert done.by == account
    for bad in ({"by": "a\nb"}, {"by": "x" * 101}, {"reason": "a\x1b[2J"}, {"reason": "x" * 2001}):
        with pytest.raises(SetupError, match="on one line"):
            reviews.decide("run-1", REFUSED, **{"by": "anna", "reason": "IRB", **bad})


FORGED = {
    "state": "approved",
    "by": "somebody else",
    "account": "mallory",
    "uid": 12345,
    "reason": "other",
    "shown": "0" * 64,
    "decided": "2020-01-01T00:00:00+00:00",
    "of": "x",
    "code": "0" * 64,
    "packages": [["evil", "1", "0" * 64]],
    "order": order(rounds=9).to_json(),
    "said": {"inputs": [1], "outputs": 9},
    "signature": "AAAA",
}


@pytest.mark.parametrize("field", FORGED)
def test_an_edited_file_is_no_decision(home: SiteFolder, field: str) -> None:
    reviews = Reviews(home.reviews)
    reviews.offer(order(), ())
    if field != "state":
        read_and_approve(home, "run-1")
        assert known(reviews.get("run-1")).state == APPROVED
    path = home.reviews / "run-1.json"
    table = {**json.loads(path.read_text()), field: FORGED[field]}
    write_private(path, json.dumps(table))
    found = known(reviews.get("run-1"))
    assert found.state == WAITING
    assert "not signed by this site's key" in found.notes[-1]
    assert found.said == {}


def test_a_decision_for_one_run_is_none_for_another(home: SiteFolder) -> None:
    reviews = Reviews(home.reviews)
    reviews.offer(order(), ())
    read_and_approve(home, "run-1")
    shutil.copy(home.reviews / "run-1.json", home.reviews / "run-2.json")
    with pytest.raises(SetupError, match="another run"):
        reviews.get("run-2")
    (home.reviews / "run-2.json").unlink()
    reviews.offer(order(run="run-2"), ())
    signed, other = (json.loads((home.reviews / f"run-{i}.json").read_text()) for i in (1, 2))
    moved = {**signed, "order": other["order"]}
    write_private(home.reviews / "run-2.json", json.dumps(moved))
    assert known(reviews.get("run-2")).state == WAITING


def test_a_forged_answer_to_a_survey_confirms_nothing(home: SiteFolder) -> None:
    """Neither in a file that was not approved, nor in one that was."""
    reviews = Reviews(home.reviews)
    reviews.offer(survey(), ())
    path = home.reviews / "spots-survey.json"
    write_private(path, json.dumps({**json.loads(path.read_text()), "said": {**SHAPE, "outputs": 9}}))
    assert known(reviews.get("spots-survey")).said == {}


def test_another_sites_signature_is_none(home: SiteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site_keys, "BITS", 1024)
    reviews = Reviews(home.reviews)
    reviews.offer(order(), ())
    read_and_approve(home, "run-1")
    shutil.rmtree(home.keys)
    site_keys.make(home.keys)
    assert known(reviews.get("run-1")).state == WAITING
    (home.keys / "site.key").unlink()
    assert known(reviews.get("run-1")).state == WAITING
    reviews.remember(reviews.subject("run-1"))
    with pytest.raises(SetupError, match=r"site\.key is missing"):
        reviews.decide("run-1", APPROVED, "anna", "IRB")


def test_a_decision_outlives_new_keys_by_the_certificates_that_the_site_had(
    home: SiteFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cryptography.hazmat.primitives.serialization import Encoding

    from polyclinic.engines.flare.pki.certificate_authority import Authority

    monkeypatch.setattr(site_keys, "BITS", 1024)
    reviews = Reviews(home.reviews)
    reviews.offer(order(), ())
    read_and_approve(home, "run-1")
    public = site_keys.load(home.keys / "site.key").public_key()
    certificate = Authority.make(tmp_path / "ca", "demo").issue(public, "lyon", "hospital")
    home.certificates.mkdir()
    (home.certificates / "1.crt").write_bytes(certificate.public_bytes(Encoding.PEM))
    shutil.rmtree(home.keys)
    site_keys.make(home.keys)
    assert known(reviews.get("run-1")).state == APPROVED


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"order": 3}', "null", '{"packages": 3}'])
def test_a_damaged_review_is_told(home: SiteFolder, text: str) -> None:
    reviews = Reviews(home.reviews)
    (home.reviews / "run-1.json").write_text(text)
    with pytest.raises(SetupError, match=r"run-1\.json"):
        reviews.get("run-1")


def test_the_states_in_a_file_are_words_that_other_versions_read(home: SiteFolder) -> None:
    reviews, path = Reviews(home.reviews), home.reviews / "run-1.json"
    reviews.offer(order(), ())
    assert json.loads(path.read_text())["state"] == "waiting"
    for state, word in ((REFUSED, "refused"), (APPROVED, "approved")):
        reviews.remember(reviews.subject("run-1"))
        reviews.decide("run-1", state, "anna", "IRB")
        assert json.loads(path.read_text())["state"] == word


def test_a_review_survives_its_file(home: SiteFolder) -> None:
    reviews = surveyed(home)
    review = known(reviews.get("spots-survey"))
    assert review.said == SHAPE
    assert read(home.reviews / "spots-survey.json") == review


# What is recorded -----------------------------------------------------------------------------------------------------


def test_what_another_account_was_shown_does_not_count(home: SiteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    reviews = Reviews(home.reviews)
    reviews.offer(order(), ())
    reviews.remember(reviews.subject("run-1"))
    mine = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: mine + 4321)
    with pytest.raises(SetupError, match="nothing was shown to you under this name yet"):
        reviews.decide("run-1", APPROVED, "anna", "IRB")


def test_what_was_shown_under_one_name_is_kept_when_another_is_shown(home: SiteFolder) -> None:
    reviews = Reviews(home.reviews)
    for run in ("run-1", "run-2"):
        reviews.offer(order(run=run), ())
        assert reviews.remember(reviews.subject(run)) == shown_hash(reviews.subject(run))
    for run in ("run-1", "run-2"):
        (done,) = reviews.decide(run, APPROVED, "anna", "IRB")
        assert (done.what.run, done.shown) == (run, shown_hash([known(reviews.get(run))]))


def test_names_of_runs_that_are_gone_are_forgotten(home: SiteFolder) -> None:
    reviews = Reviews(home.reviews)
    for run in ("run-1", "run-2"):
        reviews.offer(order(run=run), ())
        reviews.remember(reviews.subject(run))
    (home.reviews / "run-1.json").unlink()
    reviews.remember(reviews.subject("run-2"))
    reviews.offer(order(), ())
    with pytest.raises(SetupError, match="nothing was shown to you under this name yet"):
        reviews.decide("run-1", APPROVED, "anna", "IRB")


def test_a_study_that_was_read_under_its_name_is_approved_by_the_name_of_its_run_or_hash(home: SiteFolder) -> None:
    for name in ("spots", "spots-survey", survey().hash[:16]):
        reviews = Reviews(home.reviews)
        reviews.offer(survey(), ())
        reviews.remember(reviews.subject("spots"))
        (done,) = reviews.decide(name, APPROVED, "anna", "IRB")
        assert done.state == APPROVED
        (home.reviews / "spots-survey.json").unlink()


def test_what_waits_is_named_where_a_name_is_not_known(home: SiteFolder) -> None:
    reviews = Reviews(home.reviews)
    with pytest.raises(SetupError, match="no study called 'spots' has come; nothing waits"):
        reviews.subject("spots")
    for run in ("run-1", "run-2", "run-3"):
        reviews.offer(order(run=run), ())
    read_and_approve(home, "run-2")
    with pytest.raises(SetupError, match="no study called 'spots' has come; run-1, run-3 waits"):
        reviews.subject("spots")


def test_reviews_are_in_the_order_of_decisions_and_arrivals(home: SiteFolder) -> None:
    reviews = Reviews(home.reviews)
    for run in ("run-3", "run-1", "run-2"):
        reviews.offer(order(run=run), ())
    assert [r.what.run for r in reviews.all()] == ["run-3", "run-1", "run-2"]
    read_and_approve(home, "run-3")
    assert [r.what.run for r in reviews.all()] == ["run-1", "run-2", "run-3"]


def test_a_run_that_waited_or_was_refused_was_not_executed(home: SiteFolder) -> None:
    """Its name may come again with another run request, which is a question of its own."""
    reviews = Reviews(home.reviews)
    reviews.offer(order(), ())
    assert reviews.offer(order(rounds=4), ()).notes == ()
    reviews.decide("run-1", REFUSED, "anna", "no")
    again = reviews.offer(order(rounds=5), ())
    assert (again.state, again.notes) == (WAITING, ())
    read_and_approve(home, "run-1")
    assert reviews.offer(order(rounds=6), ()).notes == (
        "another run request was already executed under the name run-1",
    )


def test_a_run_takes_its_part_once_however_often_it_comes(home: SiteFolder) -> None:
    """The policy refuses it for a while, and then the same run is as it was."""
    reviews = surveyed(home)
    assert reviews.offer(study("spots-1"), ()).state == APPROVED
    refused = reviews.offer(study("spots-1"), ("too many rounds",))
    assert (refused.state, refused.notes) == (WAITING, ())
    again = reviews.offer(study("spots-1"), ())
    assert (again.state, again.notes) == (APPROVED, ())


def test_a_review_that_is_deleted_while_all_are_read_is_left_out(home: SiteFolder) -> None:
    """A link to a file that is gone is listed, as is a file that goes away after it was listed."""
    reviews = Reviews(home.reviews)
    reviews.offer(order(), ())
    (home.reviews / "run-2.json").symlink_to(home.reviews / "gone")
    assert [r.what.run for r in reviews.all()] == ["run-1"]


def test_runs_without_a_study_are_decided_one_by_one(home: SiteFolder) -> None:
    reviews = Reviews(home.reviews)
    for run in ("run-1", "run-2"):
        reviews.offer(order(run=run), ())
    assert [r.what.run for r in reviews.decide("run-1", REFUSED, "anna", "no")] == ["run-1"]
    assert known(reviews.get("run-2")).state == WAITING
    read_and_approve(home, "run-2")
    third = reviews.offer(order(run="run-3"), ())
    assert (third.state, third.notes) == (WAITING, ())


def test_the_same_order_offered_again_stands_as_it_was(home: SiteFolder) -> None:
    reviews = Reviews(home.reviews)
    first = reviews.offer(order(), ("a",), ("note",))
    assert (first.state, first.problems, first.notes) == (WAITING, ("a",), ("note",))
    assert reviews.offer(order(), ["a"], ("other",)) == first == reviews.get("run-1")
    other = reviews.offer(order(), ("b",))
    assert (other.problems, other.notes) == (("b",), ())
    assert other.seen > first.seen
    assert reviews.get("run-1") == other


def test_what_waits_is_nobodys_decision(home: SiteFolder) -> None:
    waiting = Reviews(home.reviews).offer(order(), ())
    assert (waiting.decided, waiting.by, waiting.account, waiting.uid) == ("", "", "", -1)
    assert (waiting.reason, waiting.shown, waiting.of, waiting.data, waiting.signature) == ("",) * 5
    assert waiting.said == {}


def test_a_decision_says_when_and_a_refusal_needs_nothing_shown(home: SiteFolder) -> None:
    reviews = Reviews(home.reviews)
    waiting = reviews.offer(order(), ())
    (refused,) = reviews.decide("run-1", REFUSED, "anna", "the committee met")
    assert (refused.shown, refused.of, refused.reason) == ("", "", "the committee met")
    assert refused.seen == waiting.seen < refused.decided
    assert refused.decided.endswith("+00:00")
    assert reviews.get("run-1") == refused
    read_and_approve(home, "run-1")
    assert known(reviews.get("run-1")).decided > refused.decided


def test_a_person_who_decides_about_a_part_of_a_study_does_so_for_oneself(home: SiteFolder) -> None:
    """A run that took part in an earlier decision no longer names that one."""
    reviews = surveyed(home)
    assert reviews.offer(study("spots-1"), ()).of == "spots-survey"
    assert reviews.offer(study("spots-2", arm=1), ()).of == "spots-survey"
    assert {r.of for r in reviews.decide("spots", REFUSED, "anna", "no")} == {""}


def test_a_part_that_the_policy_refuses_is_left_out_of_an_approval(home: SiteFolder) -> None:
    reviews = Reviews(home.reviews)
    reviews.offer(survey(), ())
    reviews.offer(study("spots-1"), ("too many rounds", "no test"))
    reviews.offer(study("spots-2", arm=1), ("too many rounds",))
    reviews.remember(reviews.subject("spots"))
    assert [r.what.run for r in reviews.decide("spots", APPROVED, "anna", "IRB")] == ["spots-survey"]
    assert known(reviews.get("spots-1")).state == WAITING
    reviews.remember(reviews.subject("spots"))
    with pytest.raises(SetupError, match=r"would change nothing: too many rounds; no test$"):
        reviews.decide("spots", APPROVED, "anna", "IRB")


def test_a_part_that_the_policy_refuses_is_refused_with_its_study(home: SiteFolder) -> None:
    reviews = surveyed(home)
    reviews.decide("spots", REFUSED, "anna", "no")
    assert reviews.offer(study("spots-1"), ("too many rounds",)).state == REFUSED


def test_a_package_that_changed_since_the_order_came_is_not_approved(home: SiteFolder) -> None:
    reviews = Reviews(home.reviews)
    review = reviews.offer(order(), ())
    write_private(home.reviews / "run-1.json", to_json(replace(review, packages=(Package("a", "1", "0" * 64),))))
    reviews.remember(reviews.subject("run-1"))
    with pytest.raises(SetupError, match="a package that this study needs was changed here"):
        reviews.decide("run-1", APPROVED, "anna", "IRB")
    assert reviews.current(order()) is None
    assert reviews.offer(order(), ()).packages == ()


def test_a_decision_with_other_packages_covers_no_other_part(home: SiteFolder) -> None:
    reviews = surveyed(home)
    other = replace(known(reviews.get("spots-survey")), packages=(Package("a", "1", "0" * 64),)).signed(home.keys)
    write_private(home.reviews / "spots-survey.json", to_json(other))
    assert known(reviews.get("spots-survey")).state == APPROVED
    assert reviews.offer(study("spots-1"), ()).state == WAITING


def test_only_the_last_decision_about_a_study_holds(home: SiteFolder) -> None:
    reviews = surveyed(home)
    reviews.offer(study("spots-1"), ())
    reviews.decide("spots", REFUSED, "anna", "no")
    read_and_approve(home, "spots", "the committee met again")
    late = reviews.offer(study("spots-2", arm=1), ())
    assert (late.state, late.by, late.reason) == (APPROVED, "a person", "the committee met again")
    assert late.of in ("spots-survey", "spots-1")
    assert late.decided in [known(reviews.get(run)).decided for run in ("spots-survey", "spots-1")]
    assert len({r.shown for r in reviews.all()}) == 1
    assert (late.account, late.uid) == (known(reviews.get("spots-1")).account, os.getuid())


def test_an_approval_that_is_used_up_keeps_the_notes_of_the_policy(home: SiteFolder) -> None:
    reviews = surveyed(home)
    reviews.offer(study("spots-1"), ())
    again = reviews.offer(study("again"), (), ("the policy refuses fedprox",))
    assert again.notes == ("the policy refuses fedprox", "this method run was already executed as spots-1")


def test_what_a_site_said_in_a_survey_is_signed_and_may_be_corrected(home: SiteFolder) -> None:
    reviews = surveyed(home)
    assert known(reviews.get("spots-survey")).said == SHAPE
    reviews.answered(survey(), {**SHAPE, "outputs": 5})
    found = known(reviews.get("spots-survey"))
    assert (found.state, found.said) == (APPROVED, {**SHAPE, "outputs": 5})
    reviews.answered(order(), dict(SHAPE))  # which has not come
    reviews.decide("spots", REFUSED, "anna", "no")
    reviews.answered(survey(), dict(SHAPE))
    assert known(reviews.get("spots-survey")).said == {**SHAPE, "outputs": 5}


def test_why_the_data_do_not_fit_stays_with_the_review_until_they_do(home: SiteFolder) -> None:
    reviews = Reviews(home.reviews)
    reviews.note_data("run-1", "never came")
    assert reviews.all() == []
    reviews.offer(order(), ())
    reviews.note_data("run-1", "data/train.npz is not there")
    assert known(reviews.get("run-1")).data == "data/train.npz is not there"
    read_and_approve(home, "run-1")
    reviews.note_data("run-1", "")
    assert (known(reviews.get("run-1")).data, known(reviews.get("run-1")).state) == ("", APPROVED)


@pytest.mark.parametrize(
    ("kind", "word"),
    [("classification", "classes"), ("segmentation", "classes"), ("multilabel", "labels"), ("regression", "values")],
)
def test_what_the_outputs_are_is_said_in_the_words_of_the_task(home: SiteFolder, kind: str, word: str) -> None:
    filled = cast(RunRequest, SimpleNamespace(filled=("outputs",), plan={"kind": kind, "outputs": 3}))
    assert _unlike(filled, [known(surveyed(home).get("spots-survey"))]) == [f"outputs = 3; the data here have 2 {word}"]


# The account and the signature ----------------------------------------------------------------------------------------


def test_a_persons_name_is_at_most_a_hundred_characters() -> None:
    assert this_person("x" * 100).name == "x" * 100
    assert this_person("  Anna Berg ").name == "Anna Berg"
    account = pwd.getpwuid(os.getuid()).pw_name
    assert this_person() == this_person("   ") == (account, account, os.getuid())
    with pytest.raises(SetupError, match="at most 100 characters"):
        this_person("x" * 101)


def test_an_account_that_the_system_does_not_list_is_known_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def unlisted(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unlisted)
    assert this_person() == (f"uid {os.getuid()}", f"uid {os.getuid()}", os.getuid())
    assert this_person("anna") == ("anna", f"uid {os.getuid()}", os.getuid())


def test_a_reason_is_at_most_two_thousand_characters(home: SiteFolder) -> None:
    reviews = Reviews(home.reviews)
    reviews.offer(order(), ())
    (done,) = reviews.decide("run-1", REFUSED, "anna", "x" * 2000)
    assert known(reviews.get("run-1")).reason == done.reason == "x" * 2000


def test_what_is_signed_does_not_depend_on_the_order_of_keys_and_is_of_this_kind_alone(home: SiteFolder) -> None:
    """A signature that was made by an earlier release still counts, and one under something else never does."""
    assert signed_bytes({"b": 1, "a": [2, "c"]}) == b'polyclinic decision 1\n{"a":[2,"c"],"b":1}'
    review = known(surveyed(home).get("spots-survey"))
    assert set(review.statement) == {
        "order",
        "code",
        "packages",
        "state",
        "decided",
        "by",
        "account",
        "uid",
        "reason",
        "shown",
        "of",
        "said",
    }
    assert (review.statement["order"], review.statement["said"]) == (survey().hash, SHAPE)


def test_what_is_shown_together_has_one_hash_whatever_the_order(home: SiteFolder) -> None:
    reviews = Reviews(home.reviews)
    one, two = (reviews.offer(order(run=run), ()) for run in ("run-1", "run-2"))
    assert shown_hash([one, two]) == shown_hash([two, one])
    assert len({shown_hash(some) for some in ([one], [two], [one, two], [])}) == 4


def test_a_decision_outlives_a_renewal_that_is_under_way(home: SiteFolder) -> None:
    reviews = Reviews(home.reviews)
    reviews.offer(order(), ())
    read_and_approve(home, "run-1")
    waiting = site_keys.upcoming(home.keys)
    waiting.mkdir()
    shutil.move(home.keys / "site.key", waiting / "site.key")
    assert known(reviews.get("run-1")).state == APPROVED


# At the agent ---------------------------------------------------------------------------------------------------------


class Server:
    """A server that says what it likes to one agent."""

    def __init__(self, homes: dict[str, SiteFolder], an: RunRequest) -> None:
        self.an, self.home, self.number = an, homes["site-0"], 0
        self.carrier = LocalCarrier(homes, an)
        self.agent = self.carrier.agent("site-0")

    @property
    def training(self) -> Training:
        trainer: object = self.agent.trainer
        assert isinstance(trainer, Inline)
        return known(trainer.training)

    def hello(self) -> str:
        return self._call("hello", None)[0]

    def ask(self, job: str = "describe", trees: dict[str, Any] | None = None) -> tuple[str, Path | None]:
        return self._call("do", Request(0, trees or {}, job))

    def _call(self, kind: str, request: Request | None) -> tuple[str, Path | None]:
        self.number += 1
        body, size, sha256 = None, 0, ""
        if request is not None:
            received = self.agent.memory.folder / "received"
            size, sha256 = tensor_file.write(received, request, durable=False)
            body = take_in(self.agent.memory, received, self.number)
        call = Call(
            VERSION,
            self.an.run,
            self.number,
            "site-0",
            "",
            size,
            sha256,
            kind,
            self.an.hash,
            0,
            request.job if request else "",
            0,
            0,
            0,
            0.0,
            "",
        )
        answer, file = self.agent.answer(call, body)
        return answer.lost, file


def events(home: SiteFolder) -> list[dict[str, Any]]:
    return list(verify(home.journal))


@pytest.fixture
def homes(tmp_path: Path) -> dict[str, SiteFolder]:
    return hospital(tmp_path)


def test_no_file_of_the_data_is_opened_before_somebody_approved(homes: dict[str, SiteFolder]) -> None:
    """With no data folder at all, everything is as before; with a wrong one, it is found after the approval."""
    data = homes["site-0"].path / "data"
    data.rename(data.with_name("elsewhere"))
    for an in (order(), survey()):
        server = Server(homes, an)
        assert server.hello() == f"waits for a person at site-0: `polyclinic site review {an.run}`"
        assert "waits for a person" in server.ask()[0]
        read_and_approve(homes["site-0"], an.run)
        told = server.hello()
        assert told.startswith("refused: the data cannot be read")
        assert "data/" not in told.replace("data:", "")
        assert str(homes["site-0"].path) not in told
        assert f"{data} does not exist" in known(Reviews(homes["site-0"].reviews).get(an.run)).data
        data.with_name("elsewhere").rename(data)
        assert server.hello() == ""
        assert known(Reviews(homes["site-0"].reviews).get(an.run)).data == ""
        data.rename(data.with_name("elsewhere"))


def test_data_of_another_shape_are_told_without_their_own(homes: dict[str, SiteFolder]) -> None:
    an = order(plan={"inputs": [1, 16, 16]})
    server = Server(homes, an)
    server.hello()
    read_and_approve(homes["site-0"], "run-1")
    told = server.hello()
    assert told == (
        "refused: inputs (train, val, test, unlabeled) do not have the shape that the study needs, 1 x 16 x 16"
    )
    assert "(1, 8, 8)" in known(Reviews(homes["site-0"].reviews).get("run-1")).data
    assert [e["reason"] for e in events(homes["site-0"]) if e["event"] == "no reply"][-1] == told


def test_a_site_without_training_examples_does_not_train(homes: dict[str, SiteFolder]) -> None:
    for role in ("train", "unlabeled"):
        (homes["site-0"].path / "data" / f"{role}.npz").unlink()
    server = Server(homes, order())
    server.hello()
    read_and_approve(homes["site-0"], "run-1")
    assert server.hello() == "refused: there are no training examples here"


def test_an_approval_that_was_edited_runs_nothing(homes: dict[str, SiteFolder]) -> None:
    server = Server(homes, order())
    server.hello()
    path = homes["site-0"].reviews / "run-1.json"
    write_private(path, json.dumps({**json.loads(path.read_text()), "state": APPROVED, "by": "anna"}))
    assert "waits for a person" in server.hello()
    assert "waits for a person" in server.ask("train")[0]
    assert "answered" not in [e["event"] for e in events(homes["site-0"])]


def test_the_journal_says_what_kinds_of_values_left(homes: dict[str, SiteFolder]) -> None:
    server = Server(homes, survey(rounds=3))
    server.hello()
    read_and_approve(homes["site-0"], "spots")
    assert server.hello() == ""
    lost, file = server.ask()
    assert lost == ""
    (entry,) = [e for e in events(homes["site-0"]) if e["event"] == "answered"]
    size = json.loads(bytes(tensor_file.read(known(file)).parts["describe"].items["site-0"]["text"].tolist()))
    assert entry["parts"] == [
        {
            "part": "describe",
            "kind": "PerSite",
            "tensors": 1,
            "apart": True,
            "numbers": len(json.dumps(size, sort_keys=True)),
        }
    ]
    assert entry["masked"] is False
    assert known(Reviews(homes["site-0"].reviews).get("spots-survey")).said == SHAPE


def test_the_journal_of_a_training_names_its_mean(homes: dict[str, SiteFolder]) -> None:
    an = order()
    server = Server(homes, an)
    server.hello()
    read_and_approve(homes["site-0"], "run-1")
    method = an.build_plan().build_method()
    request = known(method.request(method.init(an.build_plan().build_task().first(0))))
    lost, file = server.ask(request.job, dict(request.trees))
    assert lost == ""
    (entry,) = [e for e in events(homes["site-0"]) if e["event"] == "answered"]
    reply = tensor_file.read(known(file))
    (part,) = entry["parts"]
    assert (part["part"], part["kind"], part["apart"]) == ("update", "WeightedMean", False)
    assert part["numbers"] == sum(leaf.numel() for leaf in reply.parts["update"].total.values())
    assert part["tensors"] == len(reply.parts["update"].total)


def test_what_the_journal_keeps_of_a_decision_can_be_verified(homes: dict[str, SiteFolder]) -> None:
    """The agent notes what it took part in, under the site's signature."""
    home = homes["site-0"]
    server = Server(homes, survey())
    server.hello()
    read_and_approve(home, "spots")
    server.hello()
    server.ask()
    arm = Server(homes, study("spots-1"))
    assert arm.hello() == ""
    (entry,) = [e for e in events(home) if e["event"] == "approved as part of its study"]
    review = known(Reviews(home.reviews).get("spots-1"))
    assert (entry["by"], entry["of"], entry["uid"], entry["rehearsal"]) == (
        "a person",
        "spots-survey",
        os.getuid(),
        False,
    )
    statement = {key: entry[key] for key in review.statement}
    assert shared_journals.signed_by(
        site_keys.load(home.keys / "site.key"), entry["signature"], signed_bytes(statement)
    )
    assert statement["order"] == study("spots-1").hash


@pytest.mark.parametrize("an", [replace(study("x"), label="other"), replace(study("x"), external=("site-9",))])
def test_a_run_that_hides_behind_a_study_is_refused(homes: dict[str, SiteFolder], an: RunRequest) -> None:
    """The review shows the study's method runs, so a run that is none of them is not for a person to approve."""
    assert "is not part of the study that it names" in Server(homes, an).hello()


def test_code_that_changes_while_a_run_goes_on_is_not_run(
    homes: dict[str, SiteFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    from polyclinic.engines.flare.client import training_worker

    server = Server(homes, survey())
    server.hello()
    read_and_approve(homes["site-0"], "spots")
    assert server.hello() == ""
    monkeypatch.setattr(training_worker, "code_on_disk", lambda: "1" * 64)
    assert "polyclinic was changed here during the run" in server.ask()[0]
    monkeypatch.undo()
    server.training._code = "1" * 64  # it began with other code, which was put back
    assert "polyclinic was changed here during the run" in server.ask()[0]


def test_a_changed_file_changes_the_hash_of_the_code_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "polyclinic"
    (package / "engines" / "flare").mkdir(parents=True)
    (package / "core").mkdir()
    (package / "core" / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(orders, "__file__", str(package / "engines" / "flare" / "protocol" / "run_request.py"))
    first = orders.code_on_disk()
    (package / "core" / "a.py").write_text('"""Words."""\n\nx = 1  # more words\n')
    (package / "core" / "a.py").rename(package / "engines" / "b.py")
    (package / "core" / "c.py").write_text("")
    assert orders.code_on_disk() == first, "words and names of files are not code"
    (package / "core" / "c.py").write_text("x = 1\n")
    second = orders.code_on_disk()
    (package / "engines" / "b.py").write_text("x = 2\n")
    third = orders.code_on_disk()
    (package / "engines" / "b.py").write_text("x = (\n")
    assert len({first, second, third, orders.code_on_disk()}) == 4
    (package / "engines" / "b.py").write_text("x = 2\n")
    assert orders.code_on_disk() == third
