"""A mask is laid over its image where SimpleITK lays it, or it is refused: never turned apart, whatever the affines."""

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polyclinic.data.files import ImageOptions, read_case, read_image
from polyclinic.data.formats.grids import GridMismatch, largest_distance, matched, same_grid, tolerance_of
from polyclinic.data.formats.safe_reading import Unreadable
from polyclinic.data.formats.volume import Volume
from tests.support.image_files import series

LPS = np.array([[-1.0, 0, 0, 30], [0, -1, 0, 40], [0, 0, 2, -20], [0, 0, 0, 1]])
SHAPE = (12, 14, 10)


def save(path: Path, data: np.ndarray, affine: np.ndarray | None, sform: int = 2, qform: int = 1) -> Path:
    """Write a NIfTI file; without an affine, neither sform nor qform is set."""
    image = nibabel.Nifti1Image(data, np.eye(4) if affine is None else affine)
    image.set_sform(image.affine, 0 if affine is None else sform)
    image.set_qform(image.affine, 0 if affine is None else qform)
    nibabel.save(image, path)
    return path


def turned(data: np.ndarray, affine: np.ndarray, order: tuple[int, ...], flips: tuple[bool, ...]) -> tuple[Any, Any]:
    """The same voxels at the same places, stored with other axes."""
    moved, columns = data.transpose(order), affine[:, [*order, 3]].copy()
    for axis, flip in enumerate(flips):
        if flip:
            columns[:3, 3] += columns[:3, axis] * (moved.shape[axis] - 1)
            columns[:3, axis] *= -1
            moved = np.flip(moved, axis)
    return np.ascontiguousarray(moved), columns


def rotation(angles: tuple[float, float, float]) -> np.ndarray:
    a, b, c = angles
    x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    return x @ y @ z


@st.composite
def affines(draw: st.DrawFn) -> np.ndarray:
    """A rotation (often by right angles), spacings, an order and directions of the axes, and an origin."""
    right = st.sampled_from([0.0, np.pi / 2, np.pi, -np.pi / 2])
    angle = right if draw(st.booleans()) else st.floats(-3, 3)
    columns = rotation(draw(st.tuples(angle, angle, angle))) * draw(
        st.tuples(*[st.sampled_from([0.5, 0.7421875, 1.0, 2.5])] * 3)
    )
    columns = columns[:, draw(st.permutations(range(3)))] * draw(st.tuples(*[st.sampled_from([-1, 1])] * 3))
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = columns, draw(st.tuples(*[st.integers(-90, 90)] * 3))
    return matrix


def resampled(image: Path, mask: Path) -> set[float]:
    """The values of the image where SimpleITK, by nearest neighbor, lays the mask."""
    sitk = pytest.importorskip("SimpleITK")
    fixed, moving = sitk.ReadImage(str(image)), sitk.ReadImage(str(mask))
    laid = sitk.Resample(moving, fixed, sitk.Transform(), sitk.sitkNearestNeighbor, 0.0, moving.GetPixelID())
    return set(sitk.GetArrayFromImage(fixed)[sitk.GetArrayFromImage(laid) == 1].tolist())


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_loaded_pair_is_simpleitks_or_it_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    """Every voxel of the image has its own number, so equal sets mean that every voxel of the mask is in its place."""
    shape = data.draw(st.tuples(*[st.integers(1, 6)] * 3).filter(lambda s: sum(n > 1 for n in s) >= 2))
    affine = data.draw(affines())
    numbers = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    labels = (np.random.default_rng(data.draw(st.integers(0, 99))).random(shape) < 0.3).astype(np.uint8)
    labels.flat[0] = 1
    kind = data.draw(st.sampled_from(["same", "turned", "turned", "shifted", "other affine", "other axes"]))
    order, flips = tuple(data.draw(st.permutations(range(3)))), data.draw(st.tuples(*[st.booleans()] * 3))
    drawn, where = labels, affine.copy()
    if kind == "turned":
        drawn, where = turned(labels, affine, order, flips)
    elif kind == "shifted":
        where[:3, 3] += data.draw(st.tuples(*[st.sampled_from([-1.0, -0.2, 0.0, 0.001, 0.3, 2.5])] * 3))
    elif kind == "other affine":
        where = data.draw(affines())
    elif kind == "other axes":  # the array is turned and its affine is not
        drawn = turned(labels, affine, order, flips)[0]
    image, mask = save(tmp_path / "i.nii", numbers, affine), save(tmp_path / "m.nii", drawn, where)
    suffix = data.draw(st.sampled_from([".nii", ".nrrd", ".mha", ".nii.gz"]))
    if suffix != ".nii":
        sitk = pytest.importorskip("SimpleITK")
        mask = tmp_path / f"m{suffix}"
        sitk.WriteImage(sitk.ReadImage(str(tmp_path / "m.nii")), str(mask))
    try:
        picture = read_image([image], mask)
    except GridMismatch:
        assert kind not in ("same", "turned")
        return
    assert picture.mask is not None
    assert set(picture.pixels[0][picture.mask == 1].tolist()) == resampled(image, mask)


