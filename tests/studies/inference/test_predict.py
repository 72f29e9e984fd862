"""Predictions of new images: those of the run, in the geometry of the file, resumable, and refused with a reason."""

import csv
import dataclasses
import gzip
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from polyclinic.cli import models
from polyclinic.errors import PolyclinicError
from polyclinic.evaluation.records.run_reader import read_run
from polyclinic.studies.config.augmentation_schema import AugmentationSpec
from polyclinic.studies.export.model_export import export
from polyclinic.studies.inference.models import NoModel, trained_model
from polyclinic.studies.inference.predict import Outputs, Predicted, Work
from polyclinic.studies.inference.predictor import Predictor, tta_axes
from polyclinic.studies.inference.reading import Reading, cases_at
from polyclinic.studies.run.data_identity import read_again
from tests.support.known import known

Finished = tuple[Path, Path]


def predicted(model: Path, place: Path, out: Path, outputs: Outputs = Outputs(), **how: object) -> list[Predicted]:
    """Predict everything at a place."""
    fresh = bool(how.pop("fresh", False))
    return list(Work(Predictor(trained_model(model, **how)), place, out, outputs, fresh).run())  # type: ignore[arg-type]


def table(out: Path) -> dict[str, dict[str, str]]:
    """Return the rows of the table by image."""
    with open(out / "predictions.csv", encoding="utf-8", newline="") as file:
        return {row["id"]: row for row in csv.DictReader(file)}


def dice_of_files(data: Path, out: Path, name: str) -> list[float]:
    """Return the Dice of both classes between two files, voxel by voxel."""
    p, t = (np.asarray(nib.load(folder / f"{name}.nii.gz").dataobj) for folder in (out, data / "labels"))
    return [2.0 * ((p == k) & (t == k)).sum() / max(((p == k).sum() + (t == k).sum()), 1) for k in (1, 2)]


@pytest.mark.parametrize("method", ["fedavg", "ditto"])
def test_the_masks_score_as_the_run_did(finished: Finished, tmp_path: Path, method: str) -> None:
    run, data = finished
    _, _, split = read_again(read_run(run), 1)
    stored = load_file(run / "arms" / f"{method}-seed1" / "predictions.safetensors")
    for site in ("site-1", "site-2"):
        out = tmp_path / site
        own = site if method == "ditto" else ""
        results = predicted(run, data / "images", out, method=method, seeds=[1], site=own)
        assert not any(result.problem for result in results)
        names = split.sites[site]["test"].ids
        ours = [dice_of_files(data, out, name) for name in names]
        np.testing.assert_allclose(ours, stored[f"{site}/dice"], atol=1e-6)
    assert np.ptp([stored["site-1/dice"].mean(), stored["site-2/dice"].mean()]) > 0


def test_a_mask_has_the_geometry_of_its_image(finished: Finished, tmp_path: Path) -> None:
    run, data = finished
    outputs = Outputs(probabilities=True, uncertainty=True)
    predicted(run, data / "images" / "case03.nii.gz", tmp_path / "out", outputs, seeds=[0])
    image = nib.load(data / "images" / "case03.nii.gz")
    for name in ("case03.nii.gz", "case03-entropy.nii.gz", "case03-probabilities.nii.gz"):
        made = nib.load(tmp_path / "out" / name)
        assert made.affine.tobytes() == image.affine.tobytes()
        for key in ("srow_x", "srow_y", "srow_z", "quatern_b", "qoffset_x", "sform_code", "qform_code", "xyzt_units"):
            assert made.header[key].tobytes() == image.header[key].tobytes(), key
        assert made.shape[:3] == image.shape
    shares = nib.load(tmp_path / "out" / "case03-probabilities.nii.gz").get_fdata()
    assert shares.shape == (*image.shape, 3)
    np.testing.assert_allclose(shares.sum(-1), 1, atol=1e-5)
    row, mask = table(tmp_path / "out")["case03"], np.asarray(nib.load(tmp_path / "out" / "case03.nii.gz").dataobj)
    assert int(row["pixels_two"]) == (mask == 2).sum()
    volume = abs(np.linalg.det(image.affine[:3, :3]))
    assert float(row["ml_two"]) == pytest.approx((mask == 2).sum() * volume / 1000, rel=0.01)
    assert json.loads((tmp_path / "out" / "labels.json").read_text()) == {"0": "background", "1": "one", "2": "two"}


