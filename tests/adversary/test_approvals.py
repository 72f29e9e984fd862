"""An approval allows what a person read, once, and nothing is opened or sent before it."""

import csv
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from polyclinic.core.atomic import write_private
from polyclinic.engines.flare.pki import site_keys
from polyclinic.engines.flare.protocol.paths import SiteFolder, private_folder
from polyclinic.engines.flare.protocol.run_request import RunRequest, survey_plan
from polyclinic.engines.policy import site_policy as policies
from tests.adversary.server import (
    HostileServer,
    Person,
    answered,
    houses,
    nothing_left,
    opened_in,
    refused,
    small_order,
    study,
    survey,
)

SITES = ("site-0", "site-1", "site-2")


def begun(server: HostileServer, an: RunRequest) -> RunRequest:
    """The study's survey is approved and answered at every site, so that the sites' own data fill its method runs."""
    first = survey(f"{an.run}-survey", an)
    server.approved(first)
    for name in server.homes:
        answered(server.ask(name, "describe", trees={}))
    return first


@pytest.fixture
def homes(tmp_path: Path) -> Mapping[str, SiteFolder]:
    return houses(tmp_path)


# What was read is what was approved ---------------------------------------------------------------------------------------


def test_an_order_that_changes_between_review_and_approval_is_not_approved(homes: Mapping[str, SiteFolder]) -> None:
    """The person reads 3 rounds; before the approval is typed the server offers 2,000 under the same name."""
    shown, meant = small_order("spots", rounds=3), small_order("spots", rounds=2000)
    server = HostileServer(homes, shown, approved=False)
    person = server.people["site-0"]
    assert "3" in person.reads("spots")
    server.offer(meant, ["site-0"])
    person.approves("spots")
    refused(server.ask("site-0", "train"))
    assert server.offer(meant, ["site-0"])["site-0"].lost, "2000 rounds may run, and 3 were shown"


@pytest.mark.parametrize(
    "change",
    [
        {"test": "predict/test"},
        {"score_every": 1},
        {"data": {"preprocess": "none"}},
        {"external": ("site-9",)},
        {"plan": {"seed": 4}},
        {"plan": {"method": "fedsgd"}},
        {"plan": {"uplink": []}},
    ],
)
def test_no_field_of_an_order_changes_behind_an_approval(
    change: dict[str, Any], homes: Mapping[str, SiteFolder]
) -> None:
    """Whatever differs from what was shown waits for a person again; also if it comes after the approval."""
    shown = small_order("spots", plan={"options": {"uniform": True}, "uplink": [{"name": "clip", "bound": 1.0}]})
    meant = replace(shown, **{**change, "plan": {**shown.plan, **change.get("plan", {})}})
    assert shown.hash != meant.hash
    server = HostileServer(homes, shown, approved=False)
    person = server.people["site-0"]
    person.reads("spots")
    server.offer(meant, ["site-0"])
    person.approves("spots")
    refused(server.ask("site-0", "train"))
    server.offer(shown, ["site-0"])
    server.approved(shown, ["site-0"])
    answered(server.ask("site-0", "train"))
    assert server.offer(meant, ["site-0"])["site-0"].lost
    refused(server.ask("site-0", "train"))


def test_one_name_never_approves_two_studies(homes: Mapping[str, SiteFolder]) -> None:
    """Two different studies are called spots. The person sees one; the other has 2,000 rounds at a rate of 0.9."""
    shown, hidden = study("spots-1", lr=0.1), study("zz-other", lr=0.9, rounds=2000)
    server = HostileServer(homes, hidden, approved=False)
    server.offer(shown, ["site-0"])
    person = server.people["site-0"]
    text = person.reads("spots")
    person.approves("spots")
    allowed = [an.run for an in (shown, hidden) if not server.offer(an, ["site-0"])["site-0"].lost]
    assert len(allowed) < 2, f"one approval of {text[:40]!r} allowed {' and '.join(allowed)}"
    assert "zz-other" not in allowed or "2000" in text, "what was approved is not what was shown"


