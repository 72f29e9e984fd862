"""A run keeps the plan that its study names, so that the file may change or disappear afterwards."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from polyclinic.cli.run import run as run_command
from polyclinic.data.examples import DataError
from polyclinic.data.federation import DataSpec
from polyclinic.evaluation.records.method_runs import PLAN
from polyclinic.evaluation.records.run_reader import read_run
from polyclinic.studies.config import study_config
from polyclinic.studies.config.loader import plan_content
from polyclinic.studies.inference.models import trained_model
from polyclinic.studies.run import planning
from polyclinic.studies.run.data_identity import read_again
from polyclinic.studies.run.scheduler import run
from tests.studies.run.test_case_planning import PLANNED
from tests.studies.run.test_patches import write_volumes
from tests.studies.run.test_planning import registry, written
from tests.support.known import known

TABLE = """
name = "registry"
rounds = 1
[data]
kind = "table"
path = "{path}"
label = "y"
categories = ["kind"]
sites = "natural"
plan = "{plan}"
[task]
network = "mlp"
[[methods]]
name = "fedavg"
[engine]
kind = "in-process"
"""


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished run of a study of volumes that planned by itself, and the folder of its study."""
    folder = tmp_path_factory.mktemp("planned")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLYCLINIC_CACHE", str(folder / "cache"))
        study = folder / "balls.toml"
        write_volumes(folder / "set", 20)
        text = PLANNED.format(path=folder / "set")
        study.write_text(text + '[training]\nsteps = 1\nbatch_size = 2\n[engine]\nkind = "in-process"\n')
        run_command(study, out=folder / "runs")
    (finished,) = (path for path in (folder / "runs").iterdir() if (path / "run.json").is_file())
    return finished, folder


@pytest.mark.parametrize("change", ["deleted", "edited"])
def test_a_run_is_read_with_its_own_plan(
    planned: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    finished, folder = planned
    monkeypatch.setenv("POLYCLINIC_CACHE", str(folder / "cache"))
    file = folder / "balls.plan.toml"
    content = file.read_bytes()
    assert (finished / PLAN).read_bytes() == content
    before = read_run(finished)
    assert before.plan == content.decode()
    assert PLAN in before.digests
    if change == "deleted":
        file.unlink()
    else:
        file.write_bytes(content.replace(b"width = 4", b"width = 6"))
    try:
        model = trained_model(finished)
        assert known(model.data).hash == before.info.hash == model.study
        assert model.plan.network_options["width"] == 4
        assert read_again(before, 0)[2].fingerprint == before.info.data.fingerprint
        again = study_config.read(finished / "study.toml")
        assert again.hash == before.info.hash  # so that the run is continued in its own folder
        text = (finished / "study.toml").read_text()
        list(run(again, text, finished, resume=True))
        copied = tmp_path / finished.name
        shutil.copytree(finished, copied)
        list(run(again, text, copied, fresh=True))  # with the plan that it was read with
        assert (copied / PLAN).read_bytes() == content
    finally:
        file.write_bytes(content)


def test_a_plan_that_is_nowhere_is_refused_before_anything_is_deleted(
    planned: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished, folder = planned
    monkeypatch.setenv("POLYCLINIC_CACHE", str(folder / "cache"))
    copied, file = tmp_path / finished.name, folder / "balls.plan.toml"
    shutil.copytree(finished, copied)
    study, text, content = (
        study_config.read(copied / "study.toml"),
        (copied / "study.toml").read_text(),
        file.read_bytes(),
    )
    (copied / PLAN).unlink()
    file.unlink()
    try:
        with pytest.raises(DataError, match="there is nothing at"):
            list(run(study, text, copied, fresh=True))
        assert (copied / "run.json").is_file()
    finally:
        file.write_bytes(content)


def test_a_tables_plan_counts_with_its_content(tmp_path: Path) -> None:
    """The statistics of a table stay in the plan's file; the hash of the study is that of their content."""
    table: dict[str, Any] = registry(tmp_path)
    plan = Path(written(planning.plan(DataSpec(**table), "s"), tmp_path))
    study, out = tmp_path / "registry.toml", tmp_path / "run"
    study.write_text(TABLE.format(path=table["path"], plan=plan))
    read = study_config.read(study)
    first = read.hash
    list(run(read, study.read_text(), out))
    moved = tmp_path / "moved.toml"
    plan.rename(moved)
    assert study_config.read(study, {"data.plan": str(moved)}).hash == first
    assert study_config.read(out / "study.toml").hash == first
    assert read_again(read_run(out), 0)[2].fingerprint == read_run(out).info.data.fingerprint
    moved.write_text(moved.read_text().replace("seed = 0", "seed = 1"))
    assert study_config.read(study, {"data.plan": str(moved)}).hash != first


def test_a_study_without_a_plan_carries_none(tmp_path: Path) -> None:
    assert plan_content('[data]\nplan = "nnunet"', tmp_path) is None
    assert plan_content("data = 3", tmp_path) is None
    (tmp_path / PLAN).write_text("version = 1")
    assert plan_content(f'[data]\nplan = "{tmp_path}/gone.toml"', tmp_path) == b"version = 1"
