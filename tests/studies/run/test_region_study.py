"""A study of overlapping regions with pixels that are not annotated, from files to scores and predicted masks."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from safetensors.numpy import load_file

from polyclinic.data.examples import DataError
from polyclinic.data.federation import federate
from polyclinic.data.quality.recognition import recognize
from polyclinic.evaluation.records.run_reader import read_run
from polyclinic.studies.config.diagnostics import BadStudy
from polyclinic.studies.config.new_study import new_study
from polyclinic.studies.config.study_config import parse
from polyclinic.studies.inference.models import trained_model
from polyclinic.studies.inference.predict import Outputs, Work
from polyclinic.studies.inference.predictor import Predictor
from polyclinic.studies.run import deployment
from polyclinic.studies.run.data_identity import read_again
from tests.studies.inference.conftest import STUDY, finish, write_pairs

REGIONS = STUDY.replace('norm = "batch" }}', 'norm = "batch" }}\nregions = [[1, 2], [2]]')
REGIONS = REGIONS.replace("seeds = [0, 1]", "seeds = [0]").replace('[[methods]]\nname = "ditto"\n', "")
REGIONS = REGIONS.replace("steps = 5", "steps = 50").replace("min_patients = 1", "min_patients = 1\nignore = 9")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished run, and its data, in whose masks a part is not annotated (9)."""
    folder = tmp_path_factory.mktemp("regions")
    data = write_pairs(folder / "data")
    for file in sorted((data / "labels").iterdir())[::2]:
        image = nib.load(file)
        mask = np.asarray(image.dataobj).copy()
        mask[:, :9] = 9
        nib.save(nib.Nifti1Image(mask, image.affine, image.header), file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLYCLINIC_CACHE", str(folder / "cache"))
        return finish(REGIONS.format(path=data), folder / "run"), data


def by_hand(predicted: np.ndarray, truth: np.ndarray) -> list[float]:
    """Dice of both regions among the pixels that are annotated; 1 if neither has one."""
    known, found = truth != 9, []
    for region in ((1, 2), (2,)):
        p, t = np.isin(predicted, region) & known, np.isin(truth, region) & known
        found.append(2 * (p & t).sum() / (p.sum() + t.sum()) if p.any() or t.any() else 1.0)
    return found


def test_written_masks_have_the_scores_of_the_run(finished: tuple[Path, Path], tmp_path: Path) -> None:
    run, data = finished
    model = trained_model(run)
    assert model.plan.outputs == 2
    results = list(Work(Predictor(model), data / "images", tmp_path / "out", Outputs(True, True)).run())
    assert not any(result.problem for result in results)
    stored = load_file(run / "arms" / "fedavg-seed0" / "predictions.safetensors")
    _, _, split = read_again(read_run(run), 0)
    scores = []
    for site in ("site-1", "site-2"):
        for i, name in enumerate(split.sites[site]["test"].ids):
            files = (tmp_path / "out" / f"{name}.nii.gz", data / "labels" / f"{name}.nii.gz")
            predicted, truth = (np.asarray(nib.load(file).dataobj) for file in files)
            np.testing.assert_allclose(stored[f"{site}/dice"][i], by_hand(predicted, truth), atol=1e-6)
            scores += stored[f"{site}/dice"][i][stored[f"{site}/absent"][i] == 0].tolist()
    assert 0.3 < np.mean(scores) < 1


def test_probabilities_are_those_of_each_region(finished: tuple[Path, Path], tmp_path: Path) -> None:
    run, data = finished
    predictor = Predictor(trained_model(run))
    list(Work(predictor, data / "images" / "case01.nii.gz", tmp_path / "out", Outputs(True, True)).run())
    shares = nib.load(tmp_path / "out" / "case01-probabilities.nii.gz").get_fdata()
    mask = np.asarray(nib.load(tmp_path / "out" / "case01.nii.gz").dataobj)
    assert shares.shape == (*mask.shape, 2)
    assert shares.sum(-1).min() < 0.9
    assert ((shares[..., 1] > 0.5) == (mask == 2)).mean() > 0.98  # they are interpolated as probabilities
    assert ((shares > 0.5).any(-1) == (mask > 0)).mean() > 0.98


def test_each_label_belongs_to_a_region(finished: tuple[Path, Path], tmp_path: Path) -> None:
    _, data = finished
    for regions in ("[[1]]", "[[1, 2, 3], [2, 3], [3]]"):
        text = REGIONS.replace("[[1, 2], [2]]", regions).format(path=data)
        with pytest.raises(DataError, match=r"must be in a region, and no other: they are 1 \(one\), 2 \(two\)"):
            finish(text, tmp_path / "run")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("[[1, 2], [2]]", "[[2], [1, 2]]", r"\[2\] has no label outside"),
        ("[[1, 2], [2]]", "[]", "needs at least 1"),
        ('kind = "segmentation"', 'kind = "classification"', "regions is not for classification"),
    ],
)
def test_mistakes_are_named(old: str, new: str, says: str) -> None:
    with pytest.raises(BadStudy, match=says):
        parse(REGIONS.format(path="/data").replace(old, new))


def test_hospitals_get_a_network_with_one_output_for_each_region() -> None:
    study = parse(REGIONS.format(path="/data"))
    (arm,), _ = deployment.method_runs(study, ("lyon", "oslo"))
    assert arm["plan"]["outputs"] == 2
    assert arm["plan"]["task"]["regions"] == [[1, 2], [2]]


def test_a_new_study_takes_the_regions_of_nnunets_description(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYCLINIC_CACHE", str(tmp_path / "cache"))
    data = write_pairs(tmp_path / "data", 6)
    (data / "images").rename(data / "imagesTr")
    (data / "labels").rename(data / "labelsTr")
    labels = {"background": 0, "tumor": [1, 2], "core": 2}
    (data / "dataset.json").write_text(json.dumps({"labels": labels, "channel_names": {"0": "T1"}}))
    study = parse(new_study(recognize(data), "regions").text)
    assert study.task.regions == ((1, 2), (2,))
    loaded = federate(study.data, 0)
    assert loaded.info.classes == ("background", "tumor", "core")
    assert any("tumor = 1, 2; core = 2" in note for note in loaded.info.notes)
    (data / "dataset.json").write_text(json.dumps({"labels": labels | {"tumor": [1, 2, 3]}}))
    made = new_study(recognize(data), "regions")
    assert "regions" not in made.text.partition("[task]")[2]
    assert any("regions of dataset.json are not used" in reason for reason in made.why)