def test_masks_of_dicom_images_as_dicom_segmentations(finished: Finished, tmp_path: Path) -> None:
    """They hold the labels that the NIfTI masks hold, at the slices of the series; other images are named."""
    pytest.importorskip("highdicom", reason="needs the extra dicom-seg")
    from polyclinic.data.files import ImageOptions, read_case
    from tests.support.image_files import oblique, series

    run, data = finished
    values = np.asarray(nib.load(data / "images" / "case03.nii.gz").dataobj).transpose(2, 1, 0)
    images = tmp_path / "images"
    series(images / "scan", np.rint(values[:, ::-1]).astype(np.int16), (1.5, 1.7, 1.1), oblique((4.0, -3.0, 6.0)))
    shutil.copy(data / "images" / "case00.nii.gz", images)
    predicted(run, images, tmp_path / "plain", seeds=[0])
    results = {r.id: r for r in predicted(run, images, tmp_path / "seg", Outputs(dicom=True), seeds=[0])}
    assert results["scan"].files == ("scan.dcm",)
    assert results["case00"].problem == "case00.nii.gz: is no DICOM image: leave --dicom-seg out"
    case = read_case([images / "scan"], tmp_path / "seg" / "scan.dcm", ImageOptions(segments=("one", "two")))
    mask = np.asarray(nib.load(tmp_path / "plain" / "scan.nii.gz").dataobj).transpose(2, 1, 0)
    np.testing.assert_array_equal(known(case.mask).array.numpy(), mask)
    assert {1, 2} <= set(np.unique(mask))
    again = predicted(run, images, tmp_path / "seg", Outputs(dicom=True), seeds=[0])
    assert [r.resumed for r in again if not r.problem] == [True]


def test_dicom_segmentations_are_for_masks(classified: Finished, tmp_path: Path) -> None:
    with pytest.raises(PolyclinicError, match="--dicom-seg writes masks, and the model predicts classification"):
        predicted(classified[0], tmp_path, tmp_path / "out", Outputs(dicom=True))


def test_an_ensemble_is_the_mean_of_the_logits(finished: Finished, tmp_path: Path) -> None:
    run, data = finished
    both = trained_model(run, "fedavg")
    assert [member.name for member in both.members] == ["fedavg-seed0", "fedavg-seed1"]
    assert isinstance(both.reading, Reading)
    case = next(iter(cases_at(data / "images", both.reading)))
    from polyclinic.studies.inference.reading import pictures

    ((_, picture),) = pictures([case], both.reading)
    assert not isinstance(picture, str)
    single = [Predictor(trained_model(run, "fedavg", seeds=[seed]))(picture.pixels) for seed in (0, 1)]
    together = Predictor(both)(picture.pixels)
    torch.testing.assert_close(together.scores, (single[0].scores + single[1].scores) / 2)
    torch.testing.assert_close(together.probabilities, together.scores.softmax(0))
    assert single[0].disagreement is None
    assert together.disagreement is not None
    assert together.entropy is not None
    mean = sum(one.entropy for one in single) / 2  # type: ignore[misc]
    torch.testing.assert_close(together.disagreement, (together.entropy - mean).clamp_min(0))
    results = predicted(run, data / "images" / "case00.nii.gz", tmp_path / "out", method="fedavg")
    assert "disagreement_in_object" in results[0].row


