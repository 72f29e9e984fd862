"""A study with a plan, from files of unequal size to scores on their own grids."""

import json
from pathlib import Path

import pytest

from polyclinic.cli import data
from polyclinic.studies.config import study_config
from polyclinic.studies.run.scheduler import run
from tests.studies.run.test_case_planning import STUDY, write_pairs


def test_a_study_trains_with_its_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes differ, and the coarse axis comes first; nothing is resized, and the network is the plan's."""
    monkeypatch.setenv("POLYCLINIC_CACHE", str(tmp_path / "cache"))
    study = tmp_path / "study.toml"
    text = STUDY.replace("PATH", str(write_pairs(tmp_path / "set", 45, (2.4, 0.8, 0.8))))
    study.write_text(text.replace("[training]", '[engine]\nkind = "in-process"\n[training]\nbatch_size = 2'))
    data.case_plan(study, width=4)
    plan = f'plan = "{tmp_path / "study.plan.toml"}"\nmax_patients = 12\n[task]'
    study.write_text(study.read_text().replace("[task]", plan))
    planned = study_config.read(study)
    steps = planned.data.options["steps"]
    assert [step["step"] for step in steps] == ["transpose", "crop_nonzero", "normalize", "resample_cubic"]
    assert steps[0]["axes"] == [2, 0, 1]  # x, the last of (z, y, x), is the coarsest
    assert planned.task.options["kernels"][0] == [1, 3, 3]
    out = tmp_path / "run"
    list(run(planned, study.read_text(), out))
    records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    tests = [record for record in records if record["kind"] == "test"]
    assert len(tests) == 3
    assert all(0 <= record["metrics"]["dice"] <= 1 for record in tests)
