"""DICOM series: millimeters, units and orientation, against what was written and against SimpleITK."""

import logging
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polyclinic.data.formats.dicom.file import open_dicom, quiet, stored_pixels
from polyclinic.data.formats.dicom.series import Series, dicom_files, find_series, read_dicom, read_series
from polyclinic.data.formats.safe_reading import Limits, Unreadable
from tests.support.image_files import (
    RADIOGRAPH,
    ULTRASOUND,
    ULTRASOUND_LOOP,
    enhanced,
    image,
    oblique,
    pydicom,
    save,
    series,
)

VOLUME = np.random.default_rng(1).integers(-1000, 2000, (6, 7, 9)).astype(np.int16)


def the_series(folder: Path) -> Series:
    found = find_series(dicom_files(folder))
    assert not found.problems
    assert len(found.series) == 1
    return found.series[0]


def place(volume: torch.Tensor, x: float, y: float, z: float) -> np.ndarray:
    return (volume.numpy() @ np.array([x, y, z, 1.0]))[:3]


@pytest.mark.parametrize("turn", [np.eye(3), oblique(), oblique((80, 10, -60)), np.diag([1.0, -1, -1])])
def test_a_series_comes_back_whatever_its_plane_and_file_order(tmp_path: Path, turn: np.ndarray) -> None:
    series(tmp_path, VOLUME, (2.5, 0.5, 0.75), turn, RescaleSlope=2, RescaleIntercept=-1024)
    volume = read_series(the_series(tmp_path))
    np.testing.assert_array_equal(volume.array.numpy(), VOLUME * 2.0 - 1024)
    np.testing.assert_allclose(volume.spacing_mm, (2.5, 0.5, 0.75), rtol=1e-6)
    assert (volume.units, volume.modality) == ("HU", "CT")
    ras = np.diag([-1.0, -1.0, 1.0])
    expected = ras @ (turn @ (np.array([3, 2, 4]) * [0.75, 0.5, 2.5]) + [10, -20, 30])
    np.testing.assert_allclose(place(volume.affine, 3, 2, 4), expected, atol=1e-6)


@pytest.mark.parametrize("turn", [np.eye(3), oblique(), oblique((80, 10, -60))])
def test_simpleitk_sees_the_same_values_in_the_same_places(tmp_path: Path, turn: np.ndarray) -> None:
    sitk = pytest.importorskip("SimpleITK", reason="SimpleITK is only a second opinion")
    series(tmp_path, VOLUME, (2.5, 0.5, 0.75), turn, RescaleSlope=2, RescaleIntercept=-1024)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path)))
    theirs, ours = reader.Execute(), read_series(the_series(tmp_path))
    np.testing.assert_array_equal(ours.array.numpy(), sitk.GetArrayFromImage(theirs))
    for x, y, z in ((0, 0, 0), (8, 0, 0), (0, 6, 0), (0, 0, 5), (3, 2, 4)):
        point = np.array(theirs.TransformIndexToPhysicalPoint((x, y, z))) * [-1, -1, 1]
        np.testing.assert_allclose(place(ours.affine, x, y, z), point, atol=1e-4)


def test_pydicoms_own_samples_equal_simpleitk_where_both_can_read() -> None:
    sitk = pytest.importorskip("SimpleITK", reason="SimpleITK is only a second opinion")
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    agreed = 0
    for name in (
        "CT_small",
        "MR_small",
        "MR_small_RLE",
        "MR_small_implicit",
        "693_J2KI",
        "MR_small_jp2klossless",
        "examples_overlay",
        "MR_small_bigendian",
    ):
        path = pydicom.data.get_testdata_file(f"{name}.dcm", download=False)
        ours = read_dicom(path)
        try:
            theirs = sitk.ReadImage(path)
        except RuntimeError:
            continue
        np.testing.assert_allclose(ours.array.numpy(), sitk.GetArrayFromImage(theirs), rtol=1e-6)
        np.testing.assert_allclose(ours.spacing_mm[1:], theirs.GetSpacing()[1::-1], rtol=1e-6)
        point = np.array(theirs.TransformIndexToPhysicalPoint((3, 5, 0))) * [-1, -1, 1]
        np.testing.assert_allclose(place(ours.affine, 3, 5, 0), point, atol=1e-3)
        agreed += 1
    assert agreed >= 6


