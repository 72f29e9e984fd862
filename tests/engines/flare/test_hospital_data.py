"""Which files, columns and patients are read is the hospital's to say; the server sets nothing but what is listed."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polyclinic.data.config import KINDS, DataSpec
from polyclinic.data.examples import DataError, Examples
from polyclinic.engines.flare.client import site_data
from polyclinic.engines.flare.client.reviews import Reviews
from polyclinic.engines.flare.client.site_data import UnsuitableData
from polyclinic.engines.flare.protocol import data_restrictions
from polyclinic.engines.flare.protocol.paths import SetupError, SiteFolder
from polyclinic.engines.flare.protocol.run_request import RunRequest, survey_plan
from polyclinic.engines.site_description import describe
from polyclinic.studies.config import study_config
from polyclinic.studies.run import deployment
from tests.conftest import little_sites
from tests.engines.flare.test_approval import Server, events
from tests.support.clinics import STUDY, make
from tests.support.known import known
from tests.support.local_deployment import make_site, order, read_and_approve

TOWNS = ("Zurich-8001", "Basel-4051", "Winterthur-8400")


@pytest.fixture
def home(tmp_path: Path) -> SiteFolder:
    """A hospital whose table has a column that was not requested, next to a file that was not mentioned."""
    home = make_site(tmp_path / "site", "site-0", little_sites(count=1)["site-0"])
    data = home.path / "data"
    for path in data.iterdir():
        path.unlink()
    rng = np.random.default_rng(2)
    with open(data / "heart.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["age", "pressure", "postcode", "num"])
        for i in range(60):
            rows.writerow([30 + rng.integers(40), 100 + rng.integers(60), TOWNS[i % 3], i % 2])
    (data / "data.toml").write_text('kind = "table"\npath = "heart.csv"\nlabel = "num"\nleave_out = ["postcode"]\n')
    (tmp_path / "payroll.csv").write_text("age,reason\n" + "".join(f"{i},{'abc'[i % 3]}\n" for i in range(60)))
    return home


def survey(run: str, table: dict[str, Any]) -> RunRequest:
    return RunRequest.from_json(
        json.dumps({"run": run, "mode": "survey", "plan": survey_plan(["site-0"]), "data": table, "patience": 5.0})
    )


def attempt(home: SiteFolder, table: dict[str, Any]) -> tuple[str, dict[str, Any] | None]:
    """A server that asks for a survey of data as ``table`` says, and a person who approves whatever can be approved."""
    server = Server({"site-0": home}, survey("s", table))
    told = server.hello()
    try:
        read_and_approve(home, "s")
    except SetupError:
        return told, None
    told = server.hello()
    lost, file = server.ask()
    if file is None:
        return told or lost, None
    from polyclinic.engines.flare.protocol import tensor_file

    return told, json.loads(bytes(tensor_file.read(file).parts["describe"].items["site-0"]["text"].tolist()))


ATTACKS = [
    {"label": "postcode", "threshold": None, "leave_out": []},
    {"path": "PAYROLL", "label": "reason", "threshold": None, "leave_out": []},
    {"path": "../../payroll.csv", "label": "reason"},
    {"path": "$HOME/../etc/passwd", "label": "root:x:0:0:root:/root:/bin/bash"},
    {"max_patients": 10, "min_patients": 10},
    {"plan": "/etc/passwd"},
    {"use": "heart"},
    {"leave_out": ["age"]},
    {"rehearsal": True, "label": "postcode"},
    {"surprise": 1},
]


@pytest.mark.parametrize("table", ATTACKS, ids=lambda table: next(iter(table)))
def test_the_server_chooses_no_file_column_or_patient(home: SiteFolder, table: dict[str, Any]) -> None:
    asked = {
        key: str(home.path.parent / "payroll.csv") if value == "PAYROLL" else value for key, value in table.items()
    }
    told, said = attempt(home, asked)
    assert said is None
    assert told.startswith("refused by the site's policy: ")
    for key in asked:
        assert f"the study sets {key} = " in told
    problems = known(Reviews(home.reviews).get("s")).problems
    assert len(problems) == len(asked)
    assert not [e for e in events(home) if e["event"] == "answered"]


def test_the_honest_survey_names_no_class_and_no_column(home: SiteFolder) -> None:
    told, found = attempt(home, {"split": [0.5, 0.25, 0.25], "scale": True})
    assert told == ""
    said = known(found)
    assert said["inputs"] == [2]
    assert said["outputs"] == 2
    assert said["classes"] == []
    assert sum(role["patients"] for role in said["roles"].values()) == 60
    assert abs(said["roles"]["train"]["patients"] - 30) <= 1


def test_class_names_leave_only_where_the_policy_lets_them(home: SiteFolder) -> None:
    home.policy.write_text("[allow]\nclass_names = true\n")
    assert known(attempt(home, {})[1])["classes"] == ["0", "1"]


def test_classes_are_counted_though_they_are_not_named() -> None:
    data = {
        "train": Examples(torch.zeros(8, 2), torch.zeros(8, dtype=torch.long), tuple("abcdefgh"), tuple("abcdefgh"))
    }
    for named in (False, True):
        found = describe(data, "classification", ("none", "one", "two"), named=named)
        assert found["outputs"] == 3
        assert found["classes"] == (["none", "one", "two"] if named else [])


def test_every_key_that_says_what_is_read_is_refused() -> None:
    """Of all keys that a [data] table knows, for every kind of data, only the listed ones come from a study."""
    import dataclasses
    import importlib

    known = {*DataSpec.model_fields}
    for module, name in KINDS.values():
        known |= {f.name for f in dataclasses.fields(getattr(importlib.import_module(module), name))}
    assert set(data_restrictions.FROM_STUDY) <= known
    for key in (
        "path",
        "use",
        "kind",
        "label",
        "labels",
        "leave_out",
        "features",
        "patient",
        "site",
        "sites",
        "external",
        "max_patients",
        "min_patients",
        "threshold",
        "plan",
        "root",
        "images",
        "mask",
        "masks",
        "classes",
        "declared",
        "annotations",
        "public",
        "levels",
        "about",
        "suffix",
        "session",
        "regression",
    ):
        assert key in known, key
        assert data_restrictions.refused({key: 1}) == [
            f"the study sets {key} = 1 of the data, which only the hospital sets, in data.toml"
        ]
    assert data_restrictions.refused(dict.fromkeys(data_restrictions.FROM_STUDY, 1)) == []
    assert data_restrictions.refused({"rehearsal": True}) == []
    assert data_restrictions.refused({"rehearsal": False}) != []
    assert "…" in data_restrictions.refused({"label": "x" * 1000})[0]


def test_where_both_speak_and_differ_nothing_runs_until_people_agree(home: SiteFolder) -> None:
    toml = home.path / "data" / "data.toml"
    toml.write_text(toml.read_text() + "split = [0.6, 0.2, 0.2]\n")
    told, said = attempt(home, {"split": [0.5, 0.25, 0.25], "scale": True})
    assert said is None
    assert told == "refused: the study and this hospital set different values for its data: split"
    here = known(Reviews(home.reviews).get("s")).data
    assert "the study asks for [0.5, 0.25, 0.25], and data.toml here says [0.6, 0.2, 0.2]" in here
    with pytest.raises(UnsuitableData):
        site_data.read(home.path / "data", {"split": [0.5, 0.25, 0.25]})
    same = site_data.read(home.path / "data", {"split": [0.6, 0.2, 0.2]})
    own = site_data.read(home.path / "data", {})
    assert {r: d.patients for r, d in same.roles.items()} == {r: d.patients for r, d in own.roles.items()}


def test_conflicts_are_told_by_key_and_a_plan_prepares_alone() -> None:
    own = {"plan": "plan.json", "fill": "mean", "scale": False, "split": "official"}
    found = data_restrictions.conflicts(
        own, {"steps": [], "fill": "mean", "scale": True, "split": "official", "near_duplicates": "report"}
    )
    assert found.keys() == {"steps", "scale"}
    assert "`plan`" in found["steps"]
    assert data_restrictions.conflicts({}, {"steps": []}) == {}
    assert data_restrictions.conflicts({"label": "a"}, {"label": "b"}) == {}, "that is refused, and no conflict"


@pytest.mark.parametrize("text", ["label = ", "\xff", "[" * 20_000])
def test_a_data_toml_that_is_none_is_told_at_the_site_and_not_to_the_server(home: SiteFolder, text: str) -> None:
    (home.path / "data" / "data.toml").write_bytes(text.encode("latin-1"))
    told, said = attempt(home, {})
    assert said is None
    assert told == f"refused: {site_data.UNREADABLE}"
    assert "data.toml" in known(Reviews(home.reviews).get("s")).data


def test_what_is_wrong_with_the_data_is_told_without_values(home: SiteFolder) -> None:
    toml = home.path / "data" / "data.toml"
    toml.write_text('kind = "table"\npath = "heart.csv"\nlabel = "Basel-4051"\n')
    told, _ = attempt(home, {})
    assert told == f"refused: {site_data.UNREADABLE}"
    assert "Basel" not in "".join(json.dumps(e) for e in events(home))


def test_a_folder_without_examples_is_told(home: SiteFolder, tmp_path: Path) -> None:
    (home.path / "data" / "data.toml").unlink()
    with pytest.raises(DataError, match=r"nor a data\.toml"):
        site_data.read(home.path / "data", {})
    assert data_restrictions.of_hospital(home.path / "data") is None
    np.savez(home.path / "data" / "unlabeled.npz", inputs=np.zeros((3, 2), np.float32), targets=np.zeros(3, np.int64))
    an = replace(order(plan={"network": "mlp", "inputs": [2]}), external=("here",))
    with pytest.raises(UnsuitableData) as found:
        site_data.load(home.path / "data", an, an.build_plan(), "here")
    assert found.value.reported == "there are no examples here for this study"


def test_a_coordinator_sends_what_sites_take_and_says_what_it_keeps(tmp_path: Path) -> None:
    text = STUDY.replace(
        'patient = "patient"', 'patient = "patient"\nsplit = [0.5, 0.2, 0.3]\nclasses = ["none", "spot"]'
    )
    study = study_config.read(make(tmp_path, text)[0])
    assert deployment.how(study)["data"] == {"split": [0.5, 0.2, 0.3]}
    assert data_restrictions.refused(deployment.how(study)["data"]) == []
    _, notes = deployment.method_runs(study, ("lyon", "osaka", "oslo"))
    assert "[data] classes, patient: not sent; each hospital says this of its own data, in its data.toml" in notes
