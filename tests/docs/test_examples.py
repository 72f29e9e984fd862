"""Every example study is valid, and runs."""

import os
from pathlib import Path

import pytest

from polyclinic.studies.config.scenarios import read_all
from polyclinic.studies.run.scheduler import run

FILES = sorted((Path(__file__).parents[2] / "examples").glob("*.toml"))
EXAMPLES = [file for file in FILES if file.stem != "panel"]  # which names no methods: `polyclinic panel run` finds them
QUICK = ("heart-4-hospitals",)


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda p: p.stem)
def test_an_example_is_a_study(file: Path) -> None:
    for scenario in read_all(file):
        assert scenario.study.name == file.stem
        assert scenario.study.title


@pytest.mark.parametrize(
    "file", [pytest.param(f, marks=[] if f.stem in QUICK else pytest.mark.slow, id=f.stem) for f in EXAMPLES]
)
def test_an_example_runs(file: Path, real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "$ADNI_TABLES" in file.read_text() and not os.environ.get("ADNI_TABLES"):
        pytest.skip("needs ADNI_TABLES: tables that only their owners may give")
    monkeypatch.setenv("POLYCLINIC_DATA", os.path.abspath(real_data))
    for scenario in read_all(file, {"rounds": 1, "seeds": [0]}):
        study = scenario.study
        events = run(study, scenario.text, tmp_path / (scenario.name or "run"))
        tested = [event for event in events if event.what == "tested"]
        folds = len(tested) // len(study.methods)
        assert sorted(event.label for event in tested) == sorted([method.called for method in study.methods] * folds)
        assert all(event.scores for event in tested)