def test_a_study_with_the_name_of_a_run_is_not_approved_with_it(homes: Mapping[str, SiteFolder]) -> None:
    """A run called spots was read. A study of that name, which came later, is not approved with it."""
    run, other = small_order("spots"), study("other-1", name="spots", rounds=2000)
    server = HostileServer(homes, run, approved=False)
    person = server.people["site-0"]
    person.reads("spots")
    server.offer(other, ["site-0"])
    person.approves("spots")
    refused(server.offer(other, ["site-0"])["site-0"])


def test_a_code_change_needs_a_new_approval(homes: Mapping[str, SiteFolder], monkeypatch: pytest.MonkeyPatch) -> None:
    """The software at the site is another one than when the study was approved."""
    server = HostileServer(homes, small_order())
    from polyclinic.engines.flare.client import reviews, site_agent
    from polyclinic.engines.flare.protocol import run_request

    for module in (site_agent, run_request, reviews):
        monkeypatch.setattr(module, "code_hash", lambda: "cd" * 32, raising=False)
    server.restart("site-0")
    assert server.offer(server.order, ["site-0"])["site-0"].lost


def test_an_approval_that_is_taken_back_counts_at_once(homes: Mapping[str, SiteFolder]) -> None:
    server = HostileServer(homes, small_order())
    answered(server.ask("site-0", "train"))
    assert server.people["site-0"].refuses("run-1")
    refused(server.ask("site-0", "train", round=1))
    refused(server.ask("site-0", "train", after=0))


# One run of each arm ----------------------------------------------------------------------------------------------------


def test_an_approved_arm_runs_once(homes: Mapping[str, SiteFolder]) -> None:
    """The same arm under any other run name asks a person again: every run is another exposure of the patients."""
    first = study("spots-1")
    server = HostileServer(homes, first, approved=False)
    begun(server, first)
    server.approved(first)
    answered(server.ask("site-0", "train"))
    again = []
    for i in range(3):
        hello = server.offer(study(f"again-{i}"), ["site-0"])["site-0"]
        if not hello.lost or server.ask("site-0", "train").left:
            again.append(server.order.run)
    assert not again, f"the method run that was approved once ran again as {', '.join(again)}, and no person was asked"


def test_the_other_arm_of_an_approved_study_runs_without_asking_again(homes: Mapping[str, SiteFolder]) -> None:
    """The limit of the test above: a person approves a study, and so each of its method runs."""
    first = study("spots-1")
    server = HostileServer(homes, first, approved=False)
    begun(server, first)
    server.approved(first)
    assert not server.offer(study("spots-2", label="fedprox"), ["site-0"])["site-0"].lost


@pytest.mark.parametrize("change", [{"outputs": 20_000}, {"inputs": [400]}, {"outputs": 3}])
def test_the_size_of_the_model_is_what_the_data_here_say(
    change: dict[str, Any], homes: Mapping[str, SiteFolder]
) -> None:
    """Two classes were surveyed. Under the same approval a model of 20,000 is another message, of 50 times the size."""
    first = study("spots-1")
    server = HostileServer(homes, first, approved=False)
    begun(server, first)
    big = study("spots-2", label="fedprox", plan=change)
    assert server.offer(big, ["site-0"])["site-0"].lost, f"{change} may run, and no person was asked"
    refused(server.ask("site-0", "train"))


