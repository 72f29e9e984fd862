"""What validation builds is what runs: each object once."""

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
import torch

from polyclinic.data.config import DataSpec
from polyclinic.engines.plan import Plan
from polyclinic.learning.networks.small_networks import Classifier
from polyclinic.studies.config.diagnostics import BadStudy
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


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ('network = "residual-unet"', "Expected more than 1 spatial element when training"),
        ('network = "densenet121"', "Expected more than 1 value per channel when training"),
    ],
)
def test_a_network_that_cannot_be_trained_on_these_inputs_is_refused_in_advance(
    task: str, reason: str, tmp_path: Path
) -> None:
    """Every site would fail in the first round, or the run end with a traceback where a method prepares its model."""
    npz(tmp_path)
    text = study(tmp_path, **{"options = { width = 4, depth = 2, dropout = 0.2 }": task, "= 8": "= 1"})
    with pytest.raises(BadStudy, match=f"cannot be trained with inputs of 8 x 8 and batch_size = 1.*{reason}"):
        resolve(parse(text), text)


def test_a_network_that_only_computes_on_real_numbers_is_tried_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    npz(tmp_path)
    text, forward = study(tmp_path), Classifier.forward

    def looks(self: Classifier, x: torch.Tensor) -> torch.Tensor:
        assert float(x.sum()) > 0
        return forward(self, x)

    monkeypatch.setattr(Classifier, "forward", looks)
    resolve(parse(text), text)
