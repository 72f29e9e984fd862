"""NIfTI volumes against nibabel, resampling and orientation as laws."""

import gzip
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from polyclinic.data.formats.grids import same_grid
from polyclinic.data.formats.nifti import read_nifti
from polyclinic.data.formats.safe_reading import Limits, Unreadable
from polyclinic.data.formats.volume import Volume, canonical, resample
from tests.support.image_files import nifti_bytes, oblique


def world(volume: Volume, index_zyx: tuple[float, ...]) -> np.ndarray:
    """Where a voxel lies, in RAS mm."""
    x, y, z = reversed(index_zyx)
    return (volume.affine.numpy() @ np.array([x, y, z, 1.0]))[:3]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_equals_nibabel_for_every_type_and_compression(tmp_path: Path, dtype: type[np.generic], suffix: str) -> None:
    rng = np.random.default_rng(0)
    data = (rng.random((5, 6, 7)) * 100).astype(dtype)
    affine = np.eye(4)
    affine[:3, :3] = oblique() @ np.diag([1.5, 2.0, -2.5])
    affine[:3, 3] = -7, 8, 9
    nibabel.save(nibabel.Nifti1Image(data, affine), tmp_path / f"a{suffix}")
    volume, theirs = read_nifti(tmp_path / f"a{suffix}"), nibabel.load(tmp_path / f"a{suffix}")
    assert volume.array.shape == (7, 6, 5)
    assert volume.array.dtype == torch.float32
    np.testing.assert_allclose(volume.array.numpy(), theirs.get_fdata().T, rtol=1e-6)
    np.testing.assert_allclose(volume.affine.numpy(), theirs.affine, atol=1e-12)
    np.testing.assert_allclose(volume.spacing_mm, (2.5, 2.0, 1.5), rtol=1e-6)
    assert volume.orientation == "".join(nibabel.aff2axcodes(theirs.affine))


def test_slope_and_intercept_scale_the_stored_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.nii").write_bytes(nifti_bytes(slope=0.5, inter=-3))
    stored = np.arange(120).reshape(6, 5, 4)
    np.testing.assert_allclose(read_nifti(tmp_path / "a.nii").array.numpy(), stored * 0.5 - 3)
    (tmp_path / "b.nii").write_bytes(nifti_bytes(slope=0, inter=7))  # slope 0: nothing is scaled
    np.testing.assert_allclose(read_nifti(tmp_path / "b.nii").array.numpy(), stored)


def test_two_dimensions_become_one_slice_and_a_fourth_comes_first(tmp_path: Path) -> None:
    flat = np.arange(6, dtype=np.int16).reshape(2, 3)
    nibabel.save(nibabel.Nifti1Image(flat, np.diag([2.0, 3.0, 4.0, 1])), tmp_path / "flat.nii")
    volume = read_nifti(tmp_path / "flat.nii")
    assert volume.array.shape == (1, 3, 2)
    assert volume.spacing_mm[1:] == (3.0, 2.0)
    moving = np.arange(48, dtype=np.int16).reshape(2, 3, 4, 2)
    nibabel.save(nibabel.Nifti1Image(moving, np.eye(4)), tmp_path / "moving.nii")
    np.testing.assert_array_equal(read_nifti(tmp_path / "moving.nii").array.numpy(), moving.T)


def test_color_is_three_channels_of_bytes(tmp_path: Path) -> None:
    rgb = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
    data = np.random.default_rng(0).integers(0, 255, (2, 3, 4, 3)).astype(np.uint8)
    nibabel.save(nibabel.Nifti1Image(data.copy().view(rgb).reshape(2, 3, 4), np.eye(4)), tmp_path / "rgb.nii")
    volume = read_nifti(tmp_path / "rgb.nii")
    assert volume.units == "RGB"
    np.testing.assert_array_equal(volume.array.numpy(), np.moveaxis(data, -1, 0).transpose(0, 3, 2, 1))


