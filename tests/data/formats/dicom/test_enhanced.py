"""Enhanced multi-frame images against highdicom, and those that are not one volume."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items

from polyclinic.data.examples import DataError
from polyclinic.data.formats.dicom.series import read_dicom
from tests.support.image_files import enhanced, image, oblique, pydicom, save

FRAMES = np.arange(6 * 8 * 10, dtype=np.int16).reshape(6, 8, 10)
HEIGHTS = [3.0, 9.0, 0.0, 6.0, 15.0, 12.0]


def mr_frames(turn: np.ndarray, heights: list[float] = HEIGHTS, volume: np.ndarray = FRAMES) -> Dataset:
    """An enhanced CT whose frames lie along the normal of an oblique plane."""
    data = enhanced(volume, heights)
    data.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0].ImageOrientationPatient = [
        float(f"{v:.9g}") for v in (*turn[:, 0], *turn[:, 1])
    ]
    for item, height in zip(data.PerFrameFunctionalGroupsSequence, heights, strict=True):
        position = np.array([5.0, -7.0, 11.0]) + turn[:, 2] * height
        item.PlanePositionSequence[0].ImagePositionPatient = [float(f"{v:.9g}") for v in position]
    return data


def marked(data: Dataset, group: str, keyword: str, values: list[Any]) -> Dataset:
    """Adds one element to a functional group of each frame."""
    for item, value in zip(data.PerFrameFunctionalGroupsSequence, values, strict=True):
        inner = item[group].value[0] if group in item else Dataset()
        setattr(inner, keyword, value)
        setattr(item, group, Items([inner]))
    return data


@pytest.mark.parametrize("turn", [np.eye(3), oblique(), oblique((90.0, 0.0, 180.0))])
def test_frames_lie_where_highdicom_places_them(tmp_path: Path, turn: np.ndarray) -> None:
    highdicom = pytest.importorskip("highdicom", reason="highdicom is only a second opinion")
    path = save(with_values(FrameOfReferenceUID="1.2.3")(mr_frames(turn)), tmp_path / "e.dcm")
    ours = read_dicom(path)
    theirs = highdicom.Image.from_dataset(pydicom.dcmread(path)).get_volume(apply_real_world_transform=False)
    to_ras = np.diag([-1.0, -1, 1, 1]) @ theirs.affine  # highdicom's index is (slice, row, column)
    ours_inverse = np.linalg.inv(ours.affine.numpy())
    for index in np.ndindex(theirs.array.shape):
        x, y, z, _ = ours_inverse @ (to_ras @ [*index, 1])
        np.testing.assert_allclose((x, y, z), np.rint((x, y, z)), atol=1e-3)
        assert float(ours.array[round(z), round(y), round(x)]) == theirs.array[index]


def test_units_are_those_of_the_functional_groups(tmp_path: Path) -> None:
    assert read_dicom(save(mr_frames(np.eye(3)), tmp_path / "a.dcm")).units == "HU"
    other = marked(mr_frames(np.eye(3)), "PixelValueTransformationSequence", "RescaleType", ["US"] * 6)
    assert read_dicom(save(other, tmp_path / "b.dcm")).units == ""
    mixed = marked(mr_frames(np.eye(3)), "PixelValueTransformationSequence", "RescaleType", ["US", *["HU"] * 5])
    assert read_dicom(save(mixed, tmp_path / "c.dcm")).units == ""


def without_position(data: Dataset) -> Dataset:
    del data.PerFrameFunctionalGroupsSequence[2].PlanePositionSequence
    return data


def two_stacks(data: Dataset) -> Dataset:
    marked(data, "FrameContentSequence", "StackID", ["1", "1", "1", "2", "2", "2"])
    turn = Dataset()
    turn.ImageOrientationPatient = [0, 1, 0, 0, 0, 1]
    for item in data.PerFrameFunctionalGroupsSequence[3:]:
        item.PlaneOrientationSequence = Items([turn])
    return data


def with_values(**values: Any) -> Callable[[Dataset], Dataset]:
    def changed(data: Dataset) -> Dataset:
        for name, value in values.items():
            setattr(data, name, value)
        return data

    return changed


TWICE = [0.0, 3.0, 6.0, 0.0, 3.0, 6.0]
STRANGE: dict[str, tuple[Callable[[], Dataset], str]] = {
    "a frame without a position": (
        lambda: without_position(mr_frames(np.eye(3))),
        "states the position of 5 of its 6 frames",
    ),
    "two stacks": (lambda: two_stacks(mr_frames(np.eye(3))), "contains 2 images, distinguished by StackID"),
    "two time points": (
        lambda: marked(
            mr_frames(np.eye(3), TWICE), "FrameContentSequence", "TemporalPositionIndex", [1, 1, 1, 2, 2, 2]
        ),
        "contains 2 images, distinguished by TemporalPositionIndex",
    ),
    "two echoes": (
        lambda: marked(mr_frames(np.eye(3), TWICE), "MREchoSequence", "EffectiveEchoTime", [10.0, 10, 10, 80, 80, 80]),
        "contains 2 images, distinguished by EffectiveEchoTime",
    ),
    "b-values": (
        lambda: marked(
            mr_frames(np.eye(3), TWICE), "MRDiffusionSequence", "DiffusionBValue", [0.0, 0, 0, 800, 800, 800]
        ),
        "contains 2 images, distinguished by DiffusionBValue",
    ),
    "positions that repeat without a reason": (
        lambda: mr_frames(np.eye(3), TWICE),
        "slices have the position of another",
    ),
    "missing frames": (lambda: mr_frames(np.eye(3), [0.0, 3, 6, 12, 15, 18]), "1 slices are missing"),
    "a concatenation": (
        lambda: with_values(InConcatenationNumber=1, InConcatenationTotalNumber=3)(mr_frames(np.eye(3))),
        "is one of 3 parts of an image",
    ),
    "the second part of a concatenation of unknown length": (
        lambda: with_values(InConcatenationNumber=2)(mr_frames(np.eye(3))),
        "parts of an image",
    ),
    "a slide in tiles": (
        lambda: image(np.zeros((6, 8, 10), np.uint8), "SM", TotalPixelMatrixRows=16, TotalPixelMatrixColumns=30),
        "is a slide of 16 x 30 pixels in tiles",
    ),
    "fewer groups than frames": (
        lambda: with_values(PerFrameFunctionalGroupsSequence=Items([Dataset()] * 5))(mr_frames(np.eye(3))),
        "describes 5 frames",
    ),
}


@pytest.mark.parametrize("name", STRANGE)
def test_what_is_not_one_volume_is_refused(tmp_path: Path, name: str) -> None:
    make, reason = STRANGE[name]
    with pytest.raises(DataError, match=reason):
        read_dicom(save(make(), tmp_path / "e.dcm"))


def test_one_part_of_one_is_read(tmp_path: Path) -> None:
    whole = with_values(InConcatenationNumber=1, InConcatenationTotalNumber=1)(mr_frames(np.eye(3)))
    assert read_dicom(save(whole, tmp_path / "a.dcm")).size == (6, 8, 10)
    tile = image(np.zeros((8, 10), np.uint8), "SM", TotalPixelMatrixRows=8, TotalPixelMatrixColumns=10)
    assert read_dicom(save(tile, tmp_path / "b.dcm")).size == (1, 8, 10)


def test_frames_without_positions_have_no_known_distance(tmp_path: Path) -> None:
    loop = image(np.zeros((4, 8, 10), np.uint8), "US", PixelSpacing=[0.5, 0.5])
    assert not read_dicom(save(loop, tmp_path / "loop.dcm")).measured
    single = image(np.zeros((8, 10), np.uint8), "US", PixelSpacing=[0.5, 0.5])
    assert read_dicom(save(single, tmp_path / "single.dcm")).measured
