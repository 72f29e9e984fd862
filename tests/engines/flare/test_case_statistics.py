"""The statistics of cases between hospitals: only sums leave, and the plan is that of one machine."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polyclinic.core import serialization as states
from polyclinic.data.config import DataSpec
from polyclinic.data.federation import rows_by_site
from polyclinic.data.preprocessing.previous_stage import PreviousStage
from polyclinic.engines.flare.protocol import data_restrictions, tensor_file
from polyclinic.engines.flare.protocol.paths import SiteFolder
from polyclinic.engines.flare.protocol.run_request import RunRequest
from polyclinic.engines.plan import Plan
from polyclinic.engines.policy import site_policy as policies
from polyclinic.learning.tasks.case_sums import sums_of
from polyclinic.studies.config import study_config
from polyclinic.studies.inference.previous_stage import previous_stage
from polyclinic.studies.run import case_planning, deployment
from polyclinic.testing import equal
from tests.conftest import little_sites
from tests.studies.run.test_case_planning import STUDY, write_pairs
from tests.support.data_sets import read_sites
from tests.support.flare_deployment import PATIENCE, Hospitals, reference, study
from tests.support.local_deployment import LocalCarrier, approve, coordinator, make_site, order

PLAN = {"network": "mlp", "inputs": [1], "outputs": 1, "network_options": {}}


def houses(root: Path, policy: str = policies.DEFAULT) -> dict[str, SiteFolder]:
    """Three hospitals with nnU-Net's layout, each in other sizes, and a data.toml that reads it without a resize."""
    homes = {}
    for k, (name, site) in enumerate(little_sites(count=3).items()):
        homes[name] = make_site(root / name, name, site, policy)
        write_files(root / name / "files", k)
        homes[name].settings.write_text(f'site = "{name}"\ndata = "{root / name / "files"}"\n')
    return homes


def write_files(folder: Path, k: int) -> None:
    """Write the images of hospital ``k``, and how they are read."""
    write_pairs(folder / "set", 16, (0.8, 0.8, 2.4 + 0.1 * k))
    (folder / "data.toml").write_text('kind = "pairs"\npath = "set"\nsplit = [0.75, 0.0, 0.25]\n')


def test_hospitals_send_sums_of_images_of_unequal_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYCLINIC_CACHE", str(tmp_path / "cache"))
    homes = houses(tmp_path)
    an = order("case-statistics", rounds=1, plan=PLAN)
    for home in homes.values():
        approve(home, an)
    carrier = LocalCarrier(homes, an)
    assert coordinator(tmp_path, an, carrier).run() == "finished"
    sums = case_planning.read_statistics(tmp_path / "server" / an.run / "checkpoint.safetensors")
    assert int(sums["cases"][0]) == 3 * 12
    together = {}
    for name in homes:
        spec = DataSpec.model_validate(
            {
                "kind": "pairs",
                "path": str(tmp_path / name / "files" / "set"),
                "split": [0.75, 0.0, 0.25],
                "sites": {"partition": "iid", "count": 1},
            }
        )
        (together[name],) = rows_by_site(spec, an.plan["seed"], spec.source()).values()
    expected = case_planning.statistics(together, True)
    assert all(torch.equal(sums[name], leaf) for name, leaf in expected.items())
    made = case_planning.plan(spec, "spots", channels=["CT"], sums=sums, width=8)
    assert made.configuration == "3d_fullres"
    assert "transpose" not in made.text
    assert "case0" not in made.text


RECIPE = """
name = "spots"
rounds = 2
[data]
use = "elsewhere"
plan = "PLAN"
split = [0.75, 0.0, 0.25]
[task]
kind = "segmentation"
network = "nnunet"
[training]
recipe = "nnunet"
steps = 2
batch_size = 2
[[methods]]
name = "fedavg"
"""