@pytest.mark.parametrize(("units", "factor"), [(1, 1000.0), (2, 1.0), (3, 0.001)])
def test_lengths_come_out_in_millimeters(tmp_path: Path, units: int, factor: float) -> None:
    (tmp_path / "a.nii").write_bytes(nifti_bytes(units=units))
    np.testing.assert_allclose(read_nifti(tmp_path / "a.nii").spacing_mm, np.array([2.5, 2.0, 1.5]) * factor)


@pytest.mark.parametrize("mm", [1e-4, 1e-5, 300.0])
def test_voxels_may_be_as_small_as_those_of_a_microscope(tmp_path: Path, mm: float) -> None:
    (tmp_path / "a.nii").write_bytes(nifti_bytes(affine=((mm, 0, 0, 0), (0, mm, 0, 0), (0, 0, mm, 0))))
    np.testing.assert_allclose(read_nifti(tmp_path / "a.nii").spacing_mm, [mm] * 3, rtol=1e-6)


def test_masks_are_whole_numbers_or_refused(tmp_path: Path) -> None:
    labels = np.array([0, 1, 2, 5], dtype=np.float32).reshape(1, 2, 2)
    nibabel.save(nibabel.Nifti1Image(labels, np.eye(4)), tmp_path / "m.nii")
    mask = read_nifti(tmp_path / "m.nii", mask=True)
    assert mask.array.dtype == torch.int16
    assert mask.units == "label"
    for bad, why in ((labels + 0.5, "whole numbers"), (labels - 1, "-1"), (labels * 10_000, "50000")):
        nibabel.save(nibabel.Nifti1Image(bad, np.eye(4)), tmp_path / "bad.nii")
        with pytest.raises(Unreadable, match=why):
            read_nifti(tmp_path / "bad.nii", mask=True)


def test_not_finite_voxels_are_refused_unless_a_fill_is_stated(tmp_path: Path) -> None:
    data = np.array([1, np.nan, np.inf, 2], dtype=np.float32).reshape(1, 2, 2)
    nibabel.save(nibabel.Nifti1Image(data, np.eye(4)), tmp_path / "a.nii")
    with pytest.raises(Unreadable, match="2 of 4 voxels are not finite"):
        read_nifti(tmp_path / "a.nii")
    volume = read_nifti(tmp_path / "a.nii", fill=-1.0)
    assert sorted(volume.array.flatten().tolist()) == [-1, -1, 1, 2]
    assert "2 of 4" in volume.notes[-1]


def test_the_limit_is_on_what_is_decoded(tmp_path: Path) -> None:
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(nifti_bytes((100, 100, 100))))
    assert read_nifti(tmp_path / "a.nii.gz").array.numel() == 10**6
    with pytest.raises(Unreadable, match="100 x 100 x 100"):
        read_nifti(tmp_path / "a.nii.gz", limits=Limits(decoded_bytes=10**6))


AFFINES = st.builds(
    lambda a, b, c, steps, flips, order: (oblique((a, b, c)) @ np.diag(np.array(steps) * flips))[:, order],
    *[st.floats(-40, 40)] * 3,
    st.tuples(*[st.floats(0.3, 5)] * 3),
    st.tuples(*[st.sampled_from([-1, 1])] * 3),
    st.permutations(range(3)),
)


@settings(max_examples=40, deadline=None)
@given(AFFINES)
def test_canonical_equals_nibabel_and_moves_no_voxel(columns: np.ndarray) -> None:
    """Where an axis lies nearer to one of the patient's than to the others: nearly equal angles are anybody's
    choice.
    """
    cosines = np.sort(np.abs(columns / np.linalg.norm(columns, axis=0)), axis=0)
    assume((cosines[2] > cosines[1] + 0.1).all())
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = columns, (3, -4, 5)
    data = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
    ours = canonical(Volume(torch.from_numpy(data.T.copy()), torch.from_numpy(matrix)))
    theirs = nibabel.as_closest_canonical(nibabel.Nifti1Image(data, matrix))
    np.testing.assert_array_equal(ours.array.numpy(), theirs.get_fdata().T)
    np.testing.assert_allclose(ours.affine.numpy(), theirs.affine, atol=1e-9)
    assert ours.orientation == "RAS"
    again = canonical(ours)
    assert torch.equal(again.array, ours.array)
    assert torch.equal(again.affine, ours.affine)