@pytest.mark.parametrize(
    "change",
    [
        {"external": ("mallory",)},
        {"identities": {"site-0": "00" * 32}},
        {"test": "predict/test"},
        {"data": {"preprocess": "none"}},
        {"score_every": 1},
        {"min_replies": 2},
        {"deadline": 9.0},
        {"sites_per_round": 1},
        {"patience": 9.0},
        {"mode": "buffered"},
        {"best": {"metric": "auc", "higher": True}},
        {"label": "fedprox"},
    ],
)
def test_a_changed_arm_is_not_the_arm_that_was_approved(
    change: dict[str, Any], homes: Mapping[str, SiteFolder]
) -> None:
    """A change of recipients, keys, tests, data or schedule waits for a person."""
    first = study("spots-1")
    server = HostileServer(homes, first, approved=False)
    begun(server, first)
    server.approved(first, ["site-0"])
    other = replace(study("spots-2", label="fedprox"), **change)
    if change == {"label": "fedprox"}:
        other = replace(study("spots-2"), **change)  # the plan of one method run under the label of another
    refused(server.offer(other, ["site-0"])["site-0"])
    refused(server.ask("site-0", "train"))


# Whose data, and which file ---------------------------------------------------------------------------------------------


@pytest.fixture
def switzerland(tmp_path: Path, real_data: Path) -> SiteFolder:
    """A hospital with a table, one column of which it leaves out, next to a file of the staff department."""
    with open(real_data / "uci_heart_4hospitals" / "heart_4sites.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["site"] == "switzerland"]
    towns = ("Zurich-8001", "Basel-4051", "Winterthur-8400", "Baden-5400", "Uster-8610")
    home = SiteFolder(tmp_path / "switzerland")
    folder = private_folder(home.path) and tmp_path / "export"
    folder.mkdir()
    columns = [column for column in rows[0] if column != "site"] + ["postcode"]
    with open(folder / "heart.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows({**row, "postcode": towns[i % 5]} for i, row in enumerate(rows))
    (folder / "data.toml").write_text(
        'kind = "table"\npath = "heart.csv"\nlabel = "num"\nthreshold = 0.5\nleave_out = ["postcode"]\n'
    )
    staff = tmp_path / "hr" / "payroll.csv"
    staff.parent.mkdir()
    reasons = ("pregnancy", "depression", "surgery", "cancer")
    lines = [f"{30 + i % 20},{5000 + i},{reasons[i % 4]}" for i in range(40)]
    staff.write_text("\n".join(["age,salary,reason_of_sick_leave", *lines]))
    write_private(home.settings, f'site = "switzerland"\ndata = "{folder}"\n')
    write_private(home.policy, policies.DEFAULT)
    site_keys.make(home.keys)
    return home


SECRETS = (
    "Zurich",
    "Basel",
    "Winterthur",
    "Baden",
    "Uster",
    "pregnancy",
    "depression",
    "surgery",
    "cancer",
    "5000",
    "daemon:",
)
TABLES: dict[str, dict[str, Any]] = {
    "another column": {"label": "postcode", "threshold": None, "leave_out": []},
    "another file": {"path": "{hr}", "label": "reason_of_sick_leave", "threshold": None, "leave_out": []},
    "another file, relative": {
        "path": "../hr/payroll.csv",
        "label": "reason_of_sick_leave",
        "threshold": None,
        "leave_out": [],
    },
    "a file of the system": {
        "path": "/etc/passwd",
        "label": "root:x:0:0:root:/root:/bin/bash",
        "threshold": None,
        "leave_out": [],
    },
    "the column that was left out": {"leave_out": []},
    "another kind": {"kind": "folders", "path": "/"},
    "fewer patients": {"max_patients": 10, "min_patients": 10},
}


@pytest.mark.parametrize("what", TABLES)
def test_the_server_chooses_neither_file_nor_column(what: str, switzerland: SiteFolder) -> None:
    """The hospital's own table says where its data lie, which column is the diagnosis, and what is left out."""
    hr = switzerland.path.parent / "hr" / "payroll.csv"
    table = {key: str(hr) if value == "{hr}" else value for key, value in TABLES[what].items()}
    order = RunRequest.from_json(
        json.dumps(
            {"run": "s1", "mode": "survey", "plan": survey_plan(["switzerland"]), "data": table, "patience": 5.0}
        )
    )
    with opened_in(hr.parent) as staff, opened_in(Path("/etc/passwd")) as passwords:
        server = HostileServer({"switzerland": switzerland}, order, approved=False)
        person = server.people["switzerland"]
        text = person.reads("s1")
        person.approves("s1")
        server.offer(order)
        got = server.ask("switzerland", "describe", trees={})
        server.ask("switzerland", "train")
    found = bytes(got.of_site("describe")["text"].tolist()).decode() if got.left else got.lost
    told = found + " ".join(heard.lost for heard in server.heard)
    leaked = [secret for secret in SECRETS if secret in told]
    assert not leaked, f"the server read {', '.join(leaked)}"
    assert not staff, f"{staff[0].name} was opened"
    assert not [path for path in passwords if "label" in table and "root" in str(table["label"])], (
        "/etc/passwd was opened"
    )
    if got.left:
        hidden = [key for key in table if key not in text]
        assert not hidden, f"the review does not show {', '.join(hidden)}, and {found[:200]} left"


def test_the_honest_survey_of_the_same_hospital_is_answered(switzerland: SiteFolder) -> None:
    """What the test above compares with: without a table of the server's the hospital's own is used."""
    order = RunRequest.from_json(
        json.dumps({"run": "s1", "mode": "survey", "plan": survey_plan(["switzerland"]), "patience": 5.0})
    )
    server = HostileServer({"switzerland": switzerland}, order)
    got = answered(server.ask("switzerland", "describe", trees={}))
    text = bytes(got.of_site("describe")["text"].tolist()).decode()
    assert not [secret for secret in SECRETS if secret in text]


def test_names_of_classes_leave_only_if_the_hospital_says_so(
    tmp_path: Path, real_data: Path, switzerland: SiteFolder
) -> None:
    """The hospital's own label is a column of words; the survey says how many classes there are, and not their
    names.
    """
    folder = switzerland.path.parent / "export"
    (folder / "data.toml").write_text('kind = "table"\npath = "heart.csv"\nlabel = "postcode"\n')
    order = RunRequest.from_json(
        json.dumps({"run": "s1", "mode": "survey", "plan": survey_plan(["switzerland"]), "patience": 5.0})
    )
    server = HostileServer({"switzerland": switzerland}, order)
    got = answered(server.ask("switzerland", "describe", trees={}))
    text = bytes(got.of_site("describe")["text"].tolist()).decode()
    leaked = [secret for secret in SECRETS if secret in text]
    assert not leaked, f"the survey revealed the names {', '.join(leaked)}"


def test_nothing_of_the_data_is_opened_before_a_person_has_approved(homes: Mapping[str, SiteFolder]) -> None:
    """A study that only waits, and one that the person refused: the server has no file of the data opened, nothing leaves.

    What the person's own command opens, to show how many patients would take part, is not the server's doing.
    """
    folder = homes["site-0"].path / "data"
    with opened_in(folder) as found:
        server = HostileServer(homes, small_order(), approved=False)
        for i in range(3):
            server.offer(server.order, ["site-0"])
            server.ask("site-0", "train", server.moved(0.1 * i))
    server.people["site-0"].reads("run-1")
    server.people["site-0"].refuses("run-1")
    with opened_in(folder) as later:
        server.offer(server.order, ["site-0"])
        server.ask("site-0", "train")
    nothing_left(server)
    found += later
    assert not found, f"{', '.join(sorted({path.name for path in found}))} opened before anybody had approved"


def test_no_refusal_tells_how_many_patients_there_are(homes: Mapping[str, SiteFolder]) -> None:
    """Fewer than the policy's minimum, 13, is all that the server learns; there are 12 with a scan each."""
    home = homes["site-0"]
    home.policy.write_text(policies.DEFAULT.replace("min_patients = 10", "min_patients = 13"))
    server = HostileServer(homes, small_order(score_every=1), approved=False)
    server.approved(server.order, ["site-1", "site-2"])
    server.people["site-0"].reads("run-1")
    server.people["site-0"].approves("run-1")
    said = [server.offer(server.order, ["site-0"])["site-0"].lost]
    said += [server.ask("site-0", "train").lost, server.ask("site-0", "score/val", round=1).lost]
    assert any("13" in text for text in said), said
    told = [text for text in said if "12" in text]
    assert not told, f"the refusal tells the exact count: {told[0]}"


def test_what_a_person_reads_names_every_table_that_the_server_sets(homes: Mapping[str, SiteFolder]) -> None:
    """A person cannot decide about what is not shown."""
    order = small_order(data={"rehearsal": True}, score_every=2, test="score/test")
    server = HostileServer(homes, order, approved=False)
    text = server.people["site-0"].reads("run-1")
    assert "REHEARSAL: every site trains on synthetic points" in text, (
        f"the review does not say that the data are synthetic: {text}"
    )


def test_a_refused_study_does_not_come_back_under_another_run_name(homes: Mapping[str, SiteFolder]) -> None:
    """The same arm under another name is refused, too, or waits; it never runs."""
    server = HostileServer(homes, study("spots-1"), approved=False)
    person = server.people["site-0"]
    person.reads("spots-1")
    assert person.refuses("spots-1")
    for run in ("spots-2", "spots-3"):
        refused(server.offer(study(run), ["site-0"])["site-0"])
        refused(server.ask("site-0", "train"))


def test_another_server_cannot_use_a_name_that_was_approved(homes: Mapping[str, SiteFolder]) -> None:
    """The message names one order and the job came with another."""
    server = HostileServer(homes, small_order())
    other = small_order(rounds=9)
    got = server.call("site-0", "do", server.request, round=0, job="train", order=other.hash)
    refused(got)
    assert not server.call("site-0", "do", server.request, round=0, job="train", run="run-2").left


def test_the_person_is_named_as_the_account_that_typed(
    homes: Mapping[str, SiteFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``SUDO_USER`` and ``LOGNAME`` are environment variables: setting them does not change the recorded account."""
    import os

    for key in ("SUDO_USER", "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(key, "dr-mallory")
    server = HostileServer(homes, small_order(), approved=False)
    person = server.people["site-0"]
    person.reads("run-1")
    assert person.approves("run-1")
    decided = [entry for entry in server.journal("site-0") if "mallory" in json.dumps(entry)]
    accounts = [entry for entry in decided if entry.get("uid") != os.getuid()]
    assert not accounts, f"the journal names an account that did not decide: {accounts[0]}"


def test_a_decision_that_was_not_signed_by_the_site_does_not_count(homes: Mapping[str, SiteFolder]) -> None:
    """Write access to the folder of reviews without the key approves nothing."""
    server = HostileServer(homes, small_order(), approved=False)
    path = homes["site-0"].reviews / "run-1.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "state": "approved", "by": "nobody"}))
    assert server.offer(server.order, ["site-0"])["site-0"].lost, "a line of JSON approved a study"


def test_the_journal_says_what_kinds_of_values_left(homes: Mapping[str, SiteFolder]) -> None:
    """Bytes alone do not tell a person afterwards whether sums or single values left."""
    server = HostileServer(homes, small_order())
    answered(server.ask("site-0", "train"))
    entry = next(e for e in server.journal("site-0") if e["event"] == "answered")
    assert "update" in json.dumps(entry), f"which part left is not in the journal: {entry}"
    assert "WeightedMean" in json.dumps(entry), f"how it is merged is not in the journal: {entry}"


def test_a_person_at_one_site_decides_for_that_site_alone(homes: Mapping[str, SiteFolder]) -> None:
    server = HostileServer(homes, small_order(), approved=False)
    server.approved(server.order, ["site-0"])
    refused(server.ask("site-1", "train"))
    assert not Person(homes["site-1"]).approves("no-such-run")
