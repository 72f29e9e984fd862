"""What validation builds is what runs: each object once."""

import dataclasses
from collections import Counter
from pathlib import Path

import pytest

from polyclinic.engines.plan import Plan
from polyclinic.studies.config.study_config import parse
from polyclinic.studies.run.resolved_study import resolve
from polyclinic.studies.run.scheduler import run, run_resolved
from tests.studies.run.test_scheduler import npz, study


def test_a_run_uses_the_methods_that_its_validation_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npz(tmp_path)
    text = study(tmp_path)
    built: Counter[str] = Counter()
    build = Plan.build_method

    def counted(plan: Plan) -> object:
        built[f"{plan.method} {plan.seed}"] += 1
        return build(plan)

    monkeypatch.setattr(Plan, "build_method", counted)
    resolved = resolve(parse(text), text)
    first = dict(built)
    assert first
    assert set(first.values()) == {1}
    for _ in run_resolved(resolved, tmp_path / "run"):
        pass
    assert set(built) > set(first), "the methods of other seeds are built when they run"
    assert set(built.values()) == {1}


def test_a_run_reads_the_source_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npz(tmp_path)
    text = study(tmp_path)
    parsed, opened = parse(text), []
    real = type(parsed.data).source

    def counted(spec: object) -> object:
        opened.append(spec)
        return real(spec)  # type: ignore[arg-type]

    monkeypatch.setattr(type(parsed.data), "source", counted)
    for _ in run(parsed, text, tmp_path / "run"):
        pass
    assert len(opened) == 1


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
