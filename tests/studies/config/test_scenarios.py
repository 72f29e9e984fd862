"""Scenarios: one file, several studies, each as if it stood alone; their table; every method that fits."""

import json
import tomllib
from pathlib import Path

import numpy as np
import pytest

from polyclinic.cli.run import run_all
from polyclinic.evaluation.records.run_reader import read_run
from polyclinic.studies.config.compatible_methods import with_every_method
from polyclinic.studies.config.diagnostics import BadStudy
from polyclinic.studies.config.scenarios import parse_all
from polyclinic.studies.config.study_config import parse
from polyclinic.studies.run.scheduler import run
from tests.support.small_runs import same

TEXT = """\
name = "several"
rounds = 1

[data]
kind = "roi-phantom"
sites = "site"
subjects = 24
regions = 6

[task]
network = "mlp"
options = { width = 4, depth = 1 }

[engine]
kind = "in-process"

[[methods]]
name = "local"

[[methods]]
name = "fedavg"

[[methods]]
name = "pooled"

[[scenarios]]
name = "plain"

[[scenarios]]
name = "strong"
title = "a strong effect"
set.data.effect = 2.0
set."training.lr" = 0.2

[[scenarios]]
name = "three"
[scenarios.set.data]
sites = { partition = "iid", count = 3 }
"""


def test_each_scenario_is_the_study_that_one_would_write_by_hand() -> None:
    plain, strong, three = parse_all(TEXT)
    assert plain.study.hash == parse(TEXT.split("[[scenarios]]")[0]).hash
    assert strong.study.training.lr == 0.2
    assert strong.study.data.options["effect"] == 2.0
    assert strong.study.data.options["subjects"] == 24
    assert three.study.data.partition is not None
    for one in (plain, strong, three):
        assert parse(one.text).hash == one.study.hash
    assert len({one.folder(Path("out")) for one in (plain, strong, three)}) == 3


def test_a_file_without_scenarios_is_one_study() -> None:
    (one,) = parse_all(TEXT.split("[[scenarios]]")[0])
    assert one.name == ""
    assert one.folder(Path("out")).parent == Path("out")


WRONG = {
    "two of one name": ('name = "strong"', 'name = "plain"', 'two scenarios are called "plain"', 'name = "plain"'),
    "no name": ('name = "three"\n', "", "needs a name", "[[scenarios]]"),
    "a key beside set": ("set.data.effect = 2.0", "rounds = 2", "as in set.rounds", "rounds = 2"),
    "a wrong value": ("set.data.effect = 2.0", "set.rounds = 0", "must be at least 1", "set.rounds = 0"),
    "a wrong value for all": ("rounds = 1", "rounds = 0", "must be at least 1", "rounds = 0"),
    "nothing set": (
        'set.data.effect = 2.0\nset."training.lr" = 0.2',
        "set = 3",
        "must be a table of changed settings",
        "set = 3",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_told_once_with_their_line(name: str) -> None:
    old, new, words, line = WRONG[name]
    text = TEXT.replace(old, new, 1)
    with pytest.raises(BadStudy) as caught:
        parse_all(text)
    said = str(caught.value)
    assert words in said
    assert said.count(words) == 1
    if name != "no name":
        number = max(i for i, row in enumerate(text.splitlines(), 1) if row.strip() == line.strip())
        assert f"study.toml:{number} " in said or f"study.toml:{number}  " in said


def test_one_study_is_asked_for_where_several_cannot_run() -> None:
    with pytest.raises(BadStudy, match="several studies"):
        parse(TEXT)


def test_they_run_beside_each_other_and_resume_to_the_same_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polyclinic.cli.run.write_report", lambda folder: folder)  # the page is tested elsewhere
    found = parse_all(TEXT)
    run_all(tmp_path / "s.toml", found, False, False, tmp_path / "a", None)
    table = (tmp_path / "a" / "several" / "panel.md").read_text()
    assert all(name in table for name in ("plain", "strong", "three", "Mean ranks over 3 data sets"))
    facts = json.loads((tmp_path / "a" / "several" / "panel.json").read_text())
    assert len(facts) == 9
    picture = (tmp_path / "a" / "several" / "panel.svg").read_text()
    assert picture.startswith("<svg")
    assert "Mean rank over data sets" in picture
    run_all(tmp_path / "s.toml", found[:1], False, False, tmp_path / "b", None)
    run_all(tmp_path / "s.toml", found, True, False, tmp_path / "b", None)
    assert (tmp_path / "b" / "several" / "panel.md").read_text() == table
    for one in found:
        assert same(one.folder(tmp_path / "a"), one.folder(tmp_path / "b"))


def test_every_method_that_fits_is_found_and_the_others_are_told_with_reasons() -> None:
    data = {k: v for k, v in tomllib.loads(TEXT.split("[[methods]]")[0]).items() if k != "engine"}
    whole, out = with_every_method(data)
    names = {method["name"] for method in whole["methods"]}
    assert {"local", "pooled", "fedavg", "scaffold", "fedbn"} <= names
    told = dict(note.split(" is left out: ", 1) for note in out)
    assert "lc-fed" in told
    assert not told.keys() & names
    assert all(told.values())
    assert with_every_method({**data, "methods": [{"name": "fedavg"}]})[0]["methods"] == [{"name": "fedavg"}]


def test_the_examples_are_studies() -> None:
    root = Path(__file__).parents[3] / "examples"
    for file in ("survey.toml", "survey-adni.toml"):
        assert all(one.study.folds == 5 for one in parse_all((root / file).read_text(), file))
    data = tomllib.loads((root / "panel.toml").read_text())
    assert len({one["name"] for one in data["scenarios"]}) == 8


def test_tables_laid_out_like_adnis_run_through_the_surveys_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, rows = np.random.default_rng(0), []
    for i in range(60):
        phase, sick = ("ADNI1", "ADNI2")[i % 2], i // 2 % 2
        volumes = rng.normal(2.0 - 0.5 * sick, 0.3, 5) * (1.0, 1.2)[i % 2]
        rows.append(f"{4000 + i},{phase},{('CN', 'AD')[sick]}," + ",".join(f"{v:.4f}" for v in volumes))
    rows.append(rows[0])  # the same subject scanned twice
    head = "RID,COLPROT,DX,Hippocampus_L,Hippocampus_R,Amygdala_L,Amygdala_R,ParaHippocampal_L"
    (tmp_path / "adni_roi.csv").write_text("\n".join([head, *rows]) + "\n")
    monkeypatch.setenv("ADNI_TABLES", str(tmp_path))
    text = (Path(__file__).parents[3] / "examples" / "survey-adni.toml").read_text()
    study = parse(text, changes={"rounds": 2, "seeds": [0], "folds": 2, "engine.kind": "in-process"})
    list(run(study, text, tmp_path / "run"))
    read = read_run(tmp_path / "run")
    assert {s.name for s in read.info.sites} == {"adni1", "adni2"}
    assert sum(s.patients["test"] for s in read.info.sites) == 60
    assert {label for label, _ in read.arms} == {"cross", "local", "pooled", "fedavg", "fedsgd", "fedprox"}
