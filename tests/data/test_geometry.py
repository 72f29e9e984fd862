"""Geometry: every stored voxel knows its place in the file, through any sequence of steps, and predictions go back."""

import json
import math
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from polyclinic.data.config import DataSpec
from polyclinic.data.examples import DataError, concat
from polyclinic.data.federation import federate
from polyclinic.data.files import read_image
from polyclinic.data.geometry import Geometry
from polyclinic.data.preprocessing.pipeline_config import apply
from polyclinic.data.preprocessing.sample import Picture
from polyclinic.data.preprocessing.transforms import CropPad, Foreground, Relabel, Resample, Resize
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.segmentation import IGNORED, Segmentation
from tests.support.data_sets import data_spec, loaded


def volume(size: tuple[int, ...], scale: tuple[float, ...] = (), mm: tuple[float, ...] | None = None) -> Geometry:
    """A geometry of three axes (z, y, x) as the file has them."""
    spacing = mm or (1.0, 1.0, 1.0)
    affine = torch.diag(torch.tensor([*reversed(spacing), 1.0], dtype=torch.float64))
    return Geometry.of_file(affine, size, (0, 1, 2), (False, False, False), spacing)


orders = st.permutations([0, 1, 2])
steps = st.lists(
    st.one_of(
        st.tuples(*[st.floats(0.8, 1.5)] * 3).map(Resample),
        st.tuples(*[st.integers(9, 24)] * 3).map(CropPad),
        st.integers(12, 24).map(Resize),
    ),
    max_size=4,
)


@settings(max_examples=25, deadline=None)
@given(steps=steps, order=orders, signs=st.tuples(*[st.sampled_from([-1, 1])] * 3), seed=st.integers(0, 99))
def test_every_stored_voxel_keeps_its_place_in_the_patient(
    tmp_path_factory: pytest.TempPathFactory, steps: list[Any], order: list[int], signs: tuple[int, ...], seed: int
) -> None:
    """An image whose values are its own positions in mm says where each voxel is, independently of the geometry.

    Reductions by more than half are left out: they average over areas of unequal size.
    """
    rng = np.random.default_rng(seed)
    linear = np.zeros((3, 3))
    for axis, (world, sign) in enumerate(zip(order, signs, strict=True)):
        linear[world, axis] = sign * rng.uniform(0.8, 2)
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = linear, rng.uniform(-50, 50, 3)
    size = tuple(rng.integers(12, 20, 3))
    index = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), -1)
    place = index @ linear.T + affine[:3, 3]
    folder = tmp_path_factory.mktemp("places")
    for axis in range(3):
        nib.save(nib.Nifti1Image(place[..., axis].astype(np.float32), affine), folder / f"{axis}.nii")
    picture = apply(steps, read_image([folder / f"{axis}.nii" for axis in range(3)]))
    geometry = picture.geometry
    assert geometry is not None
    assert geometry.stored == picture.size
    assert geometry == Geometry.of_table(json.loads(json.dumps(geometry.table)))
    assert picture.spacing_mm == pytest.approx(geometry.spacing_mm)
    stored = torch.stack(torch.meshgrid(*(torch.arange(n) for n in picture.size), indexing="ij"), -1).double()
    at = stored * torch.tensor(geometry.scale) + torch.tensor(geometry.offset)  # on the original grid, (z, y, x)
    last = torch.tensor(geometry.original) - 1
    at_file = torch.where(torch.tensor(geometry.flips), last - at, at)
    xyz = torch.zeros_like(at_file)
    for axis, source in enumerate(geometry.axes):
        xyz[..., 2 - source] = at_file[..., axis]
    mm = xyz @ geometry.matrix[:3, :3].T + geometry.matrix[:3, 3]
    reach = 2 * torch.tensor(geometry.scale).clamp_min(1) * math.prod(1.5 for _ in steps)
    inside = ((at >= reach) & (at <= last - reach)).all(-1)  # farther from the border than any interpolation reaches
    for axis in range(3):
        padded = picture.pixels.abs().sum(0) == 0
        keep = inside & ~padded
        assert torch.allclose(picture.pixels[axis][keep].double(), mm[..., axis][keep], atol=2e-3)


@pytest.mark.parametrize("new", [(7, 9, 13), (20, 24, 18), (7, 22, 12)])
def test_resampled_scores_return_as_interpolate_does(new: tuple[int, int, int]) -> None:
    old = (12, 15, 11)
    geometry = volume(old).resized(new)
    scores = torch.randn(4, *new, generator=torch.Generator().manual_seed(0))
    expected = functional.interpolate(scores[None], old, mode="trilinear")[0]
    back = geometry.to_original(scores, torch.zeros(4))
    assert torch.allclose(back, expected, atol=1e-5)
    assert torch.equal(geometry.labels(scores).long(), back.argmax(0))


