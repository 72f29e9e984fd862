"""Groups of patients: who is in them, that they are a part of the whole, and that the small ones cannot be worked out."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from polyclinic.data.source import Table
from polyclinic.evaluation.metric_functions import measure
from polyclinic.evaluation.records.run_reader import read_run
from polyclinic.evaluation.run_evaluation import evaluate
from polyclinic.evaluation.subgroup_results import by_group, groups_of, write_groups
from polyclinic.report import build_report
from tests.report.test_report import FEW, LITTLE
from tests.support.known import known
from tests.support.synthetic_run import write_groups as make_groups
from tests.support.synthetic_run import write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_run(tmp_path_factory.mktemp("runs") / "r", sites=LITTLE, seeds=(0,), methods=("local", "fedavg"))


def told(path: Any, groups: Any) -> Any:
    (path / "groups.json").write_text(json.dumps(groups))
    return {a.name: a for a in by_group(read_run(path), "fedavg", 0.95)}


def test_columns_that_are_known_make_groups() -> None:
    table = Table(
        tuple("abcdef"),
        ("p", "p", "q", "r", "r", "s"),
        None,
        {
            "Sex": ("F", "F", "M", "F", "M", "M"),
            "age": ("30", "30", "61Y", "?", "?", "80"),
            "site": ("x",) * 6,
            "scanner": ("A", "A", "A", "A", "A", "A"),
            "diameter": ("1",) * 6,
        },
        ("site",),
    )
    found = groups_of(table, {"p": 0, "q": 1, "r": 2, "s": 3})
    assert found == {
        "Sex": {"F": [0], "M": [1, 3]},  # of r the column says two things
        "age": {"below 40": [0], "60 to 74": [1], "75 and above": [3]},
    }


def test_a_column_that_names_the_sites_is_no_group(tmp_path: Path) -> None:
    table = Table(("a", "b"), ("a", "b"), None, {"scanner": ("x", "y")}, ("scanner",))
    write_groups(tmp_path, table, {"a": 0, "b": 1})
    assert not (tmp_path / "groups.json").exists()


def test_a_group_of_everybody_is_the_whole_and_each_is_by_hand(run: Any) -> None:
    tensors = load_file(run / "arms" / "fedavg-seed0" / "predictions.safetensors")
    everybody = list(range(40))
    groups = told(
        run, {"sex": {"odd": everybody[1::2], "even": everybody[::2]}, "all": {"a": everybody, "b": everybody}}
    )
    tables = [np.bincount(tensors[f"{s}/target"]).prod() for s in LITTLE]  # pairs of a positive and a negative patient
    each = [known(evaluate(read_run(run), FEW).of("fedavg").sites[s]["auc"].value) for s in LITTLE]
    whole = float(np.average(each, weights=tables))
    assert [g.estimate.value for g in groups["all"].groups] == pytest.approx([whole, whole])
    assert groups["all"].groups[0].difference.why == "the groups have patients in common"
    for group, parity in zip(groups["sex"].groups, (1, 0), strict=True):
        rows = {s: tensors[f"{s}/patient"] % 2 == parity for s in LITTLE}
        targets = [tensors[f"{s}/target"][rows[s]] for s in LITTLE]
        scores = [tensors[f"{s}/score"][rows[s]].astype(float) for s in LITTLE]
        aucs = np.array([measure("classification", p, y)["auc"] for p, y in zip(scores, targets, strict=True)])
        assert group.estimate.value == pytest.approx(np.average(aucs, weights=[np.bincount(y).prod() for y in targets]))
        assert group.estimate.low < group.estimate.value <= group.estimate.high
        assert group.patients == sum(map(len, targets))


def test_small_groups_are_hidden_and_cannot_be_worked_out(run: Any) -> None:
    one = told(run, {"sex": {"F": list(range(36)), "M": list(range(36, 40))}})["sex"]  # bo has numbers up to 29
    assert not one.groups
    assert "fewer than 10 patients could be identified" in one.why
    two = told(run, {"sex": {"F": list(range(20)), "M": list(range(31, 35)), "X": list(range(33, 40))}})["sex"]
    assert [(g.name, g.patients, g.estimate.value is None) for g in two.groups] == [
        ("F", 40, False),
        ("M", 0, True),
        ("X", 0, True),
    ]
    assert not told(run, {"sex": {"F": list(range(40))}})


def test_a_study_writes_groups_and_the_page_shows_them(tmp_path: Path) -> None:
    path = write_run(tmp_path / "r", seeds=(0,))
    assert "Groups of patients" not in build_report(path, options=FEW).read_text(encoding="utf-8")
    make_groups(path)
    page = build_report(path, options=FEW)
    text = page.read_text(encoding="utf-8")
    assert "sex: female" in text
    assert "Differences are from the largest group" in text
    rows = (page.parent / "tables" / "groups.csv").read_text().splitlines()
    assert rows[1].startswith("sex,female,")
    assert rows[3].startswith("age,not shown: a group of fewer than 10 patients could be identified")
