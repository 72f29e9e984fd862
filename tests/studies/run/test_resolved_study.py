"""What validation builds is what runs: each object once."""

import dataclasses
from collections import Counter
from pathlib import Path

import pytest

from polyclinic.data.config import DataSpec
from polyclinic.engines.plan import Plan
from polyclinic.studies.config.study_config import parse
from polyclinic.studies.run.resolved_study import resolve
from polyclinic.studies.run.scheduler import run
from tests.support.small_runs import npz, study


def test_a_run_opens_its_source_and_builds_each_method_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npz(tmp_path)
    text = study(tmp_path, **{"rounds = 4": "rounds = 1"}).split('[[methods]]\nname = "cross"')[0]
    parsed, built, opened = parse(text), Counter[str](), Counter[str]()
    build, source = Plan.build_method, type(parsed.data).source

    def built_once(plan: Plan) -> object:
        built[f"{plan.method} {plan.seed}"] += 1
        return build(plan)

    def opened_once(spec: DataSpec) -> object:
        opened["source"] += 1
        return source(spec)

    monkeypatch.setattr(Plan, "build_method", built_once)
    monkeypatch.setattr(type(parsed.data), "source", opened_once)
    for _ in run(parsed, text, tmp_path / "run"):
        pass
    assert built == {"local 0": 1, "pooled 0": 1, "local 1": 1, "pooled 1": 1}
    assert opened == {"source": 1}


def test_a_changed_method_or_a_trial_is_built_anew(tmp_path: Path) -> None:
    npz(tmp_path)
    text = study(tmp_path)
    resolved = resolve(parse(text), text)
    job, data = resolved.jobs[0], resolved.splits[0]
    assert resolved.method(job, data, resolved.study) is resolved.methods[job.name]
    shorter = resolved.study.model_copy(update={"rounds": resolved.study.rounds + 1})
    trial = resolved.method(dataclasses.replace(job, trial=0), data, shorter)
    assert trial.plan.rounds == resolved.study.rounds + 1
    training = {"lr": 0.012345}
    changed = dataclasses.replace(job, method=job.method.model_copy(update={"training": training}))
    assert resolved.method(changed, data, resolved.study).plan.training["lr"] == 0.012345