def test_slabs_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = volume((12, 15, 11), mm=(1.0, 2.0, 1.5)).resized((9, 20, 8)).cropped((-1, 3, 2), (12, 11, 5))
    scores = torch.randn(3, 12, 11, 5, generator=torch.Generator().manual_seed(0))
    whole = geometry.labels(scores), geometry.to_original(scores, torch.tensor([9.0, 0, 0]))
    monkeypatch.setattr("polyclinic.data.geometry.SLAB", 1)
    assert torch.equal(geometry.labels(scores), whole[0])
    assert torch.equal(geometry.to_original(scores, torch.tensor([9.0, 0, 0])), whole[1])


def test_outside_of_the_crop_is_background() -> None:
    mask = torch.zeros(10, 12, dtype=torch.long)
    mask[3:6, 4:8] = 1
    geometry = Geometry.of_file(torch.eye(4, dtype=torch.float64), (1, 10, 12), (1, 2), (False, False), None)
    cut = Foreground()(Picture(mask[None].float(), mask, None, geometry))
    assert cut.size == (3, 4)
    assert cut.geometry is not None
    scores = torch.stack([torch.zeros(3, 4), torch.ones(3, 4)])  # class 1 everywhere in the box
    assert torch.equal(cut.geometry.labels(scores).long(), mask)
    shares = cut.geometry.to_original(scores, torch.tensor([1.0, 0.0]))
    assert torch.equal(shares.argmax(0), mask)
    with pytest.raises(DataError, match="are not on the stored grid"):
        geometry.labels(scores)


def test_a_coarse_axis_is_taken_by_nearest_neighbor() -> None:
    """nnU-Net: one axis more than three times coarser than the others is not interpolated."""
    scores = torch.zeros(2, 4, 8, 8)
    scores[1, 1] = 1.0
    scores[0, 0] = scores[0, 2] = scores[0, 3] = 1.0
    thick = volume((8, 8, 8), mm=(4.0, 1.0, 1.0)).resized((4, 8, 8))
    assert thick.labels(scores)[:, 0, 0].tolist() == [0, 0, 1, 1, 0, 0, 0, 0]
    back = thick.to_original(scores, torch.zeros(2))
    assert set(back.unique().tolist()) == {0.0, 1.0}
    even = volume((8, 8, 8), mm=(1.0, 1.0, 1.0)).resized((4, 8, 8))
    assert len(even.to_original(scores, torch.zeros(2)).unique()) > 2


@pytest.mark.parametrize("axes", ["RAS", "LPI", "SAR", "PIR"])
def test_a_picture_returns_to_the_axes_of_its_file(tmp_path: Path, axes: str) -> None:
    array = np.random.default_rng(0).integers(0, 9, (5, 6, 7)).astype(np.int16)
    turned = nib.orientations.axcodes2ornt(tuple(axes))
    image = nib.Nifti1Image(array, np.diag([2.0, 3.0, 4.0, 1.0]))
    turned = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), turned)
    image = image.as_reoriented(turned)
    nib.save(image, tmp_path / "image.nii")
    picture = read_image([tmp_path / "image.nii"])
    assert picture.geometry is not None
    back = picture.geometry.in_file(picture.pixels[0])
    assert np.array_equal(back.permute(2, 1, 0).numpy(), np.asarray(image.dataobj))
    assert np.allclose(picture.geometry.matrix.numpy(), image.affine)
    with pytest.raises(DataError, match="is not the original grid"):
        picture.geometry.in_file(picture.pixels[0][1:])


def test_a_slice_returns_as_a_slice(tmp_path: Path) -> None:
    array = np.arange(30, dtype=np.float32).reshape(5, 1, 6)
    nib.save(nib.Nifti1Image(array, np.diag([-1.0, 5.0, 2.0, 1.0])), tmp_path / "slice.nii.gz")
    picture = read_image([tmp_path / "slice.nii.gz"])
    assert picture.geometry is not None
    assert len(picture.size) == 2
    assert np.array_equal(picture.geometry.in_file(picture.pixels[0]).permute(2, 1, 0).numpy(), array)


@pytest.mark.parametrize("table", [{}, {"affine": [1.0]}, {**volume((2, 3, 4)).table, "axes": [0]}])
def test_what_is_not_a_geometry_is_refused(table: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="not the geometry"):
        Geometry.of_table(table)