def test_mirrored_copies_are_averaged_where_training_mirrored(finished: Finished) -> None:
    run, _ = finished
    model = trained_model(run, "fedavg", seeds=[0])
    with pytest.raises(PolyclinicError, match="training mirrored none"):
        tta_axes(model)
    x = torch.rand(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    flipped = Predictor(model)(x.flip(1)).scores.flip(1)
    expected = (Predictor(model)(x).scores + flipped) / 2
    torch.testing.assert_close(Predictor(model, mirror=(0,))(x).scores, expected)
    changes = AugmentationSpec.model_validate({"recipe": "none", "mirror": {"probability": 0.5, "axes": (0, 2)}})
    training = {**model.plan.training, "augmentation": changes.expanded()}
    mirrored = dataclasses.replace(model, plan=dataclasses.replace(model.plan, training=training))
    assert tta_axes(mirrored) == (0, 2)


def test_a_prediction_resumes_image_by_image(finished: Finished, tmp_path: Path) -> None:
    run, data = finished
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    for i in range(4):
        shutil.copy(data / "images" / f"case{i:02}.nii.gz", images)
    work = Work(Predictor(trained_model(run, seeds=[0])), images, out)
    begun = iter(work.run())
    next(begun), next(begun)
    del begun  # interrupted
    with open(out / "cases.jsonl", "a") as file:
        file.write('{"id": "case02", "cont')  # a crash while a line was written
    again = predicted(run, images, out, seeds=[0])
    assert [result.resumed for result in again] == [True, True, False, False]
    whole = {path.name: path.read_bytes() for path in out.iterdir() if path.suffix in (".gz", ".csv")}
    assert len(whole) == 5
    shutil.copy(data / "images" / "case09.nii.gz", images / "case01.nii.gz")  # another image of the same name
    (out / "case03.nii.gz").unlink()
    third = predicted(run, images, out, seeds=[0])
    assert {result.id for result in third if not result.resumed} == {"case01", "case03"}
    assert (out / "case03.nii.gz").read_bytes() == whole["case03.nii.gz"]
    assert list(table(out)) == ["case00", "case01", "case02", "case03"]
    with pytest.raises(PolyclinicError, match=r"made in another way \(model differ\).*--fresh"):
        predicted(run, images, out, seeds=[1])
    assert not any(result.resumed for result in predicted(run, images, out, seeds=[1], fresh=True))


def test_what_cannot_be_predicted_is_refused_with_a_reason(finished: Finished, tmp_path: Path) -> None:
    run, data = finished
    for how, message in (
        ({"method": "fedprox"}, "has no method fedprox. It has fedavg, ditto"),
        ({"seeds": [7]}, "has no seed 7. It has 0, 1"),
        ({"folds": [0]}, "has no fold 0. It has none"),
        ({"method": "ditto", "site": "site-9"}, "has no training site site-9"),
    ):
        with pytest.raises(NoModel, match=message):
            trained_model(run, **how)  # type: ignore[arg-type]
    model = Predictor(trained_model(run, seeds=[0]))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(PolyclinicError, match="no images here"):
        Work(model, empty, tmp_path / "out")
    with pytest.raises(PolyclinicError, match=r"nothing here"):
        Work(model, tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(PolyclinicError, match="is the folder of the images"):
        Work(model, data / "images", data / "images")
    (empty / "notes.txt").write_text("mine")
    with pytest.raises(PolyclinicError, match="files of something else"):
        Work(model, data / "images", empty)
    shutil.copy(data / "images" / "case00.nii.gz", empty)
    (empty / "broken.nii.gz").write_bytes(b"no image")
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(empty / "flat.png")
    results = {result.id: result for result in predicted(run, empty, tmp_path / "out", seeds=[0])}
    assert results["case00"].row
    assert "broken.nii.gz" in results["broken"].problem
    assert "does not state its pixel size" in results["flat"].problem
    assert list(table(tmp_path / "out")) == ["case00"]


def test_a_name_that_says_compressed_of_a_file_that_is_not(finished: Finished, tmp_path: Path) -> None:
    """The image is read by its content, and so is the header that its mask gets."""
    run, data = finished
    (tmp_path / "in").mkdir()
    for name, content in (
        ("plain.nii.gz", gzip.decompress((data / "images" / "case00.nii.gz").read_bytes())),
        ("packed.nii.gz", (data / "images" / "case00.nii.gz").read_bytes()),
    ):
        (tmp_path / "in" / name).write_bytes(content)
    assert not any(done.problem for done in predicted(run, tmp_path / "in", tmp_path / "out"))
    one, other = (gzip.decompress((tmp_path / "out" / name).read_bytes()) for name in ("plain.nii.gz", "packed.nii.gz"))
    assert one == other


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("arms/fedavg-seed0/model.safetensors", b"", "is damaged"),
        ("arms/fedavg-seed0/model.safetensors", None, "is damaged"),
        ("study.toml", b"\xff\xfe\x00name", "study.toml: is damaged"),
        ("study.toml", b"", "study.toml is missing"),
        ("run.json", b"[]", "must be a table"),
    ],
)
def test_a_damaged_run_is_refused_by_the_name_of_its_file(
    finished: Finished, tmp_path: Path, file: str, content: bytes | None, message: str
) -> None:
    shutil.copytree(finished[0], tmp_path / "run")
    path = tmp_path / "run" / file
    path.write_bytes(path.read_bytes()[:2000] if content is None else content)
    with pytest.raises(PolyclinicError, match=message) as refused:
        trained_model(tmp_path / "run", "fedavg")
    assert path.name in str(refused.value)


