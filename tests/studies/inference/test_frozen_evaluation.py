"""Evaluation of trained models: the run's own scores on its own data, and others on other data."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from polyclinic.errors import PolyclinicError
from polyclinic.evaluation.records.run_reader import read_run
from polyclinic.evaluation.run_evaluation import evaluate as evaluate_run
from polyclinic.studies.export.model_export import export
from polyclinic.studies.inference.frozen_evaluation import evaluate_frozen, study_for, summary, write_result
from polyclinic.studies.inference.models import trained_model
from tests.studies.inference.conftest import write_pairs

Finished = tuple[Path, Path]


@pytest.mark.parametrize("method", ["fedavg", "ditto"])
def test_the_scores_of_a_run_are_found_again(finished: Finished, method: str) -> None:
    """With every seed, at every site; a personalized method predicts with each site's model."""
    run, _ = finished
    model = trained_model(run, method)
    result = evaluate_frozen([model], study_for(model, (run / "study.toml").read_text(), run / "study.toml"))
    for seed in (0, 1):
        stored = load_file(run / "arms" / f"{method}-seed{seed}" / "predictions.safetensors")
        ours = {f"{s}/{k}": v.numpy() for s, o in result.predictions[method, seed].items() for k, v in o.items()}
        assert ours.keys() == stored.keys()
        for name, leaf in ours.items():
            np.testing.assert_allclose(leaf, stored[name], atol=1e-6, err_msg=name)
    theirs = evaluate_run(read_run(run)).of(method)
    ours_mean = result.evaluation.of(method).macro
    assert ours_mean.value == pytest.approx(theirs.macro.value, abs=1e-6)
    assert not result.notes


def test_new_data_need_a_data_table_only(finished: Finished, tmp_path: Path) -> None:
    """Task and steps are the model's; the images of another folder are tested, with a note."""
    run, _ = finished
    data = write_pairs(tmp_path / "new", 12)
    text = f"""[data]
kind = "pairs"
path = "{data}"
classes = ["background", "one", "two"]
patient = "(.*)"
sites = {{ partition = "iid", count = 1 }}
min_patients = 1
"""
    models = [trained_model(run, label, seeds=[0]) for label in ("fedavg", "ditto")]
    study = study_for(models[0], text, tmp_path / "new.toml")
    assert study.data.options["steps"][0] == {"step": "resample", "mm": 2.0}
    result = evaluate_frozen(models, study, everything=True)
    assert result.sites == {"site-1": 12}
    assert len(result.notes) == 2
    table = summary(result)
    (compared,) = table["comparisons"]
    assert (compared["model"], compared["reference"]) == ("ditto", "fedavg")
    values = [r["mean_over_sites"]["value"] for r in table["results"]]
    assert compared["difference"] == pytest.approx(values[1] - values[0], abs=1e-9)
    file = write_result(result, models, tmp_path / "out")
    assert json.loads(file.read_text())["results"] == json.loads(json.dumps(table["results"]))
    stored = load_file(tmp_path / "out" / "predictions.safetensors")
    assert len(stored["fedavg/seed0/site-1/dice"]) == 12


def test_a_bundle_is_evaluated_as_its_run(classified: Finished, tmp_path: Path) -> None:
    run, _ = classified
    text = (run / "study.toml").read_text()
    bundle = trained_model(export(run, "bundle", tmp_path / "bundle"))
    own = trained_model(run)
    results = [evaluate_frozen([m], study_for(m, text, run / "study.toml")) for m in (own, bundle)]
    first, second = (next(iter(result.predictions.values())) for result in results)
    for site, outputs in first.items():
        assert torch.equal(outputs["score"], second[site]["score"])


def test_models_that_do_not_fit_the_data_are_refused(finished: Finished, classified: Finished, tmp_path: Path) -> None:
    masks, pictures = trained_model(finished[0], "fedavg"), trained_model(classified[0])
    text = (classified[0] / "study.toml").read_text()
    with pytest.raises(PolyclinicError, match=r"its task is classification, and .* predicts segmentation"):
        study_for(masks, text, tmp_path / "study.toml")
    study = study_for(pictures, text, tmp_path / "study.toml")
    with pytest.raises(PolyclinicError, match="leave --all out"):
        evaluate_frozen([pictures], study, everything=True)
    rng = np.random.default_rng(0)
    for size, classes, message in (
        (12, 3, "takes images of 1 x 16 x 16, and .* 1 x 12 x 12"),
        (16, 2, "predicts class"),
    ):
        path = tmp_path / f"{size}.npz"
        labels = np.arange(40) % classes
        np.savez(path, images=rng.integers(0, 255, (40, size, size)).astype(np.uint8), labels=labels)
        other = text.replace(str(classified[1]), str(path))
        with pytest.raises(PolyclinicError, match=message):
            evaluate_frozen([pictures], study_for(pictures, other, tmp_path / "study.toml"))
    one, two = (trained_model(finished[0], "fedavg", seeds=seeds) for seeds in ([0], [0, 1]))
    own = study_for(one, (finished[0] / "study.toml").read_text(), tmp_path / "study.toml")
    with pytest.raises(PolyclinicError, match="the same number of seeds"):
        evaluate_frozen([one, two], own)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(PolyclinicError, match="contains something else"):
        write_result(evaluate_frozen([pictures], study), [pictures], tmp_path / "mine")
