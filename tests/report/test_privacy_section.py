"""The section on privacy: ε is never rounded down, and quality is compared with training without noise."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from polyclinic.evaluation.records.record_schema import rounded_up
from polyclinic.evaluation.run_evaluation import Options
from polyclinic.learning.training.dp_sgd import Spend
from polyclinic.privacy.guarantee import guarantee
from polyclinic.report import build_report
from tests.support.known import known
from tests.support.synthetic_run import write_run

FEW = Options()
WHOM = guarantee([Spend(1.0, 0.5, 1, "patient")], "patient").facts()


def built(path: Any, spends: Any, private: Any = ("fedprox", "fedbn")) -> Any:
    """A report of a run whose ``private`` methods are FedAvg with noise; FedAvg itself has none."""
    path = write_run(path, seeds=(0,), privacy=False)
    info = json.loads((path / "run.json").read_text())
    for method in info["methods"]:
        if method["label"] in private:
            method["name"] = "fedavg"
    (path / "run.json").write_text(json.dumps(info))
    with open(path / "records.jsonl", "a") as file:
        for method, round_, site, epsilon, by in spends:
            line = {"kind": "privacy", "method": method, "seed": 0, "round": round_, "site": site, "by": by}
            file.write(json.dumps(line | {"epsilon": epsilon, "delta": 1e-3, **WHOM}) + "\n")
    text = build_report(path, options=FEW).read_text(encoding="utf-8")
    return text[text.index('id="privacy"') :].split("</section>")[0]


def cells(section: Any, table: Any) -> Any:
    """The rows of a table, as texts."""
    body = known(re.search(rf'aria-label="{table}".*?</table>', section, re.S))[0]
    rows = re.findall(r"<tr.*?</tr>", body, re.S)
    return [[re.sub(r"<[^>]+>", "", c).strip() for c in re.findall(r"<t[hd].*?</t[hd]>", row, re.S)] for row in rows]


@pytest.mark.parametrize(
    ("epsilon", "told"),
    [
        (0.8992, "0.90"),
        (2.0, "2.00"),
        (1.9991, "2.00"),
        (2.0001, "2.01"),
        (46.024, "46.03"),
        (1e-5, "0.01"),
        (float("inf"), "∞"),
    ],
)
def test_an_epsilon_is_rounded_up(epsilon: Any, told: str) -> None:
    assert rounded_up(epsilon) == told


def test_spends_are_told_by_site_and_by_round_and_drawn(tmp_path: Path) -> None:
    spends = [
        ("fedprox", 1, "lyon", 1.2, "rdp"),
        ("fedprox", 12, "lyon", 1.991, "pld"),
        ("fedprox", 12, "oslo", 0.5, "pld"),
        ("fedbn", 1, "lyon", 4.0, "rdp"),
        ("fedbn", 12, "lyon", 7.9, "pld"),
        ("fedbn", 12, "oslo", 7.9, "pld"),
    ]
    section = built(tmp_path / "r", spends)
    table = cells(section, "Differential privacy spent.")
    assert [row[2] for row in table[1:]] == ["2.00", "0.50", "7.90"]
    assert table[3][1] == "lyon, oslo"
    assert {row[-1] for row in table[1:]} == {"tight"}
    by_round = cells(section, "ε spent, by round.")
    assert [row[0] for row in by_round[1:]] == ["1", "12"]
    assert [row[1:] for row in by_round[1:]] == [["1.20", "4.00"], ["2.00", "7.90"]]
    assert "Dashed: the same method without noise." in section
    assert 'aria-label="Mean AUC against the privacy budget for 2 methods' in section
    assert "No noise was added with FedAvg" in section
    assert section.count("ε is for every patient (adjacency: add or remove one patient).") == 1
    assert "For every patient, as in the table above." in section
    assert "who is in a Poisson sample stays secret" in section


def test_other_methods_without_noise_are_no_measure_of_its_cost(tmp_path: Path) -> None:
    spends = [("fedprox", 12, "lyon", 1.9, "pld"), ("fedbn", 12, "lyon", 7.9, "pld")]
    section = built(tmp_path / "r", spends, private=())
    assert "Cost of privacy: quality against ε for every patient." in section
    assert "Dashed" not in section