@pytest.mark.parametrize("device", ["cuda:99", "nonsense"])
def test_a_device_that_is_not_here_is_named_before_anything_is_read(tmp_path: Path, device: str) -> None:
    with pytest.raises(PolyclinicError, match=f'device = "{device}"'):
        models.predict(tmp_path / "run", tmp_path, out=tmp_path / "out", device=device)


def test_two_images_of_one_name_are_refused(classified: Finished, tmp_path: Path) -> None:
    run, _ = classified
    for name in ("a.png", "a.tif"):
        Image.fromarray(np.zeros((16, 16), np.uint8)).save(tmp_path / name)
    with pytest.raises(PolyclinicError, match="several images are called a"):
        Work(Predictor(trained_model(run)), tmp_path, tmp_path / "out")


def test_a_bundle_predicts_as_its_run(finished: Finished, tmp_path: Path) -> None:
    run, data = finished
    bundle = export(run, "bundle", tmp_path / "bundle", "fedavg", 0)
    for model, out in ((run, "a"), (bundle, "b")):
        label, seeds = ("", []) if model == bundle else ("fedavg", [0])
        predicted(model, data / "images" / "case05.nii.gz", tmp_path / out, method=label, seeds=seeds)
    assert (tmp_path / "a" / "case05.nii.gz").read_bytes() == (tmp_path / "b" / "case05.nii.gz").read_bytes()
    with pytest.raises(NoModel, match="a bundle holds one model"):
        trained_model(bundle, "fedavg")
    (bundle / "configs" / "reading.json").write_text('{"steps": [{"step": "none"}]}')
    with pytest.raises(PolyclinicError, match="does not say how images are read"):
        trained_model(bundle)


def test_classes_are_a_table_of_the_runs_probabilities(classified: Finished, tmp_path: Path) -> None:
    run, archive = classified
    results = predicted(run, archive, tmp_path / "out")
    assert len(results) == 60
    assert not list(tmp_path.glob("out-*"))
    assert not list(tmp_path.parent.glob("out-*"))
    _, _, split = read_again(read_run(run), 0)
    stored = load_file(run / "arms" / "fedavg-seed0" / "predictions.safetensors")
    rows = table(tmp_path / "out")
    for site in ("site-1", "site-2"):
        names = [name.replace("../", "").replace("out", "_.._out") for name in split.sites[site]["test"].ids]
        mine = [[float(rows[name][f"p_class {k}"]) for k in range(3)] for name in names]
        np.testing.assert_allclose(mine, stored[f"{site}/score"], atol=2e-6)
    row = next(iter(rows.values()))
    p = np.array([float(row[f"p_class {k}"]) for k in range(3)])
    assert row["class"] == f"class {p.argmax()}"
    assert float(row["entropy"]) == pytest.approx(-(p * np.log(p)).sum(), abs=1e-4)
    with pytest.raises(PolyclinicError, match="write maps of masks"):
        Work(Predictor(trained_model(run)), archive, tmp_path / "more", Outputs(uncertainty=True))
    Image.fromarray(np.load(archive)["images"][7]).save(tmp_path / "seven.png")
    (alone,) = predicted(run, tmp_path / "seven.png", tmp_path / "seven")
    assert alone.row["p_class 0"] == pytest.approx(float(rows["_.._out-07"]["p_class 0"]), abs=1e-6)
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(tmp_path / "large.png")
    (large,) = predicted(run, tmp_path / "large.png", tmp_path / "large")
    assert "the image is 1 x 20 x 20, and the model takes 1 x 16 x 16" in large.problem