def test_a_mask_is_resampled_by_the_share_of_its_labels() -> None:
    """Against nnU-Net's rule: a label wins where the linear share is at least one half; no pixel is left empty."""
    rng = torch.Generator().manual_seed(0)
    blobs = functional.avg_pool2d(torch.rand(1, 3, 40, 40, generator=rng), 9, 1, 4)[0]
    mask = blobs.argmax(0)
    small = Resize((27, 31))(Picture(mask[None].float(), mask)).mask
    assert small is not None
    shares = functional.interpolate(functional.one_hot(mask)[None].movedim(-1, 1).float(), (27, 31), mode="bilinear")[0]
    sure = shares.amax(0) > 0.5
    assert torch.equal(small[sure], shares.argmax(0)[sure])
    assert bool((shares.gather(0, small[None])[0] >= shares.amax(0) - 1e-6).all())
    half = torch.tensor([[0, 1], [0, 1]])
    assert Resize((2, 1))(Picture(half[None].float(), half)).mask.tolist() == [[1], [1]]  # type: ignore[union-attr]
    partly = torch.tensor([[IGNORED] * 4, [2] * 4])
    assert Resize(2)(Picture(partly[None].float(), partly)).mask.tolist() == [[IGNORED] * 2, [2] * 2]  # type: ignore[union-attr]


def test_labels_of_the_original_mask_are_renamed_with_the_mask() -> None:
    mask = torch.tensor([[0, 5], [7, 7]])
    after = Relabel(values=(0, 5, 7))(Picture(mask[None].float(), mask, truth=mask.repeat_interleave(2, 0)))
    assert after.mask.tolist() == [[0, 1], [2, 2]]  # type: ignore[union-attr]
    assert after.truth.tolist() == [[0, 1], [0, 1], [2, 2], [2, 2]]  # type: ignore[union-attr]


class Copies(torch.nn.Module):
    """A model whose best class is the rounded value of its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return scores [b, 3, *spatial]."""
        return torch.cat([-(x - k).abs() for k in range(3)], 1)


def pairs(folder: Path, masks: list[np.ndarray[Any, Any]], mm: float | tuple[float, ...] = 1.0) -> Path:
    """A folder of images that are their own masks."""
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i, mask in enumerate(masks):
            affine = np.diag([*np.broadcast_to(mm, 3), 1.0])
            nib.save(
                nib.Nifti1Image(mask.astype(np.float32 if name == "images" else np.uint8), affine),
                folder / name / f"case-{i:03}.nii.gz",
            )
    return folder


def spec(path: Path, *steps: dict[str, Any]) -> DataSpec:
    """One site, half of it test data."""
    return data_spec(
        kind="pairs",
        path=str(path),
        classes=("background", "one", "two"),
        sites={"partition": "iid", "count": 1},
        split=(0.4, 0.2, 0.4),
        steps=[dict(step) for step in steps],
        min_patients=1,
        duplicates="report",
    )