def test_every_sample_of_pydicom_is_read_like_pydicom_or_refused_in_one_line() -> None:
    folder = Path(pydicom.__file__).parent / "data" / "test_files"
    read, refused = 0, []
    for path in sorted(folder.glob("*.dcm")):
        try:
            stored = stored_pixels(path, open_dicom(path))
        except Unreadable as refusal:
            refused.append(str(refusal))
            continue
        read += 1
        if "palette" not in path.name:
            with quiet():
                expected = pydicom.dcmread(path).pixel_array
            np.testing.assert_array_equal(stored.reshape(expected.shape), expected)
    assert read >= 50
    assert all("\n" not in line and len(line) < 200 for line in refused)
    assert any("pip install pyjpegls" in line for line in refused) or not any("JPEG-LS" in line for line in refused)


@pytest.mark.parametrize(
    ("allocated", "stored"),
    [(8, 1), (8, 5), (8, 8), (16, 1), (16, 10), (16, 12), (16, 16), (32, 12), (32, 27), (32, 32)],
)
@pytest.mark.parametrize("signed", [False, True])
def test_bits_beyond_the_stored_ones_have_no_meaning(signed: bool, allocated: int, stored: int, tmp_path: Path) -> None:
    """They hold overlays in older files; pydicom, which is the second implementation, clears them too."""
    raw = np.random.default_rng(stored).bytes(12 * allocated // 8)
    pixels = np.frombuffer(raw, f"{'i' if signed else 'u'}{allocated // 8}").reshape(3, 4)
    path = save(image(pixels, "CT", BitsStored=stored, HighBit=stored - 1), tmp_path / "a.dcm")
    with quiet():
        expected = pydicom.dcmread(path).pixel_array
    np.testing.assert_array_equal(stored_pixels(path, open_dicom(path))[0], expected)
    bits = [np.binary_repr(int(v), allocated)[-stored:] for v in pixels.flat]
    assert [np.binary_repr(int(v), allocated)[-stored:] for v in expected.flat] == bits
    assert len(set(expected.flat)) <= 2**stored


def test_monochrome1_is_turned_except_where_numbers_are_physical(tmp_path: Path) -> None:
    pixels = np.array([[0, 10], [4000, 4095]], dtype=np.uint16)
    shown: dict[str, Any] = {"PhotometricInterpretation": "MONOCHROME1", "BitsStored": 12, "HighBit": 11}
    film = read_dicom(save(image(pixels, "CR", RADIOGRAPH, **shown), tmp_path / "cr.dcm"))
    np.testing.assert_array_equal(film.array[0].numpy(), 4095 - pixels.astype(float))
    assert any("inverted" in note for note in film.notes)
    ct = read_dicom(save(image(pixels, "CT", RescaleIntercept=-1024, RescaleSlope=1, **shown), tmp_path / "ct.dcm"))
    np.testing.assert_array_equal(ct.array[0].numpy(), pixels - 1024.0)
    signed = image(np.array([[-5, 7]], np.int16), "MR", PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(read_dicom(save(signed, tmp_path / "mr.dcm")).array[0].numpy(), [[4, -8]])


def test_a_radiograph_says_where_its_spacing_comes_from(tmp_path: Path) -> None:
    pixels = np.zeros((4, 4), np.uint16)
    path = save(image(pixels, "DX", RADIOGRAPH, ImagerPixelSpacing=[0.2, 0.1]), tmp_path / "a.dcm")
    volume = read_dicom(path)
    assert volume.spacing_mm == (1.0, 0.2, 0.1)
    assert volume.measured
    assert any("detector" in note for note in volume.notes)
    assert not read_dicom(save(image(pixels, "DX", RADIOGRAPH), tmp_path / "b.dcm")).measured


def test_ultrasound_in_color_and_as_a_loop(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (5, 6, 3)).astype(np.uint8)
    region = pydicom.dataset.Dataset()
    region.PhysicalUnitsXDirection = region.PhysicalUnitsYDirection = 3  # centimetres
    region.PhysicalDeltaX, region.PhysicalDeltaY = 0.02, 0.03
    dataset = image(pixels, "US", ULTRASOUND, SequenceOfUltrasoundRegions=[region])
    still = read_dicom(save(dataset, tmp_path / "us.dcm"))
    assert (still.units, tuple(still.array.shape), still.array.dtype) == ("RGB", (3, 1, 5, 6), torch.uint8)
    np.testing.assert_array_equal(still.array[:, 0].numpy(), np.moveaxis(pixels, -1, 0))
    np.testing.assert_allclose(still.spacing_mm[1:], (0.3, 0.2))
    frames = np.random.default_rng(0).integers(0, 255, (4, 5, 6)).astype(np.uint8)
    loop = read_dicom(save(image(frames, "US", ULTRASOUND_LOOP), tmp_path / "loop.dcm"))
    np.testing.assert_array_equal(loop.array.numpy(), frames)
    assert any("time points or views" in note for note in loop.notes)


def test_enhanced_frames_are_ordered_by_position_with_their_own_slopes(tmp_path: Path) -> None:
    frames = np.arange(4 * 2 * 3, dtype=np.int16).reshape(4, 2, 3)
    heights, slopes = [7.5, 0.0, 2.5, 5.0], [1.0, 2.0, 3.0, 4.0]
    volume = read_dicom(save(enhanced(frames, heights, slopes), tmp_path / "e.dcm"))
    scaled = frames * np.array(slopes)[:, None, None] - 10
    np.testing.assert_array_equal(volume.array.numpy(), scaled[np.argsort(heights)])
    assert volume.spacing_mm == (2.5, 0.5, 0.75)
    with pytest.raises(Unreadable, match="describes 4 frames and holds 3"):
        read_dicom(save(enhanced(frames[:3], heights, slopes), tmp_path / "f.dcm"))


def test_enhanced_frames_with_their_own_orientation_equal_simpleitk(tmp_path: Path) -> None:
    """Positions, orientations and spacings that each frame states, in an oblique plane."""
    itk = pytest.importorskip("SimpleITK")
    volume, turn = VOLUME[:4, :5, :6], oblique()
    data = enhanced(volume, range(4))
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID
    shared = data.SharedFunctionalGroupsSequence[0]
    for k, item in enumerate(data.PerFrameFunctionalGroupsSequence):
        place = np.array([10.0, -20.0, 30.0]) + turn[:, 2] * 2.5 * k
        item.PlanePositionSequence[0].ImagePositionPatient = [float(f"{v:.9g}") for v in place]
        item.PlaneOrientationSequence = deepcopy(shared.PlaneOrientationSequence)
        cosines = [float(f"{v:.9g}") for v in (*turn[:, 0], *turn[:, 1])]
        item.PlaneOrientationSequence[0].ImageOrientationPatient = cosines
        item.PixelMeasuresSequence = deepcopy(shared.PixelMeasuresSequence)
    del shared.PlaneOrientationSequence, shared.PixelMeasuresSequence
    path = save(data, tmp_path / "e.dcm")
    ours, theirs = read_dicom(path), itk.ReadImage(str(path))
    assert np.array_equal(ours.array.numpy(), itk.GetArrayFromImage(theirs).astype(np.float32))
    for index in ((0, 0, 0), (5, 4, 3), (2, 1, 2)):
        lps = np.array(theirs.TransformIndexToPhysicalPoint(index))
        ras = ours.affine.numpy() @ np.array([*index, 1.0])
        assert np.allclose(ras[:3] * [-1, -1, 1], lps, atol=1e-3)


def test_a_dose_grid_is_in_gray_at_its_offsets() -> None:
    volume = read_dicom(pydicom.data.get_testdata_file("rtdose.dcm", download=False))
    assert volume.units == "Gy"
    assert volume.array.shape == (15, 10, 10)
    dataset = pydicom.dcmread(pydicom.data.get_testdata_file("rtdose.dcm", download=False))
    np.testing.assert_allclose(volume.array.numpy(), dataset.pixel_array * float(dataset.DoseGridScaling), rtol=1e-6)
    step = float(dataset.GridFrameOffsetVector[1]) - float(dataset.GridFrameOffsetVector[0])
    assert volume.spacing_mm[0] == pytest.approx(step)


def test_missing_uneven_and_sheared_slices_are_refused(tmp_path: Path) -> None:
    def heights(name: str, zs: Sequence[float], ys: Sequence[float] | None = None) -> Path:
        uid = pydicom.uid.generate_uid()
        for k, z in enumerate(zs):
            where: dict[str, Any] = {"ImagePositionPatient": [0, (ys or [0] * 9)[k], z]}
            where["ImageOrientationPatient"] = [1, 0, 0, 0, 1, 0]
            dataset = image(VOLUME[0], SeriesInstanceUID=uid, PixelSpacing=[1, 1], **where)
            save(dataset, tmp_path / name / f"{k}.dcm")
        return tmp_path / name

    assert read_series(the_series(heights("even", [0, 3, 6, 9]))).spacing_mm[0] == 3
    for name, zs, ys, why in (
        ("missing", [0, 3, 6, 12, 15], None, "1 slices are missing"),
        ("uneven", [0, 3, 6, 10, 13], None, "unevenly spaced, from 3 to 4 mm"),
        ("sheared", [0, 3, 6, 9], [0.0, 1, 2, 3], "sheared by 18.4 degrees"),
        ("wander", [0, 3, 6, 9], [0.0, 1, -1, 0], "stray by"),
        ("twice", [0, 3, 3, 6], None, "that no tag distinguishes"),
    ):
        with pytest.raises(Unreadable, match=why):
            read_series(the_series(heights(name, zs, ys)))


def test_one_series_number_with_several_images_is_split(tmp_path: Path) -> None:
    uid = pydicom.uid.generate_uid()
    for echo in (10, 20):
        series(tmp_path / f"echo{echo}", VOLUME + echo, SeriesInstanceUID=uid, EchoTime=echo)
    scout = oblique((90, 0, 0))
    series(tmp_path / "scout", VOLUME, turn=scout, SeriesInstanceUID=uid, EchoTime=10)
    found = find_series(dicom_files(tmp_path))
    assert sorted(len(s.paths) for s in found.series) == [6, 6, 6]
    means = sorted(float(read_series(s).array.double().mean()) for s in found.series)
    np.testing.assert_allclose(means, sorted(VOLUME.mean() + d for d in (0, 10, 20)))


def test_a_refused_file_and_a_report_do_not_stop_the_rest(tmp_path: Path) -> None:
    series(tmp_path, VOLUME)
    (tmp_path / "junk.dcm").write_bytes(np.random.default_rng(0).bytes(4096))
    report = pydicom.dcmread(pydicom.data.get_testdata_file("test-SR.dcm", download=False))
    save(report, tmp_path / "report.dcm")
    (tmp_path / "notes.txt").write_text("not an image")
    found = find_series(dicom_files(tmp_path))
    assert [str(p) for p in found.problems] == ["junk.dcm: is not a DICOM file (the word DICM is missing at byte 128)"]
    assert (len(found.series), found.not_images) == (1, 1)
    with pytest.raises(Unreadable, match="DICM"):
        read_dicom(tmp_path)


def test_identifiers_are_not_in_the_repr(tmp_path: Path) -> None:
    series(tmp_path, VOLUME, PatientID="MRN123456")
    found = find_series(dicom_files(tmp_path))
    assert found.series[0].patient == "MRN123456"
    assert "MRN123456" not in repr(found)


def test_deflated_files_are_read_within_their_bound(tmp_path: Path) -> None:
    path = pydicom.data.get_testdata_file("image_dfl.dcm", download=False)
    np.testing.assert_array_equal(read_dicom(path).array[0].numpy(), pydicom.dcmread(path).pixel_array)
    with pytest.raises(Unreadable, match="inflate to more than"):
        read_dicom(path, limits=Limits(inflated_bytes=1000))


def test_not_finite_numbers_in_the_header_are_refused(tmp_path: Path) -> None:
    pixels = np.zeros((4, 4), np.int16)
    for field, value, why in (
        ("RescaleSlope", "nan", "RescaleSlope is not 1 finite number"),
        ("RescaleSlope", "0", "RescaleSlope is 0"),
        ("PixelSpacing", ["0", "1"], "PixelSpacing is not positive"),
        ("ImageOrientationPatient", ["1", "0", "0", "1", "0", "0"], "perpendicular"),
        ("ImagePositionPatient", ["inf", "0", "0"], "ImagePositionPatient is not 3 finite"),
    ):
        fields: dict[str, Any] = {
            "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
            "ImagePositionPatient": [0, 0, 0],
            field: value,
        }
        with quiet():
            path = save(image(pixels, **{"PixelSpacing": [1, 1], **fields}), tmp_path / "a.dcm")
        with pytest.raises(Unreadable, match=why):
            read_dicom(path)


def test_reading_in_threads_is_quiet_and_leaves_warnings_as_they_were(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with quiet():
        dataset = image(VOLUME[0], StudyDate="not a date MRN771234", ImagePositionPatient=[0, 0, 0])
        for i in range(24):
            save(dataset, tmp_path / f"{i}.dcm")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = (list(warnings.filters), logging.getLogger("pydicom").level)
        with ThreadPoolExecutor(6) as pool:
            read = list(pool.map(read_dicom, sorted(tmp_path.glob("*.dcm"))))
        assert (list(warnings.filters), logging.getLogger("pydicom").level) == before
    assert len(read) == 24
    assert "771234" not in caplog.text + "".join(str(w.message) for w in caught)
