"""Reconstructions of new images: the scores of the run, the format of the file, and bad input refused with a reason."""

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from polyclinic.cli import app
from polyclinic.data.annotations import column_generator
from polyclinic.data.files import OPTIONS
from polyclinic.errors import DataError, PolyclinicError
from polyclinic.evaluation.records.run_reader import read_run
from polyclinic.learning.tasks.mr_reconstruction import columns, undersample
from polyclinic.studies.config.study_config import parse
from polyclinic.studies.export.model_export import export
from polyclinic.studies.inference.frozen_evaluation import evaluate_frozen, study_for, summary
from polyclinic.studies.inference.models import trained_model
from polyclinic.studies.inference.predict import Predicted, Work
from polyclinic.studies.inference.predictor import Predictor
from polyclinic.studies.inference.reading import Reading, cases_at
from polyclinic.studies.inference.reconstruction import Acquisition
from polyclinic.studies.run.data_identity import read_again
from tests.studies.inference.conftest import RECONSTRUCTED, finish
from tests.studies.inference.test_predict import table

Finished = tuple[Path, Path]
AFFINE = np.array([[1.1, 0, 0, 30.0], [0, 1.7, 0, -20.5], [0, 0, 1.5, 7.25], [0, 0, 0, 1]])


def work(model: Path, place: Path, out: Path, seed: int | None = 1, **how: object) -> Work:
    """Return the prediction of everything at a place by the model of a seed."""
    seeds = [] if seed is None else [seed]
    return Work(Predictor(trained_model(model, seeds=seeds)), place, out, **how)  # type: ignore[arg-type]


def results(given: Work) -> dict[str, Predicted]:
    """Predict, and return the results by image."""
    return {result.id: result for result in given.run()}


def test_reconstructions_score_as_the_run_did(reconstructed: Finished, tmp_path: Path) -> None:
    run, data = reconstructed
    _, _, split = read_again(read_run(run), 1)
    stored = load_file(run / "arms" / "fedavg-seed1" / "predictions.safetensors")
    for site in ("site-1", "site-2"):
        found = results(work(run, data / "images", tmp_path / site, undersample=site))
        names = split.sites[site]["test"].ids
        for key in ("psnr", "ssim", "nmse"):
            np.testing.assert_allclose([found[n].row[key] for n in names], stored[f"{site}/{key}"], rtol=1e-5)
    assert not np.allclose(stored["site-1/psnr"].mean(), stored["site-2/psnr"].mean(), rtol=1e-3)


def test_undersampled_images_are_reconstructed_as_the_complete_ones(reconstructed: Finished, tmp_path: Path) -> None:
    run, data = reconstructed
    (tmp_path / "given").mkdir()
    measured = columns(16, 3, 0.2, column_generator(1, "site-1"))
    for file in sorted((data / "images").glob("*.png"))[:3]:
        pixels = torch.from_numpy(np.asarray(Image.open(file), np.float32))[None, None, 2:18] / 255  # as crop_pad does
        made = nib.Nifti1Image(undersample(pixels, measured)[0].numpy().transpose(2, 1, 0), AFFINE)
        nib.save(made, tmp_path / "given" / f"{file.stem}.nii.gz")
    complete = results(work(run, data / "images", tmp_path / "a", undersample="site-1"))
    plain = results(work(run, tmp_path / "given", tmp_path / "b"))
    scored = results(work(run, tmp_path / "given", tmp_path / "c", references=data / "images"))
    assert len(plain) == 3
    for name, result in scored.items():
        assert not result.problem
        for key in ("psnr", "ssim", "nmse", "input_psnr", "input_ssim", "input_nmse"):
            assert key not in plain[name].row
            assert result.row[key] == pytest.approx(complete[name].row[key], rel=1e-4)
        assert result.row["psnr"] != result.row["input_psnr"]
        written = nib.load(tmp_path / "b" / f"{name}.nii.gz")
        given = nib.load(tmp_path / "given" / f"{name}.nii.gz")
        assert written.affine.tobytes() == given.affine.tobytes()
        assert (written.shape, written.get_data_dtype()) == (given.shape, np.float32)
        picture = np.asarray(Image.open(tmp_path / "a" / f"{name}.png"), np.float32)
        assert picture.shape == (20, 16)  # the grid of the file, 0 outside of the cropped part
        assert not picture[:2].any()
        assert not picture[18:].any()
        restored = np.asarray(written.dataobj)[:, :, 0].T
        np.testing.assert_allclose(picture[2:18], restored.clip(0, 1) * 255, atol=0.51)


