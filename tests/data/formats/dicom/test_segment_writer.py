"""Masks written as DICOM segmentations lie where their image lies, read back by highdicom and by the package's reader."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyclinic.data.files import ImageOptions, read_case
from polyclinic.data.formats.dicom.file import open_dicom
from polyclinic.data.formats.dicom.segment_writer import Maker, require_writer, segmentation_of
from polyclinic.data.formats.safe_reading import Unreadable
from polyclinic.errors import MissingDependency
from tests.support.image_files import RADIOGRAPH, enhanced, generate_uid, image, oblique, pydicom, save, series

MAKER = Maker("fedavg", "0.1.0", "ab" * 32)
SIZE, STEP, ORIGIN = (5, 8, 9), (2.5, 0.5, 0.75), (10.0, -20.0, 30.0)
VALUES = np.arange(np.prod(SIZE), dtype=np.int16).reshape(SIZE)
NAMES = ("liver", "tumor")


def drawn(seed: int = 0, size: tuple[int, ...] = SIZE) -> np.ndarray:
    """Labels 0 to 2, with a slice without any."""
    labels = np.random.default_rng(seed).choice(3, size, p=[0.7, 0.2, 0.1]).astype(np.uint8)
    labels[1] = 0
    return labels


def written(path: Path, labels: np.ndarray, to: Path, names: tuple[str, ...] = NAMES) -> Path:
    pytest.importorskip("highdicom", reason="needs the extra dicom-seg")
    segmentation_of(path, labels, names, MAKER).save_as(to, enforce_file_format=True)
    return to


def read(image_: Path, seg: Path) -> np.ndarray:
    """Labels of the segmentation on the image's grid, by the package's own reader."""
    case = read_case([image_], seg, ImageOptions(segments=NAMES))
    assert case.mask is not None
    found: np.ndarray = case.mask.array.numpy()
    return found


@pytest.mark.parametrize("turn", [np.eye(3), oblique(), oblique()[:, [2, 0, 1]]], ids=["axial", "oblique", "turned"])
def test_a_series_gets_its_mask_at_the_exact_positions(tmp_path: Path, turn: np.ndarray) -> None:
    """The slices are stored in another order than they lie; each frame repeats the position of its slice."""
    files, labels = series(tmp_path / "ct", VALUES, STEP, turn, ORIGIN), drawn()
    seg = written(tmp_path / "ct", labels, tmp_path / "seg.dcm")
    np.testing.assert_array_equal(read(tmp_path / "ct", seg), labels)
    from highdicom.seg import segread

    made, slices = segread(seg), [pydicom.dcmread(file) for file in files]
    volume = made.get_volume(combine_segments=True)
    first = made.get_volume(combine_segments=True).get_geometry()
    for z, y, x in np.ndindex(*SIZE):
        place = np.array(ORIGIN) + turn @ [x * STEP[2], y * STEP[1], z * STEP[0]]
        inside = np.rint(first.map_reference_to_indices(place[None])[0]).astype(int)
        if (inside >= 0).all() and (inside < volume.spatial_shape).all():
            assert volume.array[tuple(inside)] == labels[z, y, x]
            np.testing.assert_allclose(first.map_indices_to_reference(inside[None])[0], place, atol=1e-4)
        else:
            assert labels[z, y, x] == 0  # empty slices at the ends are not stored
    stated = {tuple(s.ImagePositionPatient): s.SOPInstanceUID for s in slices}
    for frame in made.PerFrameFunctionalGroupsSequence:
        position = tuple(frame.PlanePositionSequence[0].ImagePositionPatient)
        (source,) = frame.DerivationImageSequence[0].SourceImageSequence
        assert stated[position] == source.ReferencedSOPInstanceUID
    assert made.FrameOfReferenceUID == slices[0].FrameOfReferenceUID
    assert made.StudyInstanceUID == slices[0].StudyInstanceUID
    assert made.SeriesInstanceUID != slices[0].SeriesInstanceUID
    assert [s.SegmentLabel for s in made.SegmentSequence] == list(NAMES)
    assert {s.SegmentAlgorithmType for s in made.SegmentSequence} == {"AUTOMATIC"}


def test_a_file_of_many_frames(tmp_path: Path) -> None:
    """Its frames do not lie in their order."""
    heights, labels = [5.0, 0.0, 2.5, 10.0, 7.5], drawn(1)
    data = enhanced(VALUES, heights)
    data.FrameOfReferenceUID = generate_uid()
    path = save(data, tmp_path / "enhanced.dcm")
    seg = written(path, labels, tmp_path / "seg.dcm")
    np.testing.assert_array_equal(read(path, seg), labels)


def test_a_mask_without_an_object_and_one_slice(tmp_path: Path) -> None:
    series(tmp_path / "ct", VALUES, STEP, None, ORIGIN)
    seg = written(tmp_path / "ct", np.zeros(SIZE, np.uint8), tmp_path / "empty.dcm")
    assert pydicom.dcmread(seg).NumberOfFrames == len(NAMES) * SIZE[0]
    assert not read(tmp_path / "ct", seg).any()
    series(tmp_path / "one", VALUES[:1], STEP, oblique(), ORIGIN)
    labels = drawn(2)[2:3]
    seg = written(tmp_path / "one", labels, tmp_path / "one.dcm")
    np.testing.assert_array_equal(read(tmp_path / "one", seg), labels)


def test_a_radiograph_without_a_position_is_referred_to(tmp_path: Path) -> None:
    data = image(VALUES[0].astype(np.uint16), "DX", RADIOGRAPH)
    path, labels = save(data, tmp_path / "chest.dcm"), drawn(3)[2:3]
    from_file = pydicom.dcmread(written(path, labels, tmp_path / "seg.dcm"))
    (source,) = from_file.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    assert source.ReferencedSOPInstanceUID == data.SOPInstanceUID
    pixels = from_file.pixel_array.reshape(-1, *SIZE[1:])
    np.testing.assert_array_equal(pixels, np.stack([labels[0] == 1, labels[0] == 2]))


def test_uids_follow_from_image_and_model(tmp_path: Path) -> None:
    series(tmp_path / "ct", VALUES, STEP, None, ORIGIN)
    pytest.importorskip("highdicom", reason="needs the extra dicom-seg")
    one, again = (segmentation_of(tmp_path / "ct", drawn(), NAMES, MAKER) for _ in range(2))
    other = segmentation_of(tmp_path / "ct", drawn(), NAMES, Maker("fedavg", "0.1.0", "cd" * 32))
    assert one.SOPInstanceUID == again.SOPInstanceUID
    assert len({one.SOPInstanceUID, other.SOPInstanceUID, one.SeriesInstanceUID, other.SeriesInstanceUID}) == 4


def test_what_cannot_be_repeated_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("highdicom", reason="needs the extra dicom-seg")
    series(tmp_path / "ct", VALUES, STEP, None, ORIGIN)
    with pytest.raises(Unreadable, match="has 5 x 8 x 9 voxels, and its mask 5 x 9 x 8"):
        segmentation_of(tmp_path / "ct", drawn().transpose(0, 2, 1), NAMES, MAKER)
    for file in (tmp_path / "ct").iterdir():
        data = pydicom.dcmread(file)
        del data.FrameOfReferenceUID
        data.save_as(file)
    with pytest.raises(Unreadable, match="no FrameOfReferenceUID"):
        segmentation_of(tmp_path / "ct", drawn(), NAMES, MAKER)
    seg = written(*_pair(tmp_path))
    with pytest.raises(Unreadable, match="contains no image"):
        segmentation_of(seg, drawn(), NAMES, MAKER)


def _pair(folder: Path) -> Any:
    series(folder / "other", VALUES, STEP, None, ORIGIN)
    return folder / "other", drawn(), folder / "mask.dcm"


def test_without_highdicom_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(MissingDependency, match=r"polyclinic\[dicom-seg\]"):
        require_writer()


def test_the_image_is_opened_without_its_pixels(tmp_path: Path) -> None:
    (file, *_) = series(tmp_path / "ct", VALUES, STEP, None, ORIGIN)
    assert "PixelData" not in open_dicom(file, pixels=False)
