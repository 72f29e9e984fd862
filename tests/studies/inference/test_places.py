"""Where images are, how they are read, and the files of masks: pictures, archives, channels and DICOM series."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from polyclinic.data.files import OPTIONS, read_image
from polyclinic.data.formats.dicom.series import read_dicom
from polyclinic.data.preprocessing.transforms import Resize
from polyclinic.errors import PolyclinicError
from polyclinic.studies.inference.image_files import mask_name, write_map, write_mask
from polyclinic.studies.inference.reading import Case, Reading, cases_at, pictures
from tests.support.image_files import series

VOLUMES = Reading((), OPTIONS, 1, 3)


def test_the_mask_of_a_picture_is_a_picture_of_its_size(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((31, 47, 3), np.uint8)).save(tmp_path / "eye.png")
    reading = Reading((Resize(16),), OPTIONS, 3, 2)
    (case,) = cases_at(tmp_path / "eye.png", reading)
    ((_, picture),) = pictures([case], reading)
    assert not isinstance(picture, str)
    assert picture.geometry is not None
    scores = torch.zeros(3, 16, 16)
    scores[0] = 0.5
    scores[2, :8] = 1.0
    labels = picture.geometry.labels(scores)
    assert write_mask(tmp_path, case, labels, picture.geometry) == "eye.png" == mask_name(case, picture.geometry)
    stored = np.asarray(Image.open(tmp_path / "eye.png"))
    assert stored.shape == (31, 47)
    assert set(np.unique(stored)) == {0, 2}
    assert (stored[:15] == 2).all()
    assert (stored[16:] == 0).all()
    name = write_map(tmp_path, case, "entropy", labels.float(), picture.geometry)
    np.testing.assert_array_equal(np.load(tmp_path / name), stored)


def test_a_dicom_series_is_one_image_and_its_mask_lies_on_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        series(tmp_path / name, rng.integers(0, 900, (5, 8, 6)).astype(np.int16))
    both, alone = cases_at(tmp_path, VOLUMES), cases_at(tmp_path / "two", VOLUMES)
    assert [case.id for case in both] == ["one", "two"]
    assert [case.id for case in alone] == ["two"]
    ((case, picture),) = pictures(alone, VOLUMES)
    assert not isinstance(picture, str)
    assert picture.geometry is not None
    labels = (picture.pixels[0] > 450).to(torch.uint8)
    write_mask(tmp_path, case, labels, picture.geometry)
    made, volume = nib.load(tmp_path / "two.nii.gz"), read_dicom(tmp_path / "two")
    np.testing.assert_allclose(made.affine, volume.affine.numpy(), atol=1e-5)
    np.testing.assert_array_equal(np.asarray(made.dataobj).transpose(2, 1, 0), (volume.array > 450).numpy())
    again = read_image([tmp_path / "two.nii.gz"])
    assert torch.equal(again.pixels[0], labels.float())


def test_channels_are_grouped_as_in_training(tmp_path: Path) -> None:
    for case in ("a", "b"):
        for channel in range(2):
            nib.save(
                nib.Nifti1Image(np.full((4, 4, 4), channel, np.float32), np.eye(4)),
                tmp_path / f"{case}_000{channel}.nii",
            )
    (tmp_path / "b_0001.nii").unlink()
    reading = Reading((), OPTIONS, 2, 3, grouped=True)
    cases = cases_at(tmp_path, reading)
    assert [(case.id, len(case.files)) for case in cases] == [("a", 2), ("b", 1)]
    (_, first), (_, second) = pictures(cases, reading)
    assert not isinstance(first, str)
    assert first.pixels.mean((1, 2, 3)).tolist() == [0, 1]
    assert (
        second
        == "b_0000.nii: has 1 channel, and the model takes 2: give one file for each, named CASE_0000, CASE_0001, ..."
    )
    assert len(cases_at(tmp_path, VOLUMES)) == 3


def test_a_reading_survives_its_table(tmp_path: Path) -> None:
    reading = Reading((Resize((16, 12)),), OPTIONS, 3, 2, grouped=True, array="x")
    assert Reading.of_table(reading.table) == reading
    with pytest.raises(PolyclinicError, match="does not say how images are read"):
        Reading.of_table({**reading.table, "bits": 99})
    np.savez(tmp_path / "other.npz", pixels=np.zeros((2, 8, 8)))
    with pytest.raises(PolyclinicError, match="no array of images called 'x'"):
        cases_at(tmp_path / "other.npz", reading)
    (tmp_path / "images.zip").write_bytes(b"PK")
    with pytest.raises(PolyclinicError, match="unpack the archive"):
        cases_at(tmp_path / "images.zip", reading)


def test_names_in_an_archive_stay_in_the_folder(tmp_path: Path) -> None:
    names = np.array(["../x", ".hidden", "/etc/y", ".."])
    np.savez(tmp_path / "images.npz", images=np.zeros((4, 8, 8), np.uint8), names=names)
    found = [case.id for case in cases_at(tmp_path / "images.npz", Reading((), OPTIONS, 1, 2))]
    assert len(set(found)) == 4
    assert not any("/" in name or name.startswith(".") for name in found)


def test_a_nifti_2_image_gives_a_nifti_2_mask(tmp_path: Path) -> None:
    image = nib.Nifti2Image(np.zeros((4, 5, 6), np.int16), np.diag([2.0, 3.0, 4.0, 1.0]))
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"a private remark"))
    nib.save(image, tmp_path / "image.nii.gz")
    picture = read_image([tmp_path / "image.nii.gz"])
    assert picture.geometry is not None
    case = Case("mask", (tmp_path / "image.nii.gz",))
    write_mask(tmp_path, case, torch.ones(picture.size, dtype=torch.uint8), picture.geometry)
    made = nib.load(tmp_path / "mask.nii.gz")
    assert isinstance(made, nib.Nifti2Image)
    assert made.affine.tobytes() == image.affine.tobytes()
    assert not made.header.extensions  # which may name a patient
