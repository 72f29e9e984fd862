"""Linear baselines in a run folder: which files, sites and patients, and that a resumed run completes them."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from polyclinic.core.audit_log import verify
from polyclinic.data.federation import DataSpec, federate
from polyclinic.evaluation.records.run_reader import read_run
from polyclinic.evaluation.run_evaluation import evaluate
from polyclinic.learning.linear_model import fit_linear, linear_task
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.task_evaluation import outputs
from polyclinic.studies.config.study_config import parse
from polyclinic.studies.run.scheduler import run

TEXT = """
name = "linear"
rounds = 1
seeds = [3, 4]
[data]
use = "heart-disease"
external = ["zurich-basel"]
[task]
network = "mlp"
[engine]
kind = "in-process"
[[methods]]
name = "local"
[[methods]]
name = "fedavg"
"""
HOSPITALS = ("budapest", "cleveland", "long-beach")


def ran(text: str, path: Path, resume: bool = False) -> Path:
    for _ in run(parse(text), text, path, resume):
        pass
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ran(TEXT, tmp_path_factory.mktemp("linear") / "r")


def test_every_seed_has_both_with_the_patients_of_the_methods(finished: Path) -> None:
    found = read_run(finished)
    assert set(found.linear) == {(k, s) for k in ("linear-local", "linear-pooled") for s in (3, 4)}
    for seed in (3, 4):
        own, pooled = (found.linear[k, seed] for k in ("linear-local", "linear-pooled"))
        assert tuple(own) == HOSPITALS
        assert tuple(pooled) == (*HOSPITALS, "zurich-basel")
        for site, p in found.arms["fedavg", seed].items():
            for q in (pooled[site], *([own[site]] if site in own else [])):
                assert np.array_equal(p.patient, q.patient)
                assert p.target is not None
                assert q.target is not None
                assert np.array_equal(p.target, q.target)


def test_predictions_are_those_of_the_models(finished: Path) -> None:
    """Of the site's training patients alone, and of all training sites' patients; never of the external site's."""
    found = read_run(finished)
    data = federate(DataSpec(use="heart-disease", external=("zurich-basel",)), 3)
    task = linear_task(Classification(Network("mlp", data.shape, 2)))
    assert task is not None
    roles = data.sites["long-beach"]
    own = fit_linear(task, roles["train"], roles["val"])
    train, val = (
        data.sites["budapest"][role].joined([data.sites[s][role] for s in HOSPITALS[1:]])  # type: ignore[attr-defined]
        for role in ("train", "val")
    )
    pooled = fit_linear(task, train, val)
    for label, params in (("linear-local", own), ("linear-pooled", pooled)):
        assert params is not None
        expected = outputs(task, params, roles["test"])["score"].numpy()
        score = found.linear[label, 3]["long-beach"].score
        assert score is not None
        assert np.allclose(score, expected, atol=1e-6)


def test_a_resumed_run_adds_what_is_missing_and_changes_nothing_else(finished: Path, tmp_path: Path) -> None:
    path = shutil.copytree(finished, tmp_path / "r")
    before = {file: file.read_bytes() for file in path.rglob("*.safetensors")}
    assert len([file for file in before if file.parent.name == "linear"]) == 4
    (path / "linear" / "linear-local-seed4.safetensors").unlink()
    ran(TEXT, path, resume=True)
    assert before == {file: file.read_bytes() for file in path.rglob("*.safetensors")}
    ran(TEXT, path, resume=True)
    events = [entry["event"] for entry in verify(path / "journal.jsonl")]
    assert events[-6:] == ["finished", "resumed", "linear baselines", "finished", "resumed", "finished"]


@pytest.mark.parametrize(("folds", "local"), [("3", True), ('"sites"', False)])
def test_folds(folds: str, local: bool, tmp_path: Path) -> None:
    """With sites held out, no site has a model of its own; the pooled one is of the other sites."""
    text = TEXT.replace("seeds = [3, 4]", f"seeds = [3]\nfolds = {folds}")
    if not local:
        text = text.replace('[[methods]]\nname = "local"\n', "").replace('external = ["zurich-basel"]\n', "")
    found = read_run(ran(text, tmp_path / "r"))
    fedavg, pooled = found.arms["fedavg", 3], found.linear["linear-pooled", 3]
    assert tuple(pooled) == tuple(fedavg)
    for site in HOSPITALS:
        assert np.array_equal(fedavg[site].patient, pooled[site].patient)
    assert (("linear-local", 3) in found.linear) == local
    assert [m.label for m in evaluate(found).linear] == (["linear-local"] if local else []) + ["linear-pooled"]


def test_images_have_none(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 255, (60, 8, 8), dtype=np.uint8), rng.integers(0, 2, 60)
    np.savez(tmp_path / "a.npz", images=images, labels=labels, site=np.array(["a", "b", "c"] * 20))
    text = TEXT.replace(
        'use = "heart-disease"\nexternal = ["zurich-basel"]', f'path = "{tmp_path}/a.npz"\nkind = "npz"'
    )
    text = text.replace('network = "mlp"', "options = { width = 4, depth = 2 }")
    path = ran(text, tmp_path / "r")
    assert not (path / "linear").exists()
    assert read_run(path).linear == {}


def test_no_generator_is_used(tmp_path: Path) -> None:
    """The global random state is as before, so that a run with the baselines trains the same models."""
    data = federate(DataSpec(use="heart-disease"))
    task = linear_task(Classification(Network("mlp", data.shape, 2)))
    assert task is not None
    before = torch.get_rng_state()
    fit_linear(task, data.sites["cleveland"]["train"], None)
    assert torch.equal(before, torch.get_rng_state())
