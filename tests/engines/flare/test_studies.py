"""A study between hospitals without FLARE: the survey, one approval, the best round's model, the run folder."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from polyclinic.core import serialization as states
from polyclinic.core.aggregates import PerSite, Reply
from polyclinic.core.audit_log import verify
from polyclinic.core.serialization import Corrupt
from polyclinic.data.examples import Examples
from polyclinic.engines.flare.client import site_data
from polyclinic.engines.flare.client.reviews import APPROVED, REFUSED, WAITING, Reviews
from polyclinic.engines.flare.client.site_agent import SiteAgent
from polyclinic.engines.flare.client.training_process import TrainingProcess
from polyclinic.engines.flare.pki import site_keys
from polyclinic.engines.flare.protocol.paths import ServerFolder, SetupError, SiteFolder
from polyclinic.engines.flare.protocol.run_request import InvalidRunRequest, RunRequest
from polyclinic.engines.flare.server import study_runs
from polyclinic.engines.flare.server.job_queue import FAILED, FINISHED, Queue
from polyclinic.engines.flare.server.run_coordinator import RunCoordinator
from polyclinic.engines.site_description import PART, checked, describe, hidden, read_description, shape_of
from polyclinic.evaluation.records.run_reader import read_run
from polyclinic.privacy.ledger import Ledger
from polyclinic.studies.config import study_config
from polyclinic.studies.run import deployment
from polyclinic.studies.run.scheduler import run as run_here
from tests.support.clinics import STUDY, make
from tests.support.known import known
from tests.support.local_deployment import (
    Inline,
    LocalCarrier,
    admitted,
    approve,
    coordinator,
    hospital,
    order,
    read_and_approve,
    write_settings,
)

OPEN = '[allow]\ngather = ["*"]\nnever = []\n[limits]\nmin_patients = 2\nmin_cell = 2\n'
CLOSED = "[limits]\nmin_patients = 2\n"
_made: dict[str, Path] = {}  # keys take long to make
CLINICS = ("lyon", "osaka", "oslo")


class Clinics:
    """A server and three clinics in one process; ``work`` is what the supervisor does."""

    def __init__(self, root: Path, study: str = STUDY, policies: dict[str, str] | None = None) -> None:
        self.root, self.file = root, make(root, study)[0]
        self.study = study_config.read(self.file)
        self.server = ServerFolder(root / "server")
        self.server.path.mkdir()
        self.homes = {}
        for name in CLINICS:
            home = self.homes[name] = SiteFolder(root / name)
            (root / name).mkdir()
            if "keys" not in _made or not _made["keys"].exists():
                site_keys.make(home.keys)
                _made["keys"] = home.keys
            else:
                shutil.copytree(_made["keys"], home.keys)
            home.settings.write_text(f'site = "{name}"\ndata = "{root / "data" / name}"\n')
            home.policy.write_text((policies or {}).get(name, OPEN))
        entries = {name: {"secure": "00" * 32, "revoked": "", "organization": "x", "expires": "x"} for name in CLINICS}
        self.server.admitted.write_text(json.dumps(entries))
        write_settings(self.server)

    def put(self) -> list[str]:
        arms, _ = deployment.method_runs(self.study, CLINICS)
        text = self.file.read_text()
        return study_runs.put(
            self.server,
            text,
            self.study.name,
            self.study.hash,
            arms,
            deployment.how(self.study),
            arms[0]["plan"]["sites"],
        )

    def work(self) -> dict[str, str]:
        """Runs what waits, as far as it goes."""
        queue, outcomes = Queue(self.server), {}
        for _ in range(2):
            for run, entry in queue.all().items():
                if entry.state != "waiting":
                    continue
                homes = {name: self.homes[name] for name in entry.what.everyone}
                carrier = LocalCarrier(homes, entry.what)
                folder, signers = self.server.run(run), admitted(self.server.path.parent, homes)
                how: dict[str, Any] = {"poll": 0.0, "signers": signers}
                outcomes[run] = RunCoordinator(entry.what, carrier, folder, tuple(homes), **how).run()
                carrier.close()
                queue.change(run, state=outcomes[run])
            study_runs.advance(self.server)
        return outcomes

    def approve(self) -> None:
        for home in self.homes.values():
            read_and_approve(home, "spots", "IRB")

    def offer(self) -> None:
        """The survey comes to every site."""
        entry = next(iter(Queue(self.server).all().values()))
        for home in self.homes.values():
            agent = SiteAgent(home, entry.what)
            agent.trainer = cast(TrainingProcess, Inline(home, entry.what.run))
            found = agent._train({"what": "check"})
            agent.reviews.offer(entry.what, tuple(found["problems"]), found["notes"])
            agent.close()


def predictions(folder: Path) -> dict[tuple[str, str], Any]:
    """Test predictions by method and site."""
    return {(label, site): p for (label, _), sites in read_run(folder).arms.items() for site, p in sites.items()}


def test_a_study_between_hospitals_says_what_it_says_on_one_machine(tmp_path: Path) -> None:
    """Batch normalization that stays at sites, the best round of three, an external site: the same predictions."""
    study = STUDY.replace("rounds = 2", "rounds = 3")
    clinics = Clinics(tmp_path, study)
    clinics.put()
    clinics.offer()
    clinics.approve()
    assert set(clinics.work().values()) == {FINISHED}
    table = study_runs.all_of(clinics.server)["spots"]
    entries = {run: Queue(clinics.server).get(run) for run in table["runs"]}
    runs = {run: {**arm, "plan": known(entries[run]).what.plan} for run, arm in table["runs"].items()}
    folders = {run: clinics.server.run(run) for run in runs}
    said = study_runs.survey_of(clinics.server, "spots")
    out = tmp_path / "out"
    assert deployment.collect(clinics.study, clinics.file.read_text(), "spots", runs, said, folders, out) == []
    list(
        run_here(
            clinics.study.model_copy(update={"engine": clinics.study.engine.model_copy(update={"kind": "in-process"})}),
            clinics.file.read_text(),
            tmp_path / "here",
        )
    )
    here, there = predictions(tmp_path / "here"), predictions(out)
    assert (
        {(m, s) for m, s in here if m != "pooled"}
        == set(there)
        == {
            ("local", "lyon"),
            ("local", "oslo"),
            ("ditto", "lyon"),
            ("ditto", "oslo"),
            ("ditto", "osaka"),
        }
    )
    for key, p in there.items():
        assert (p.score == here[key].score).all(), key
        assert (p.target == here[key].target).all()
        alike = [
            np.unique(q.patient, return_inverse=True)[1] for q in (p, here[key])
        ]  # numbers differ, patients do not
        assert len(set(zip(*alike, strict=True))) == len(set(alike[0])) == len(set(alike[1]))
    run = read_run(out)
    assert run.missing == ()
    assert {s.name: s.role for s in run.info.sites} == {"lyon": "training", "oslo": "training", "osaka": "external"}
    assert sum(s.patients["train"] for s in run.info.sites if s.role == "training") > 0
    assert len([line for line in run.rounds if line.method == "ditto"]) == 3
    assert list(verify(out / "journal.jsonl"))


def test_one_approval_is_enough_and_nothing_waits_for_another(tmp_path: Path) -> None:
    clinics = Clinics(tmp_path)
    clinics.put()
    clinics.offer()
    home = clinics.homes["lyon"]
    assert [r.state for r in Reviews(home.reviews).all()] == [WAITING]
    clinics.approve()
    clinics.work()
    states = {r.what.run: r.state for r in Reviews(home.reviews).all()}
    assert len(states) == 3
    assert set(states.values()) == {APPROVED}
    Reviews(home.reviews).decide("spots", REFUSED, "a person", "the committee met")
    assert {r.state for r in Reviews(home.reviews).all()} == {REFUSED}


def tampered(an: RunRequest) -> dict[str, RunRequest]:
    """What a hostile server may make of a run request after a study was approved."""
    plan = an.plan
    arm = an.study["arms"][0]
    more = {**an.study, "arms": [*an.study["arms"], {**arm, "label": "other"}]}
    return {
        "more epochs": replace(an, plan={**plan, "training": {**plan["training"], "epochs": 99}}),
        "more rounds": replace(an, plan={**plan, "rounds": 99}),
        "another method": replace(an, plan={**plan, "method": "fedsgd"}),
        "another seed": replace(an, plan={**plan, "seed": 4}),
        "another network": replace(an, plan={**plan, "network": "mlp"}),
        "no transform": replace(an, plan={**plan, "uplink": [{"name": "clip", "bound": 1.0}]}),
        "fewer peers": replace(an, plan={**plan, "sites": ["lyon"]}),
        "other keys": replace(an, identities={"lyon": "11" * 32}),
        "another test": replace(an, test=""),
        "more outputs": replace(an, plan={**plan, "outputs": 20_000}),
        "another shape": replace(an, plan={**plan, "inputs": [1, 64, 64]}),
        "others who are scored": replace(an, external=("mallory",)),
        "more scores": replace(an, score_every=7),
        "fewer replies": replace(an, min_replies=2),
        "another deadline": replace(an, deadline=9.0),
        "a smaller cohort": replace(an, sites_per_round=1),
        "another measure": replace(an, best={}),
        "another patience": replace(an, patience=1.0),
        "other data": replace(an, data={"split": [0.1, 0.1, 0.8]}),
        "without waiting": replace(an, mode="buffered", external=()),
        "another label": replace(an, label="other"),
        "another arm": replace(an, study=more, label="other"),
        "another study": replace(an, study={**an.study, "name": "other"}),
    }


def test_an_approval_of_a_study_covers_its_parts_and_nothing_else(tmp_path: Path) -> None:
    clinics = Clinics(tmp_path)
    clinics.put()
    clinics.offer()
    clinics.approve()
    clinics.work()
    shutil.copytree(clinics.homes["lyon"].keys, tmp_path / "fresh" / "keys")
    reviews = Reviews(tmp_path / "fresh" / "reviews")
    survey, *arms = [entry.what for entry in Queue(clinics.server).all().values()]
    reviews.offer(survey, ())
    read_and_approve(SiteFolder(tmp_path / "fresh"), "spots")
    reviews.answered(survey, {"inputs": [1, 8, 8], "outputs": 2})
    for an in arms:
        for how, other in tampered(an).items():
            fresh = replace(other, run=f"{an.run[:20]}-x")
            assert reviews.offer(fresh, ()).state == WAITING, how
        assert reviews.offer(an, ()).state == APPROVED
    assert reviews.offer(replace(arms[0], run="again"), ()).state == WAITING


def test_a_survey_says_shapes_and_counts_and_hides_the_small(tmp_path: Path) -> None:
    patients = tuple(f"p{i // 2}" for i in range(12))
    data = {
        "train": Examples(
            torch.zeros(12, 1, 8, 8), torch.tensor([0] * 9 + [1] * 3), patients, tuple(map(str, range(12)))
        )
    }
    found = describe(data, "classification", ("a", "b"), min_cell=5)
    assert found["inputs"] == [1, 8, 8]
    assert found["outputs"] == 2
    assert found["roles"]["train"] == {"patients": 6, "examples": 12, "classes": [None, None]}
    assert describe(data, "classification", min_cell=7)["roles"]["train"]["patients"] is None
    assert hidden([9, 3, 20], 5) == [None, None, 20]
    assert hidden([9, 3, 2, 20], 5) == [9, None, None, 20]
    assert hidden([0, 9], 5) == [0, 9]
    assert checked(json.loads(json.dumps(found))) == found


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"inputs": [1], "outputs": 2}',
        '{"inputs": [-1], "outputs": 2, "classes": [], "roles": {}}',
        '{"inputs": [1, 8], "outputs": 2, "classes": [], "roles": {}}',
        '{"inputs": [1], "outputs": 1e9, "classes": [], "roles": {}}',
        '{"inputs": [1], "outputs": 100000, "classes": [], "roles": {}}',
        '{"inputs": [1], "outputs": 2, "classes": ["\\u001b[2J"], "roles": {}}',
        '{"inputs": [1], "outputs": 2, "classes": [], "roles": {"a b": {}}}',
        '{"inputs": 3, "outputs": 2, "classes": [], "roles": {}}',
        '{"inputs": [1], "outputs": 2, "classes": [], "roles": {"train": {"patients": "x", "examples": 1, "classes": []}}}',
        "[" * 60_000,
    ],
)
def test_a_description_that_is_none_is_refused(text: str) -> None:
    leaf = torch.tensor(list(text.encode()), dtype=torch.uint8)
    with pytest.raises(Corrupt):
        read_description(Reply({PART: PerSite({"a": {"text": leaf}})}), "a")


def test_sites_that_differ_are_told_who_says_what() -> None:
    one = {"inputs": [1, 8, 8], "outputs": 2, "classes": [], "roles": {}}
    with pytest.raises(ValueError, match="a: 1 x 8 x 8; b: 3"):
        shape_of({"a": one, "b": {**one, "inputs": [3]}})
    with pytest.raises(ValueError, match="another order"):
        shape_of({"a": {**one, "classes": ["x", "y"]}, "b": {**one, "classes": ["y", "x"]}})
    assert shape_of({"a": one, "b": {**one, "outputs": 3}}) == ([1, 8, 8], 3, [])


def test_a_study_whose_sites_differ_stops_and_says_so(tmp_path: Path) -> None:
    clinics = Clinics(tmp_path)
    for role in ("train", "val", "test"):
        path = tmp_path / "data" / "oslo" / f"{role}.npz"
        with np.load(path) as arrays:
            np.savez(path, **{**arrays, "inputs": arrays["inputs"][:, :, :4]})
    clinics.put()
    clinics.offer()
    clinics.approve()
    clinics.work()
    table = study_runs.all_of(clinics.server)["spots"]
    assert table["state"] == study_runs.STOPPED
    assert "oslo: 1 x 4 x 8" in table["why"]


def test_sites_that_keep_predictions_send_scores_and_a_refused_study_fails_at_once(tmp_path: Path) -> None:
    clinics = Clinics(tmp_path, policies={"oslo": CLOSED, "osaka": CLOSED})
    clinics.put()
    clinics.offer()
    clinics.approve()
    clinics.work()
    for run in (run for run in Queue(clinics.server).all() if "survey" not in run):
        folder = clinics.server.run(run)
        assert {key.partition("/")[0] for key in states.load(folder / "predictions.safetensors")} == {"lyon"}
        facts = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
        assert {f["site"] for f in facts if f["kind"] == "test"} >= {"lyon", "oslo"}
    bad = Clinics(
        tmp_path / "bad",
        policies=dict.fromkeys(CLINICS, '[allow]\ngather = ["describe"]\nstats = []\n[limits]\nmin_patients = 2\n'),
    )
    bad.put()
    bad.offer()
    bad.approve()
    outcomes = bad.work()
    assert [o for run, o in outcomes.items() if "ditto" in run] == [FAILED]


def test_what_only_one_machine_can_do_is_told(tmp_path: Path) -> None:
    study = study_config.read(make(tmp_path)[0])
    arms, notes = deployment.method_runs(study, CLINICS)
    assert {arm["label"] for arm in arms} == {"local", "ditto"}
    assert {arm["label"]: arm["external"] for arm in arms} == {"local": [], "ditto": ["osaka"]}
    assert notes == [
        "pooled is left out: it needs all data in one place, and here they stay at the sites",
        "[data] patient: not sent; each hospital says this of its own data, in its data.toml",
    ]
    with pytest.raises(deployment.NotElsewhere, match="the external site osaka is not admitted"):
        deployment.method_runs(study, ("lyon", "oslo"))
    with pytest.raises(deployment.NotElsewhere, match="no site can train"):
        deployment.method_runs(study, ("osaka",))
    only = study.model_copy(update={"methods": tuple(m for m in study.methods if m.name == "pooled")})
    with pytest.raises(deployment.NotElsewhere, match="no method is left"):
        deployment.method_runs(only, CLINICS)
    assert "path" not in deployment.how(study)["data"]


def test_a_study_is_taken_up_once_and_only_with_those_who_may_join(tmp_path: Path) -> None:
    clinics = Clinics(tmp_path)
    assert clinics.put() == [f"spots-{clinics.study.hash[:6]}-survey"]
    with pytest.raises(SetupError, match="already"):
        clinics.put()
    admitted = json.loads(clinics.server.admitted.read_text())
    admitted["oslo"]["revoked"] = "2026-01-01"
    other = Clinics(tmp_path / "other")
    other.server.admitted.write_text(json.dumps(admitted))
    with pytest.raises(SetupError, match="oslo: not admitted"):
        other.put()


BUDGET = OPEN + '[privacy]\nepsilon = {epsilon}\ndelta = 1e-3\nunit = "patient"\n'
NOISE = {
    "network_options": {"width": 8, "norm": "group"},
    "training": {"epochs": 1, "batch_size": 8, "lr": 0.05, "private": {"noise": 1.0, "bound": 1.0, "unit": "record"}},
}


def attempt(root: Path, homes: dict[str, SiteFolder], an: RunRequest) -> str:
    for home in homes.values():
        approve(home, an)
    carrier = LocalCarrier(homes, an)
    try:
        return coordinator(root, an, carrier).run()
    finally:
        carrier.close()


@pytest.mark.slow
def test_a_budget_at_the_site_is_paid_over_all_studies_and_ends(tmp_path: Path) -> None:
    policy = BUDGET.replace("{epsilon}", "1e6").replace('"patient"', '"record"')
    homes = hospital(tmp_path, count=1, policy=policy)
    home, sites = homes["site-0"], ("site-0",)
    assert attempt(tmp_path, homes, order(run="plain", sites=sites, rounds=1)) == FAILED
    spent = []
    for run in ("first", "second"):
        assert attempt(tmp_path, homes, order(run=run, sites=sites, rounds=1, plan=NOISE)) == FINISHED
        (path,) = home.ledgers.glob("*.jsonl")
        spent.append(Ledger(path).spent().epsilon)
    assert 0 < spent[0] < spent[1]
    home.policy.write_text(policy.replace("1e6", str(spent[1] * 1.01)))
    assert attempt(tmp_path, homes, order(run="third", sites=sites, rounds=1, plan=NOISE)) == FAILED
    said = [e["reason"] for e in verify(home.journal) if e["event"] == "no reply"]
    assert any("add no noise" in reason or "contain noise" in reason for reason in said)
    assert any("is used up" in reason for reason in said)
    assert Ledger(path).spent().epsilon == spent[1]


def test_orders_with_wrong_new_fields_are_told_by_field() -> None:
    given = json.loads(order().to_json())
    for key, value, why in (
        ("external", ["A"], "a site's name"),
        ("external", ["site-0"], "both trains and does not"),
        ("external", "x", "'external' .* must be lists of names"),
        ("best", {"metric": "auc"}, "'best'"),
        ("label", "A b", "'label'"),
        ("study", {"name": "x"}, "'study'"),
        ("study", {"name": "../x", "hash": "h", "arms": []}, "a study's name"),
        ("study", {"name": "x", "hash": "h", "arms": [3]}, "each of a study's arms must contain"),
        ("study", {"name": "x", "hash": "h", "arms": [{"label": "a", "plan": {}}]}, "names no method"),
        ("mode", "shell", "'mode'"),
    ):
        with pytest.raises(InvalidRunRequest, match=why):
            RunRequest.from_json(json.dumps({**given, key: value}))


def test_a_site_reads_its_data_as_its_file_says(tmp_path: Path) -> None:
    """data.toml at the hospital, paths from its folder; what the study says of preprocessing is added."""
    make(tmp_path)
    folder = tmp_path / "hospital"
    folder.mkdir()
    (tmp_path / "all.npz").rename(folder / "pictures.npz")
    (folder / "data.toml").write_text('kind = "npz"\npath = "pictures.npz"\npatient = "patient"\n')
    held = site_data.read(folder, {"split": [0.5, 0.25, 0.25]})
    assert held.classes == ("none", "spot")
    assert set(held.roles) == {"train", "val", "test"}
    assert abs(len(set(held.roles["train"].patients)) - 33) <= 2
    an = replace(order(), external=("here",))
    plan = replace(an.build_plan(), inputs=(1, 8, 8))
    assert {role: len(data) for role, data in site_data.load(folder, an, plan, "here").roles.items()} == {"test": 132}