def boxes(count: int, size: tuple[int, int, int] = (20, 24, 16)) -> list[np.ndarray[Any, Any]]:
    """Masks of two boxes each."""
    rng, masks = np.random.default_rng(0), []
    for _ in range(count):
        mask = np.zeros(size)
        for label in (1, 2):
            low = [int(rng.integers(1, n // 3)) for n in size]
            high = [int(rng.integers(a + 3, n // 2)) for a, n in zip(low, size, strict=True)]
            box = [slice(a, b) for a, b in zip(low, high, strict=True)]
            box[0] = slice(box[0].start + (label - 1) * size[0] // 2, box[0].stop + (label - 1) * size[0] // 2)
            mask[tuple(box)] = label
        masks.append(mask)
    return masks


def test_scores_are_of_the_files_own_grid(tmp_path: Path) -> None:
    path = pairs(tmp_path / "pairs", boxes(10), (1.0, 2.0, 1.5))
    data = federate(spec(path, {"step": "resample", "mm": 2.0}, {"step": "crop_pad", "size": 20}))
    test = loaded(data.sites["site-1"]["test"])
    assert test.measured
    assert test.truths is not None
    assert test.geometries is not None
    task = Segmentation(Network("unet", (1, 20, 20, 20), 3))
    model = Copies()
    index = torch.arange(len(test))
    native = task.outputs_of(model, test, index, full_metrics=True)
    for i in index.tolist():
        truth = torch.from_numpy(np.asarray(nib.load(path / "labels" / f"{test.ids[i]}.nii.gz").dataobj)).permute(
            2, 1, 0
        )
        assert torch.equal(test.case(i).truth, truth.long())  # the file is in RAS, so (x, y, z) becomes (z, y, x)
        assert test.case(i).spacing_mm == (1.5, 2.0, 1.0)
        labels = test.geometries[i].labels(model(test[torch.tensor([i])][0])[0])
        for k in (1, 2):
            p, t = labels == k, truth == k
            assert native["dice"][i, k - 1] == pytest.approx(float(2 * (p & t).sum() / (p.sum() + t.sum())))
            assert native["volume_ml"][i, k - 1] == pytest.approx(float((p.sum() - t.sum()).abs()) * 0.003)
    grid = Segmentation(task.network, space="grid")
    on_grid = grid.outputs_of(model, test, index, full_metrics=True)
    by_hand = grid.outputs(model, test[index], full_metrics=True)
    assert torch.equal(on_grid["dice"], by_hand["dice"])
    assert not torch.equal(on_grid["dice"], native["dice"])
    assert "hd95" in on_grid
    assert "hd95_px" in by_hand
    halves = [task.outputs_of(model, test, part, full_metrics=True) for part in index.split(1)]
    assert all(torch.equal(torch.cat([h[name] for h in halves]), native[name]) for name in native)


def test_without_steps_the_truth_is_the_mask(tmp_path: Path) -> None:
    path = pairs(tmp_path / "pairs", boxes(10))
    test = loaded(federate(spec(path)).sites["site-1"]["test"])
    assert test.truths is None
    assert test.measured
    assert torch.equal(test.case(0).truth, test[torch.tensor([0])][1][0])
    both = concat([test, test.subset(torch.tensor([1]))])
    assert both.geometries == (*test.geometries, test.geometries[1])  # type: ignore[misc, index]
    assert test.unlabeled().measured is None


def perfect(path: Path, *steps: dict[str, Any]) -> list[float]:
    """The mean Dice of each class of a model that predicts the preprocessed mask."""
    roles = federate(spec(path, *steps)).sites["site-1"]
    found = []
    for data in roles.values():
        for i in range(len(data)):
            case = loaded(data).case(i)
            scores = functional.one_hot(case.truth_on_grid, 3).movedim(-1, 0).float()
            labels = case.labels(scores)
            found.append(
                [
                    float(
                        2 * ((labels == k) & (case.truth == k)).sum() / ((labels == k).sum() + (case.truth == k).sum())
                    )
                    for k in (1, 2)
                ]
            )
    return torch.tensor(found).mean(0).tolist()  # type: ignore[no-any-return]


def test_a_perfect_model_on_a_coarse_grid_does_not_score_one(tmp_path: Path) -> None:
    path = pairs(tmp_path / "pairs", boxes(10))
    assert perfect(path) == [1.0, 1.0]
    coarse = perfect(path, {"step": "resample", "mm": 2.0})
    assert all(0.5 < dice < 0.97 for dice in coarse)


def test_a_perfect_model_at_2_mm_scores_090_on_hippocampus(real_data: Path, tmp_path: Path) -> None:
    """Measured independently with ``scipy.ndimage.zoom`` and nnU-Net's rule: 0.906 (anterior) and 0.889 (posterior)."""
    import zipfile

    masks = []
    with zipfile.ZipFile(real_data / "msd_hippocampus" / "msd_task04_hippocampus_260.zip") as archive:
        names = sorted(n for n in archive.namelist() if "label" in n.lower() and n.endswith(".nii.gz"))[:60]
        for name in names:
            (tmp_path / "one.nii.gz").write_bytes(archive.read(name))
            masks.append(np.asarray(nib.load(tmp_path / "one.nii.gz").dataobj))
    path = pairs(tmp_path / "pairs", masks)
    anterior, posterior = perfect(path, {"step": "resample", "mm": 2.0}, {"step": "crop_pad", "size": 40})
    assert anterior == pytest.approx(0.906, abs=0.002)
    assert posterior == pytest.approx(0.889, abs=0.002)


@pytest.mark.parametrize("size", [(13, 9), (8, 16), (7, 11)])
def test_cropping_and_padding_by_odd_numbers_are_undone(size: tuple[int, int]) -> None:
    pixels = torch.arange(1.0, 121.0).reshape(1, 10, 12)
    geometry = Geometry.of_file(torch.eye(4, dtype=torch.float64), (1, 10, 12), (1, 2), (False, False), None)
    cut = CropPad(size)(Picture(pixels, None, None, geometry))
    assert cut.geometry is not None
    back = cut.geometry.to_original(cut.pixels, torch.zeros(1))
    assert torch.equal(back[back > 0], pixels[back > 0])
    assert int((back > 0).sum()) == min(size[0], 10) * min(size[1], 12)