def test_the_command_writes_scores_and_resumes(
    reconstructed: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, data = reconstructed
    place = tmp_path / "images"
    shutil.copytree(data / "images", place)
    options = ["--out", str(tmp_path / "out"), "--seed", "0", "--reference", str(data / "images")]
    monkeypatch.setattr("sys.argv", ["polyclinic", "predict", str(run), str(place), *options])
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert ended.value.code == 0
    first = table(tmp_path / "out")
    assert {"image", "psnr", "input_psnr"} <= first["slice00"].keys()
    assert float(first["slice00"]["input_psnr"]) == 100.0  # the images are their own references
    assert results(work(run, place, tmp_path / "out", 0, references=data / "images"))["slice00"].resumed
    with pytest.raises(PolyclinicError, match="references differ"):
        work(run, place, tmp_path / "out", 0)
    references = tmp_path / "references"
    shutil.copytree(data / "images", references)
    shutil.copy(references / "slice01.png", references / "slice00.png")
    again = results(work(run, place, tmp_path / "out", 0, references=references))
    assert not again["slice00"].resumed
    assert again["slice01"].resumed


def test_pictures_whose_values_a_step_changed_are_numbers(reconstructed: Finished, tmp_path: Path) -> None:
    _, data = reconstructed
    steps = '[{ step = "crop_pad", size = 16 }, { step = "scale", low = 0.0, high = 0.5 }]'
    text = RECONSTRUCTED.format(path=data, steps=steps).replace("seeds = [0, 1]", "seeds = [0]")
    run = finish(text, tmp_path / "run")
    found = results(work(run, data / "images" / "slice03.png", tmp_path / "out", 0))["slice03"]
    assert found.files == ("slice03.npy",)
    stored = np.load(tmp_path / "out" / "slice03.npy")
    assert (stored.shape, stored.dtype) == ((20, 16), np.float32)


def test_what_cannot_be_reconstructed_is_refused_with_a_reason(
    reconstructed: Finished, classified: Finished, tmp_path: Path
) -> None:
    run, data = reconstructed
    out, images = tmp_path / "out", data / "images"
    with pytest.raises(PolyclinicError, match=r"--undersample site-9: no such site trained.*site-1, site-2"):
        work(run, images, out, undersample="site-9")
    with pytest.raises(PolyclinicError, match="own references"):
        work(run, images, out, undersample="site-1", references=images)
    with pytest.raises(PolyclinicError, match="choose a model with --seed"):
        work(run, images, out, None, undersample="site-1")
    with pytest.raises(PolyclinicError, match="nothing here"):
        work(run, images, out, references=tmp_path / "nowhere")
    with pytest.raises(PolyclinicError, match="for reconstructions, and the model predicts classification"):
        Work(Predictor(trained_model(classified[0])), classified[1], out, undersample="site-1")
    bundle = export(run, "bundle", tmp_path / "bundle", "fedavg", 0)
    with pytest.raises(PolyclinicError, match="name the run, not a bundle"):
        work(bundle, images, out, None, undersample="site-1")
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(images / "slice00.png", other / "another.png")
    with pytest.raises(PolyclinicError, match="no image there has the name"):
        work(run, images, out, references=other)
    (other / "slice00.png").write_bytes(b"no image")
    Image.fromarray(np.zeros((20, 16, 3), np.uint8)).save(other / "slice01.png")
    shutil.copy(images / "slice02.png", other / "slice02.png")
    found = results(work(run, images, out, references=other))
    assert "slice00.png" in found["slice00"].problem
    assert "its reference cannot be read" in found["slice00"].problem
    assert "has 3 channels, and the model takes 1" in found["slice01"].problem
    assert found["slice02"].row["psnr"] == found["slice02"].row["psnr"]
    assert "psnr" not in found["slice03"].row  # has no reference, and is reconstructed
    assert {"slice02", "slice03"} <= table(out).keys()
    assert not {"slice00", "slice01"} & table(out).keys()


def test_a_reference_of_another_size_is_refused(tmp_path: Path) -> None:
    reading = Reading((), OPTIONS, 1, 2)
    for name, size in (("given", (8, 6)), ("complete", (8, 7))):
        (tmp_path / name).mkdir()
        Image.fromarray(np.zeros(size, np.uint8)).save(tmp_path / name / "a.png")
    (case,), (complete,) = (cases_at(tmp_path / name, reading) for name in ("given", "complete"))
    acquisition = Acquisition({"a": complete})
    assert torch.equal(acquisition.reference(case, torch.ones(1, 8, 7), reading), torch.zeros(1, 8, 7))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="its reference is 8 x 7, and the image 8 x 6"):
        acquisition.reference(case, torch.zeros(1, 8, 6), reading)


def test_a_bundle_reconstructs_as_its_run(reconstructed: Finished, tmp_path: Path) -> None:
    run, data = reconstructed
    bundle = export(run, "bundle", tmp_path / "bundle", "fedavg", 0)
    for model, seed, out in ((run, 0, "a"), (bundle, None, "b")):
        results(work(model, data / "images" / "slice05.png", tmp_path / out, seed))
    assert (tmp_path / "a" / "slice05.png").read_bytes() == (tmp_path / "b" / "slice05.png").read_bytes()


def test_a_frozen_model_scores_as_its_run(reconstructed: Finished, tmp_path: Path) -> None:
    run, _ = reconstructed
    model = trained_model(run)
    text = (run / "study.toml").read_text(encoding="utf-8")
    found = summary(evaluate_frozen([model], study_for(model, text, run / "study.toml")))
    stored = [load_file(run / "arms" / f"fedavg-seed{seed}" / "predictions.safetensors") for seed in (0, 1)]
    for site in ("site-1", "site-2"):
        expected = np.mean([leaves[f"{site}/psnr"].mean() for leaves in stored])
        assert found["results"][0]["sites"][site]["psnr"]["value"] == pytest.approx(expected, rel=1e-5)
    assert parse(text).hash == model.study
    table = text.split("[data]")[1].split("[task]")[0]
    alone = "[data]" + "".join(
        f"\n{line}" for line in table.splitlines() if not line.startswith(("accel", "center", "steps"))
    )
    study = study_for(trained_model(run, seeds=[0]), alone, tmp_path / "data.toml")
    assert (study.data.accelerate, study.data.center, study.task.kind) == (3, 0.2, "reconstruction")
    new = summary(evaluate_frozen([trained_model(run, seeds=[0])], study, everything=True))
    assert sum(new["images"].values()) == 14
    assert 5 < new["results"][0]["mean_over_sites"]["value"] < 100
    other = study_for(model, alone + "\naccelerate = 2\n", tmp_path / "data.toml")
    assert (other.data.accelerate, other.data.center) == (2, 0.08)  # the file says how