def pair(tmp_path: Path, mask_affine: np.ndarray | None, image_affine: np.ndarray | None = LPS) -> tuple[Path, Path]:
    lesion = np.zeros(SHAPE, np.uint8)
    lesion[2:5, 3:7, 2:4] = 1
    image = save(tmp_path / "image.nii.gz", lesion.astype(np.int16) * 100, image_affine)
    return image, save(tmp_path / "mask.nii.gz", lesion, mask_affine)


def overlap(image: Path, mask: Path, options: ImageOptions = ImageOptions()) -> float:
    picture = read_image([image], mask, options)
    assert picture.mask is not None
    return float(((picture.pixels[0] > 0) == (picture.mask == 1)).float().mean())


def test_both_affines_and_the_remedy_are_named(tmp_path: Path) -> None:
    image, mask = pair(tmp_path, np.eye(4))
    with pytest.raises(GridMismatch) as refusal:
        read_image([image], mask)
    for part in ("another grid", "[-1 0 0 30; 0 -1 0 40; 0 0 2 -20]", "[1 0 0 0; 0 1 0 0; 0 0 1 0]", "resample"):
        assert part in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_mask_without_a_position_takes_the_grid_of_its_image_with_a_note(tmp_path: Path) -> None:
    image, mask = pair(tmp_path, None)
    assert overlap(image, mask) == 1
    assert "the mask states no position and takes the grid of its image" in read_case([image], mask).notes


def test_a_mask_without_a_position_and_of_another_size_is_refused(tmp_path: Path) -> None:
    image, _ = pair(tmp_path, None)
    swapped = save(tmp_path / "swapped.nii", np.zeros(SHAPE[::-1], np.uint8), None)
    with pytest.raises(GridMismatch, match=r"12 x 14 x 10 voxels \(z, y, x\).*10 x 14 x 12; its axes seem to be"):
        read_image([image], swapped)
    with pytest.raises(GridMismatch, match="12 x 14 x 11 voxels"):
        read_image([image], save(tmp_path / "m.nii", np.zeros((11, 14, 12), np.uint8), None))
    coarse = nibabel.Nifti1Image(np.zeros(SHAPE, np.uint8), None)
    coarse.header.set_zooms((3, 3, 3))
    nibabel.save(coarse, tmp_path / "coarse.nii")
    with pytest.raises(GridMismatch, match="3 x 3 x 3 mm"):
        read_image([image], tmp_path / "coarse.nii")


def test_a_positioned_mask_of_an_image_without_a_position_is_refused(tmp_path: Path) -> None:
    image, mask = pair(tmp_path, np.eye(4), None)
    with pytest.raises(GridMismatch, match=r"its image states none.*copy the geometry"):
        read_image([image], mask)
    image, mask = pair(tmp_path, None, None)
    assert overlap(image, mask) == 1


