"""Every example study is valid, and runs."""

import os
from pathlib import Path

import pytest

from polyclinic.studies.runner import run
from polyclinic.studies.spec import read

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.toml"))
QUICK = ("heart-4-hospitals",)


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda p: p.stem)
def test_an_example_is_a_study(file: Path) -> None:
    study = read(file)
    assert study.name == file.stem
    assert study.title


@pytest.mark.parametrize(
    "file", [pytest.param(f, marks=[] if f.stem in QUICK else pytest.mark.slow, id=f.stem) for f in EXAMPLES]
)
def test_an_example_runs(file: Path, real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYCLINIC_DATA", os.path.abspath(real_data))
    study = read(file, {"rounds": 1, "seeds": [0]})
    tested = [event for event in run(study, file.read_text(), tmp_path / "run") if event.what == "tested"]
    assert [event.label for event in tested] == [method.called for method in study.methods]
    assert all(event.scores for event in tested)
