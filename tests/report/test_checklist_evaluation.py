"""Checklists: every item is there, and none is ticked without something in the run that supports it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from polyclinic.evaluation.records.run_reader import read_run
from polyclinic.evaluation.run_evaluation import Options, evaluate
from polyclinic.report import build_report
from polyclinic.report.checklist_evaluation import ALL, FACTS, counts, fill, load
from tests.support.synthetic_run import write_groups, write_maps, write_run

SIZES = {"federated_healthcare": 26, "claim_2024": 44, "tripod_ai": 27, "future_ai": 30}
FEW = Options()


@pytest.mark.parametrize("name", ALL)
def test_every_item_is_there_once(name: str) -> None:
    items = load(name).items
    assert len(items) == SIZES[name]
    assert len({i.id for i in items}) == len({i.text for i in items}) == len(items)
    assert all(len(i.text.split()) <= 14 for i in items)


def test_every_fact_is_asked_for_by_some_item() -> None:
    asked = {i.fact for name in ALL for i in load(name).items if i.fact}
    assert asked <= FACTS.keys()
    assert FACTS.keys() - asked <= {"tests"}


def test_an_unknown_checklist_is_refused() -> None:
    with pytest.raises(ValueError, match="no checklist called 'claim'; there are federated_healthcare, claim_2024"):
        load("claim")


def ticked(path: Any, name: Any = "federated_healthcare", journal: Any = (0, "", "")) -> Any:
    run = read_run(path)
    return {a.item.id for a in fill(load(name), run, evaluate(run, FEW), journal) if a.status == "shown"}


def test_an_empty_run_ticks_nothing(tmp_path: Path) -> None:
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
        ("11", {}, {"methods": ("local", "fedavg")}),
        ("12", {}, {"methods": ("pooled", "fedavg")}),
        ("13", {"seeds": (0, 1)}, {"seeds": (0,)}),
        ("14", {}, {"task": "segmentation"}),
        ("20", {}, {"methods": ("local", "fedavg", "fedprox")}),
    ],
)
def test_what_ticks_a_row_and_what_does_not(tmp_path: Path, item: str, how: Any, why_not: Any) -> None:
    usual = {"seeds": (0,)}
    assert item in ticked(write_run(tmp_path / "yes", **{**usual, **how}))
    assert item not in ticked(write_run(tmp_path / "no", **{**usual, **why_not}))


@pytest.mark.parametrize(
    ("name", "item", "make"),
    [
        ("federated_healthcare", "24", write_maps),
        ("claim_2024", "31", write_maps),
        ("future_ai", "Explainability 2", write_maps),
        ("tripod_ai", "14", write_groups),
    ],
)
def test_a_file_in_the_run_folder_ticks_its_row(tmp_path: Path, name: str, item: str, make: Any) -> None:
    path = write_run(tmp_path / "r", seeds=(0,))
    assert item not in ticked(path, name)
    make(path)
    assert item in ticked(path, name)


def test_two_budgets_show_what_privacy_costs_and_one_does_not(tmp_path: Path) -> None:
    path = write_run(tmp_path / "r", seeds=(0,))
    assert "7" in ticked(path)
    assert "8" not in ticked(path)
    line = {"kind": "privacy", "method": "fedbn", "seed": 0, "round": 12, "site": "lyon", "epsilon": 8.0, "delta": 1e-5}
    with open(path / "records.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    assert "8" in ticked(path)
    page = build_report(path, options=FEW).read_text(encoding="utf-8")
    assert "Cost of privacy: quality against ε for every patient." in page
    assert "Quality against communication." in page


def test_methods_without_a_server_and_by_contribution_are_seen(tmp_path: Path) -> None:
    path = write_run(tmp_path / "r", seeds=(0,))
    assert not {"10", "21"} & ticked(path)
    info = json.loads((path / "run.json").read_text())
    info["methods"][2]["name"], info["methods"][3]["name"] = "gossip", "fedce"
    (path / "run.json").write_text(json.dumps(info))
    assert {"10", "21"} <= ticked(path)


# The page of what the product shows for every row


PAGE = Path(__file__).parents[2] / "docs" / "explanation" / "checklist.md"


def rows_of(text: Any) -> Any:
    return [
        [cell.strip() for cell in line.strip("| \n").split("|")]
        for line in text.splitlines()
        if re.match(r"\| \d", line)
    ]


def test_the_page_has_every_row_in_the_words_of_the_report() -> None:
    rows = rows_of(PAGE.read_text(encoding="utf-8"))
    assert [(r[0], r[1]) for r in rows] == [(i.id, i.text) for i in load("federated_healthcare").items]
    assert all(len(r) == 4 for r in rows)


def test_every_test_and_file_that_the_page_names_is_there() -> None:
    """A row without a test says that it is open. The tests themselves are run like all others."""
    root = PAGE.parents[2]
    for row, _, feature, shown in rows_of(PAGE.read_text(encoding="utf-8")):
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", shown)
        assert named or shown.startswith("open"), f"row {row} names no test and is not called open"
        for file, test in named:
            assert re.search(rf"^def {test}\(", (root / file).read_text(encoding="utf-8"), re.M), f"row {row}: {test}"
        for target in re.findall(r"\]\(([^)#]+)\)", feature + shown):
            assert (PAGE.parent / target).is_file(), f"row {row}: {target}"


def test_a_test_set_opened_twice_is_not_sealed(tmp_path: Path) -> None:
    path = write_run(tmp_path / "r", seeds=(0,))
    assert "16" in ticked(path)
    text = (path / "records.jsonl").read_text()
    (path / "records.jsonl").write_text(text.replace('"opened": 1', '"opened": 2', 1))
    assert "16" not in ticked(path)


def test_the_audit_trail_needs_a_journal_that_holds(tmp_path: Path) -> None:
    path = write_run(tmp_path / "r", seeds=(0,))
    assert "22" not in ticked(path)
    assert "22" in ticked(path, journal=(12, "ab" * 32, ""))
    assert "22" not in ticked(path, journal=(12, "ab" * 32, "line 3 was changed"))


def test_patients_apart_needs_the_check_and_not_the_claim(tmp_path: Path) -> None:
    path = write_run(tmp_path / "r", seeds=(0,))
    assert "15" not in ticked(path)
    info = json.loads((path / "run.json").read_text())
    info["data"]["checks"] = ["patients_apart"]
    (path / "run.json").write_text(json.dumps(info))
    assert "15" in ticked(path)


def test_what_only_a_person_knows_is_left_to_a_person(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "r", seeds=(0, 1)))
    answers = fill(load("claim_2024"), run, evaluate(run, FEW))
    by_id = {a.item.id: a.status for a in answers}
    assert {by_id[k] for k in ("1", "3", "16", "40", "44")} == {"person"}
    assert sum(counts(answers).values()) == 44
    assert all(bool(a.evidence) == (a.status == "shown") for a in answers)
