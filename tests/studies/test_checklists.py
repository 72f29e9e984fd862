"""Checklists: every item is there, and none is ticked without something in the run that supports it."""

import json

import pytest

from polyclinic.studies.checklists import ALL, FACTS, counts, fill, load
from polyclinic.studies.evaluation import Options, evaluate
from polyclinic.studies.records import read_run
from tests.studies.made_run import write_run

SIZES = {"federated_healthcare": 26, "claim_2024": 44, "tripod_ai": 27, "future_ai": 30}
FEW = Options(draws=100)


@pytest.mark.parametrize("name", ALL)
def test_every_item_is_there_once(name):
    items = load(name).items
    assert len(items) == SIZES[name]
    assert len({i.id for i in items}) == len({i.text for i in items}) == len(items)
    assert all(len(i.text.split()) <= 14 for i in items)


def test_every_fact_is_asked_for_by_some_item():
    asked = {i.fact for name in ALL for i in load(name).items if i.fact}
    assert asked <= FACTS.keys()
    assert FACTS.keys() - asked <= {"tests"}


def test_an_unknown_checklist_is_refused():
    with pytest.raises(ValueError, match="no checklist called 'claim'; there are federated_healthcare, claim_2024"):
        load("claim")


def ticked(path, name="federated_healthcare", journal=(0, "", "")):
    run = read_run(path)
    return {a.item.id for a in fill(load(name), run, evaluate(run, FEW), journal) if a.status == "shown"}


def test_an_empty_run_ticks_nothing(tmp_path):
    path = write_run(tmp_path / "r", seeds=(0,))
    info = {"name": "x", "task": "classification", "metric": "auc", "sites": [{"name": "a"}], "methods": []}
    (path / "run.json").write_text(json.dumps(info))
    for file in ("records.jsonl", "study.toml"):
        (path / file).unlink()
    assert [ticked(path, name) for name in ALL] == [set()] * 4


@pytest.mark.parametrize(
    ("item", "how", "why_not"),
    [
        ("1", {"simulated": None}, {"simulated": "Made by a program."}),
        ("3", {}, {"sites": {"ada": ("training", 30, 0.5, 0, 0), "bo": ("training", 30, 0.5, 0, 0)}}),
        ("7", {"privacy": True}, {"privacy": False}),
        ("11", {}, {"methods": ("single", "fedavg")}),
        ("12", {}, {"methods": ("mix", "fedavg")}),
        ("13", {"seeds": (0, 1)}, {"seeds": (0,)}),
        ("14", {}, {"task": "segmentation"}),
        ("20", {}, {"methods": ("single", "fedavg", "fedprox")}),
    ],
)
def test_what_ticks_a_row_and_what_does_not(tmp_path, item, how, why_not):
    usual = {"seeds": (0,)}
    assert item in ticked(write_run(tmp_path / "yes", **{**usual, **how}))
    assert item not in ticked(write_run(tmp_path / "no", **{**usual, **why_not}))


def test_a_test_set_opened_twice_is_not_sealed(tmp_path):
    path = write_run(tmp_path / "r", seeds=(0,))
    assert "16" in ticked(path)
    text = (path / "records.jsonl").read_text()
    (path / "records.jsonl").write_text(text.replace('"opened": 1', '"opened": 2', 1))
    assert "16" not in ticked(path)


def test_the_audit_trail_needs_a_journal_that_holds(tmp_path):
    path = write_run(tmp_path / "r", seeds=(0,))
    assert "22" not in ticked(path)
    assert "22" in ticked(path, journal=(12, "ab" * 32, ""))
    assert "22" not in ticked(path, journal=(12, "ab" * 32, "line 3 was changed"))


def test_patients_apart_needs_the_check_and_not_the_claim(tmp_path):
    path = write_run(tmp_path / "r", seeds=(0,))
    assert "15" not in ticked(path)
    info = json.loads((path / "run.json").read_text())
    info["data"]["checks"] = ["patients_apart"]
    (path / "run.json").write_text(json.dumps(info))
    assert "15" in ticked(path)


def test_what_only_a_person_knows_is_left_to_a_person(tmp_path):
    run = read_run(write_run(tmp_path / "r", seeds=(0, 1)))
    answers = fill(load("claim_2024"), run, evaluate(run, FEW))
    by_id = {a.item.id: a.status for a in answers}
    assert {by_id[k] for k in ("1", "3", "16", "40", "44")} == {"person"}
    assert sum(counts(answers).values()) == 44
    assert all(bool(a.evidence) == (a.status == "shown") for a in answers)
