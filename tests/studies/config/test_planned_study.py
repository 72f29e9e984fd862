"""A study takes preprocessing, patch, network and batch from a plan, whose contents belong to its hash."""

from pathlib import Path
from typing import Any

import pytest

from polyclinic.data.config import DataSpec
from polyclinic.data.fingerprint.nnunet_plan import text_of
from polyclinic.data.fingerprint.nnunet_planner import planned
from polyclinic.data.paired_folders import Pairs
from polyclinic.studies.config import study_config
from polyclinic.studies.config.loader import named_plan
from polyclinic.studies.config.planned_study import with_plan
from polyclinic.studies.run import deployment
from tests.data.fingerprint.test_nnunet_planner import pooled


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """nnU-Net's plan of the hippocampus, 8 features wide."""
    facts, wanted, size = pooled("hippocampus")
    about = {"study": "hippo", "data": "0", "seed": 0, "patients": 260}
    file = tmp_path / "hippo.plan.toml"
    file.write_text(text_of(planned(facts, wanted, size), facts, wanted, "3d_fullres", about, 8))
    return file


def tables(plan: Path, **task: Any) -> dict[str, Any]:
    return {"data": {"kind": "pairs", "path": "/data", "plan": str(plan)}, "task": {"kind": "segmentation", **task}}


def test_keys_that_are_set_remain(plan: Path) -> None:
    data, problems = with_plan(tables(plan, network="nnunet", options={"width": 16}))
    assert not problems
    assert "plan" not in data["data"]
    assert [step["step"] for step in data["data"]["steps"]] == ["crop_nonzero", "normalize", "resample_cubic"]
    assert data["data"]["patch"] == [40, 56, 40]
    assert data["task"]["options"]["width"] == 16
    assert data["task"]["options"]["strides"] == [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]]
    assert data["task"]["options"]["deep_supervision"] is True
    assert data["task"]["batch_dice"] is False
    assert data["training"] == {"batch_size": 9}
    data, _ = with_plan({**tables(plan, network="nnunet"), "training": {"batch_size": 2, "steps": 5}})
    assert data["training"] == {"batch_size": 2, "steps": 5}
    assert data["task"]["options"]["width"] == 8


def test_other_networks_take_patch_and_batch_only(plan: Path) -> None:
    data, problems = with_plan(tables(plan, network="unet", options={"width": 16}))
    assert not problems
    assert data["task"] == {"kind": "segmentation", "network": "unet", "options": {"width": 16}}
    assert data["data"]["patch"] == [40, 56, 40]


def test_an_edited_plan_is_another_study(plan: Path) -> None:
    before, _ = with_plan(tables(plan, network="nnunet"))
    plan.write_text(
        plan.read_text().replace("width = 8", "width = 12").replace("mm = [1.0, 1.0, 1.0]", "mm = [1.0, 1.0, 2.0]")
    )
    after, _ = with_plan(tables(plan, network="nnunet"))
    assert before["task"]["options"]["width"] != after["task"]["options"]["width"]
    assert before["data"]["steps"] != after["data"]["steps"]


def test_a_plan_of_preprocessing_alone_is_left_to_the_data(tmp_path: Path) -> None:
    file = tmp_path / "a.plan.toml"
    file.write_text('version = 1\nstudy = "a"\n[use]\nsteps = []\n')
    given = tables(file)
    assert with_plan(given) == (given, [])
    assert named_plan({"data": {"use": "x"}}) is None
    assert named_plan({"data": {"use": "x", "plan": 3}}) is None
    assert named_plan({"data": 3}) is None


def test_mistakes_are_named(plan: Path) -> None:
    def problem(**changes: Any) -> tuple[tuple[Any, ...], str]:
        data = tables(plan, network=changes.pop("network", "nnunet"))
        data["data"] |= changes
        _, (one,) = with_plan(data)
        return tuple(one.path), one.says

    assert problem(plan="nnunet") == (
        ("data", "plan"),
        "`polyclinic run` plans by itself; here, write the plan with `polyclinic plan STUDY` and name its file",
    )
    assert problem(plan="/nowhere.toml")[0] == ("data", "plan")
    where, says = problem(patch=[8, 8, 8])
    assert where == ("data", "patch")
    assert "determines patch too" in says
    where, says = problem(network="resenc")
    assert where == ("task", "network")
    assert 'for the network "nnunet"' in says
    plan.write_text(plan.read_text().replace("patch = [40,", "patch = [41,", 1))
    assert "41 is no multiple of the strides' 8" in problem()[1]


def test_a_hospital_can_name_a_plan_too(plan: Path, tmp_path: Path) -> None:
    """In data.toml there is no task: the steps and the patch are taken."""
    (tmp_path / "imagesTr").mkdir()
    (tmp_path / "labelsTr").mkdir()
    spec = DataSpec.model_validate({"kind": "pairs", "path": str(tmp_path), "plan": str(plan)})
    source = spec.source()
    assert isinstance(source, Pairs)
    assert [step.name for step in source.steps] == ["crop_nonzero", "normalize", "resample_cubic"]
    assert source.patch == (40, 56, 40)


STUDY = """
name = "hippo"
rounds = 1
[data]
kind = "pairs"
path = "/data"
plan = "PLAN"
[task]
kind = "segmentation"
network = "nnunet"
[[methods]]
name = "fedavg"
"""


def test_the_contents_of_a_plan_belong_to_the_hash_and_go_to_the_sites(plan: Path, tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    file.write_text(STUDY.replace("PLAN", str(plan)))
    (tmp_path / "data").mkdir()
    before = study_config.read(file, {"data.path": str(tmp_path / "data")})
    assert before.training.batch_size == 9
    sent = deployment.how(before)["data"]
    assert sent["patch"] == [40, 56, 40]
    assert [step["step"] for step in sent["steps"]] == ["crop_nonzero", "normalize", "resample_cubic"]
    (arm,), _ = deployment.method_runs(before, ["a", "b"])
    assert arm["plan"]["network_options"]["strides"][0] == [1, 1, 1]
    assert arm["plan"]["training"]["batch_size"] == 9
    plan.write_text(plan.read_text().replace("width = 8", "width = 12"))
    after = study_config.read(file, {"data.path": str(tmp_path / "data")})
    assert before.hash != after.hash