@settings(max_examples=40, deadline=None)
@given(AFFINES, st.tuples(*[st.floats(0.4, 4)] * 3))
def test_resampling_keeps_a_linear_world_where_it_was(columns: np.ndarray, spacing: tuple[float, float, float]) -> None:
    """An image that is a linear function of millimeters is the same function on every other grid (inside)."""
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = columns, (3, -4, 5)
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in (9, 8, 7)], indexing="ij"), -1)  # z, y, x
    mm = grid[..., ::-1] @ columns.T + matrix[:3, 3]
    weights = np.array([0.3, -0.2, 0.5])
    volume = Volume(torch.from_numpy(mm @ weights), torch.from_numpy(matrix))
    new = resample(volume, spacing)
    np.testing.assert_allclose(new.spacing_mm, spacing, rtol=1e-9)
    for index in list(np.ndindex(*new.size))[::7]:
        inside = np.linalg.solve(columns, world(new, index) - matrix[:3, 3])[::-1]
        if (inside >= 0).all() and (inside <= np.array(volume.size) - 1).all():
            assert float(new.array[index]) == pytest.approx(float(world(new, index) @ weights), abs=1e-6)
    extent, old = np.array(new.size) * spacing, np.array(volume.size) * volume.spacing_mm
    assert (np.abs(extent - old) <= np.maximum(np.array(spacing) / 2, np.array(spacing) - old) + 1e-9).all()


def test_resampling_to_the_same_spacing_changes_nothing_and_labels_stay_labels() -> None:
    labels = torch.randint(0, 4, (5, 6, 7), dtype=torch.int16, generator=torch.Generator().manual_seed(0))
    mask = Volume(labels, torch.diag(torch.tensor([1.0, 2.0, 3.0, 1.0], dtype=torch.float64)), units="label")
    assert torch.equal(resample(mask, (3.0, 2.0, 1.0)).array, labels)
    finer = resample(mask, (1.5, 1.0, 0.5))
    assert finer.array.dtype == torch.int16
    assert torch.equal(finer.array, labels.repeat_interleave(2, 0).repeat_interleave(2, 1).repeat_interleave(2, 2))


def test_resampling_refuses_what_is_not_a_length_or_too_large() -> None:
    volume = Volume(torch.zeros(4, 4, 4), torch.eye(4, dtype=torch.float64))
    for spacing in ((0.0, 1.0, 1.0), (float("nan"), 1.0, 1.0), (-1.0, 1.0, 1.0)):
        with pytest.raises(ValueError, match="three positive lengths"):
            resample(volume, spacing)
    with pytest.raises(ValueError, match="more than"):
        resample(volume, (1e-4, 1e-4, 1e-4))
    with pytest.raises(ValueError, match="linear"):
        resample(volume, (1, 1, 1), mode="cubic")


def test_a_mask_lies_on_its_image_or_it_does_not() -> None:
    a = Volume(torch.zeros(4, 5, 6), torch.eye(4, dtype=torch.float64))
    moved = torch.eye(4, dtype=torch.float64)
    moved[0, 3] = 0.2
    assert same_grid(a, a)
    assert not same_grid(a, Volume(torch.zeros(4, 5, 6), moved))
    assert same_grid(a, Volume(torch.zeros(4, 5, 6), moved), tolerance_mm=0.3)
    assert not same_grid(a, Volume(torch.zeros(4, 5, 7), torch.eye(4, dtype=torch.float64)))


def test_real_hippocampi_read_as_nibabel_reads_them(real_data: Path) -> None:
    for path in sorted((real_data / "msd_hippocampus" / "examples").glob("*.nii.gz")):
        volume, theirs = read_nifti(path, mask="label" in path.name), nibabel.load(path)
        np.testing.assert_array_equal(volume.array.numpy(), theirs.get_fdata().T)
        np.testing.assert_allclose(volume.affine.numpy(), theirs.affine)