@pytest.mark.slow
def test_a_study_with_the_recipe_of_nnunet_runs_from_the_plan_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three hospitals send sums, the plan is made from them, and the study that uses it has the bits of one process."""
    monkeypatch.setenv("POLYCLINIC_CACHE", str(tmp_path / "cache"))
    homes = houses(tmp_path)
    first = order("case-statistics", run="sums", rounds=1, plan=PLAN)
    for home in homes.values():
        approve(home, first)
    assert coordinator(tmp_path, first, LocalCarrier(homes, first)).run() == "finished"
    an, read = planned(tmp_path, tmp_path / "server" / "sums" / "checkpoint.safetensors", list(homes), patience=5.0)
    for home in homes.values():
        approve(home, an)
    assert coordinator(tmp_path, an, LocalCarrier(homes, an)).run() == "finished"
    sites = read_sites(read.data, {name: tmp_path / name / "files" / "set" for name in homes}, an.plan["seed"])
    state, _ = reference(an, sites)
    assert equal(state, states.load(tmp_path / "server" / "spots" / "checkpoint.safetensors").state)
    assert {tuple(site.data["train"].shape) for site in sites.values()} == {(1, *read.data.options["patch"])}


@pytest.mark.slow
def test_a_cascade_between_hospitals_has_the_bits_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The low resolution runs over the sites; each then predicts its own cases with the model, and no image leaves."""
    monkeypatch.setenv("POLYCLINIC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("POLYCLINIC_WEIGHTS", str(tmp_path / "weights"))
    homes = houses(tmp_path)
    first = order("case-statistics", run="sums", rounds=1, plan=PLAN)
    for home in homes.values():
        approve(home, first)
    assert coordinator(tmp_path, first, LocalCarrier(homes, first)).run() == "finished"
    checkpoint = tmp_path / "server" / "sums" / "checkpoint.safetensors"

    def ran(name: str, **how: Any) -> study_config.Study:
        an, read = planned(tmp_path, checkpoint, list(homes), 5.0, name, memory_gb=0.005, **how)
        for home in homes.values():
            approve(home, an)
        assert coordinator(tmp_path, an, LocalCarrier(homes, an)).run() == "finished"
        sites = read_sites(read.data, {site: tmp_path / site / "files" / "set" for site in homes}, an.plan["seed"])
        assert equal(reference(an, sites)[0], states.load(tmp_path / "server" / name / "checkpoint.safetensors").state)
        runs = {name: {"label": "fedavg", "seed": an.plan["seed"], "plan": an.plan, "external": []}}
        folders, plan = {name: tmp_path / "server" / name}, tmp_path / f"{name}.plan.toml"
        deployment.collect(
            read, recipe(tmp_path, name), name, runs, {}, folders, tmp_path / f"{name}-run", plan.read_bytes()
        )
        return read

    ran("low", configuration="3d_lowres")
    stage = previous_stage(tmp_path / "low-run", None, "fedavg")
    assert (stage.known, stage.held_out) == ("", ())  # the coordinator has no images
    refused = _check_without_models(tmp_path, checkpoint, homes, stage)
    assert refused[0].startswith("the steps need a model: the start weights ")
    assert "polyclinic site weights add" in refused[0]
    read = ran("full", previous=stage)
    assert read.data.options["steps"][-1]["models"] == list(stage.models)
    assert "case0" not in (tmp_path / "full.plan.toml").read_text()


@pytest.mark.parametrize(
    "steps",
    [None, 5, "zscore", [5], [None, "zscore"], [["models"]], [{"models": 5}], [{"models": "ab"}], [{"step": "x"}]],
)
def test_steps_of_another_form_name_no_models(steps: Any) -> None:
    """A server may send anything; the form of the steps is checked where they are read."""
    assert data_restrictions.stage_models({"steps": steps}) == []
    assert data_restrictions.stage_models({"steps": [5, {"models": ["a", 7]}]}) == ["a", "7"]


def _check_without_models(
    root: Path, checkpoint: Path, homes: dict[str, SiteFolder], stage: PreviousStage
) -> list[str]:
    """Why the policy of a site whose store is empty refuses the models of a study's steps."""
    an, _ = planned(root, checkpoint, list(homes), 5.0, "early", memory_gb=0.005, previous=stage)
    models = data_restrictions.stage_models(an.data)
    assert models == list(stage.models)
    policy = policies.read(next(iter(homes.values())).policy)
    assert policy.model_problems(models) == []
    (reason,) = policies.parse(b"[allow]\nweights = []").model_problems(models)
    assert reason == f"the steps need the model {models[0]}, which the policy does not allow (allow.weights)"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLYCLINIC_WEIGHTS", str(root / "none"))
        return policy.model_problems(models)


@pytest.mark.deploy
@pytest.mark.slow
def test_real_processes_plan_and_train_with_the_recipe_of_nnunet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same between three processes of FLARE: the plan is made from their sums, and the bits are those of one."""
    pytest.importorskip("nvflare", reason="the extra [flare] is not installed")
    monkeypatch.setenv("POLYCLINIC_CACHE", str(tmp_path / "cache"))
    hospitals = Hospitals(tmp_path)
    for k, name in enumerate(hospitals.homes):
        shutil.rmtree(tmp_path / "data" / name)
        write_files(tmp_path / "data" / name, k)
    with hospitals:
        hospitals.order(study("sums", method="case-statistics", rounds=1, plan=PLAN))
        hospitals.finished("sums")
        checkpoint = hospitals.server.run("sums") / "checkpoint.safetensors"
        ordered, read = planned(tmp_path, checkpoint, list(hospitals.homes), patience=PATIENCE)
        an = hospitals.order(ordered)
        hospitals.finished("spots")
        assert hospitals.lost("spots") == []
        sites = read_sites(
            read.data, {name: tmp_path / "data" / name / "set" for name in hospitals.homes}, an.plan["seed"]
        )
        assert equal(reference(an, sites)[0], hospitals.state("spots"))
        hospitals.journals_hold()


def recipe(root: Path, name: str) -> str:
    """Return the study with the plan of this name."""
    text = RECIPE.replace('use = "elsewhere"', f'kind = "pairs"\npath = "{root}"')
    return text.replace("PLAN", str(root / f"{name}.plan.toml"))


def planned(
    root: Path, checkpoint: Path, sites: list[str], patience: float, name: str = "spots", **how: Any
) -> tuple[RunRequest, study_config.Study]:
    """Make a plan from the sums of the sites, and return the request and the study that train with it."""
    data = {"kind": "pairs", "path": str(root), "split": [0.75, 0.0, 0.25]}
    sums = case_planning.read_statistics(checkpoint)
    made = case_planning.plan(DataSpec.model_validate(data), name, channels=["CT"], sums=sums, width=4, **how)
    (root / f"{name}.plan.toml").write_text(made.text)
    read = study_config.parse(recipe(root, name))
    channels = 2 if "previous" in how else 1  # and that of the only label
    (arm,), _ = deployment.method_runs(read, sites, {"inputs": [channels, *read.data.options["patch"]], "outputs": 2})
    shared = {key: value for key, value in deployment.how(read).items() if value is not None}
    return RunRequest(name, arm["plan"], patience=patience, **shared), read


def test_a_small_hospital_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYCLINIC_CACHE", str(tmp_path / "cache"))
    homes = houses(tmp_path, policies.DEFAULT.replace("min_patients = 10", "min_patients = 13"))
    an = order("case-statistics", rounds=1, plan=PLAN)
    for home in homes.values():
        approve(home, an)
    assert coordinator(tmp_path, an, LocalCarrier(homes, an)).run() != "finished"
    why = json.loads((tmp_path / "server" / an.run / "status.json").read_text())["why"]
    assert "fewer than 13 patients here (limits.min_patients)" in why


def test_a_study_of_statistics_needs_no_survey_and_no_scores(tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    file.write_text(STUDY.replace("PATH", str(tmp_path)).replace('name = "fedavg"', 'name = "case-statistics"'))
    read = study_config.read(file)
    (arm,), _ = deployment.method_runs(read, ["a", "b"])
    assert (arm["plan"]["inputs"], arm["plan"]["outputs"], arm["plan"]["network"]) == ([1], 1, "mlp")
    Plan.from_json(json.dumps(arm["plan"])).build_method()
    assert deployment.how(read)["score_every"] == 0
    assert deployment.how(read)["test"] == ""


def test_files_by_role_are_measured_too(tmp_path: Path) -> None:
    """Of ``train.npz`` the images are measured as they are, with voxels of unknown size."""
    data = np.load(_npz(tmp_path))
    site = little_sites(count=1)["site-0"]
    sums = sums_of(site.data["train"])
    assert int(sums["cases"][0]) == len(data["inputs"])
    assert float(sums["measured"][0]) == 0
    assert float(sums["size"][1, 8]) == len(data["inputs"])


def _npz(root: Path) -> Path:
    home = make_site(root / "one", "site-0", little_sites(count=1)["site-0"])
    return home.path / "data" / "train.npz"


def test_a_single_number_of_any_stride_can_be_sent(tmp_path: Path) -> None:
    """PyTorch calls it contiguous, and refuses to view it as bytes."""
    leaf = torch.full((1, 4101), 7.0, dtype=torch.float64)[:, 3]
    assert leaf.stride() == (4101,)
    tensor_file.write(tmp_path / "one", {"tree": {"leaf": leaf}})
    assert torch.equal(tensor_file.read(tmp_path / "one")["tree"]["leaf"], leaf)


@pytest.mark.deploy
@pytest.mark.slow
def test_real_processes_give_the_sums_of_one(hospitals: Hospitals) -> None:
    an = hospitals.order(study("statistics", method="case-statistics", rounds=1))
    hospitals.finished("statistics")
    state, _ = reference(an)
    assert equal(state, hospitals.state("statistics"))
    assert hospitals.lost("statistics") == []