def test_the_tolerance_is_strict_and_can_be_declared(tmp_path: Path) -> None:
    moved = LPS.copy()
    moved[0, 3] += 0.3
    image, mask = pair(tmp_path, moved)
    with pytest.raises(GridMismatch, match=r"up to 0.3 mm apart.*geometry_tolerance_mm = 0.36"):
        read_image([image], mask)
    options = ImageOptions(geometry_tolerance_mm=0.36)
    assert overlap(image, mask, options) == 1
    assert any("within the declared tolerance" in note for note in read_case([image], mask, options).notes)
    rounded = LPS + np.random.default_rng(0).normal(0, 1e-6, (4, 4)) * [[1], [1], [1], [0]]
    assert overlap(*pair(tmp_path, rounded)) == 1
    with pytest.raises(GridMismatch):
        read_image([image], mask, ImageOptions(geometry_tolerance_mm=0.0))


def test_small_voxels_have_a_small_tolerance() -> None:
    """In a micro-CT of 10 micrometers, 10 micrometers are a voxel, not rounding."""
    affine = torch.diag(torch.tensor([0.01, 0.01, 0.01, 1.0], dtype=torch.float64))
    moved = affine.clone()
    moved[0, 3] = 0.01
    a, b = Volume(torch.zeros(5, 5, 5), affine), Volume(torch.zeros(5, 5, 5), moved)
    assert tolerance_of(a) < 0.0002
    assert largest_distance(a, b) == pytest.approx(0.01)
    assert not same_grid(a, b)
    with pytest.raises(GridMismatch):
        matched(a, b, "m.nii")


def test_channels_are_compared_as_masks_are(tmp_path: Path) -> None:
    numbers = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)
    first = save(tmp_path / "a.nii", numbers, LPS)
    second = save(tmp_path / "b.nii", *turned(numbers, LPS, (2, 0, 1), (True, False, True)))
    picture = read_image([first, second])
    assert torch.equal(picture.pixels[0], picture.pixels[1])
    with pytest.raises(GridMismatch, match="the channel is on another grid"):
        read_image([first, save(tmp_path / "c.nii", numbers, np.eye(4))])
    free = read_image([first, save(tmp_path / "d.nii", numbers, None)])
    assert torch.equal(free.pixels[0], free.pixels[1])


def test_one_slice_comes_out_alike_from_either_direction(tmp_path: Path) -> None:
    """LAS, RAS and another axis order of one slice are one picture."""
    numbers = np.arange(42, dtype=np.int16).reshape(6, 7, 1)
    ras = np.diag([1.0, 2.0, 3.0, 1.0])
    first = read_image([save(tmp_path / "ras.nii", numbers, ras)])
    assert tuple(first.pixels.shape) == (1, 7, 6)
    assert first.spacing_mm == (2.0, 1.0)
    assert torch.equal(first.pixels[0], torch.from_numpy(numbers[..., 0].T.astype(np.float32)))
    for order, flips in (((0, 1, 2), (True, False, False)), ((2, 0, 1), (False, True, True)), ((1, 2, 0), (True,) * 3)):
        again = read_image([save(tmp_path / "other.nii", *turned(numbers, ras, order, flips))])
        assert torch.equal(again.pixels, first.pixels)
        assert again.spacing_mm == first.spacing_mm


def test_a_dicom_series_and_a_nifti_mask_meet(tmp_path: Path) -> None:
    numbers = np.arange(6 * 7 * 8, dtype=np.int16).reshape(6, 7, 8)
    series(tmp_path / "ct", numbers)
    ours = read_case([tmp_path / "ct"]).image
    labels = (numbers > 200).astype(np.uint8).transpose(2, 1, 0)
    mask = save(tmp_path / "m.nii", *turned(labels, ours.affine.numpy(), (1, 0, 2), (False, True, True)))
    picture = read_image([tmp_path / "ct"], mask)
    assert picture.mask is not None
    assert torch.equal(picture.mask == 1, picture.pixels[0] > 200)
    with pytest.raises(Unreadable, match="another grid"):
        read_image([tmp_path / "ct"], save(tmp_path / "w.nii", labels, np.eye(4)))
