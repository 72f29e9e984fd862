"""nnU-Net's preprocessing: resampling as scikit-image does it, scaling as NumPy, and the way back to the file's grid."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from polyclinic.data.examples import DataError
from polyclinic.data.geometry import Geometry
from polyclinic.data.preprocessing.nnunet_steps import CropNonzero, Normalize, ResampleNnunet, Transpose
from polyclinic.data.preprocessing.pipeline_config import STEPS
from polyclinic.data.preprocessing.sample import Picture


def picture(shape: tuple[int, ...] = (9, 12, 14), mm: tuple[float, ...] = (1.0, 1.0, 1.0), seed: int = 0) -> Picture:
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(2, *shape)).astype(np.float32)
    mask = np.zeros(shape, np.int64)
    mask[2:6, 3:9, 2:7] = 1
    mask[4:7, 5:9, 3:11] = 2
    affine = torch.diag(torch.tensor([*reversed(mm), 1.0], dtype=torch.float64))
    geometry = Geometry.of_file(affine, shape, (0, 1, 2), (False,) * 3, mm)
    return Picture(torch.from_numpy(image), torch.from_numpy(mask), mm, geometry)


@pytest.mark.parametrize(("old", "new"), [((1.0, 1.0, 1.0), (1.3, 0.8, 1.1)), ((2.0, 0.9, 0.9), (1.5, 1.2, 0.7))])
def test_isotropic_images_are_resampled_as_scikit_image_does(old: Any, new: Any) -> None:
    """With order 3 for images and order 1 for each label, at the edges the nearest value, without antialiasing."""
    transform = pytest.importorskip("skimage.transform")
    before = picture(mm=old)
    after = ResampleNnunet(new)(before)
    size = tuple(round(a / b * n) for n, a, b in zip(before.size, old, new, strict=True))
    assert after.size == size
    for one, other in zip(before.pixels.numpy(), after.pixels.numpy(), strict=True):
        expected = transform.resize(one.astype(float), size, 3, mode="edge", clip=True, anti_aliasing=False)
        np.testing.assert_allclose(other, expected, atol=1e-5)
    assert before.mask is not None
    assert after.mask is not None
    shares = [
        transform.resize((before.mask == label).numpy().astype(float), size, 1, mode="edge", anti_aliasing=False)
        for label in range(3)
    ]
    best = np.sort(shares, 0)
    clear = best[-1] > best[-2] + 1e-6
    np.testing.assert_array_equal(after.mask.numpy()[clear], np.argmax(shares, 0)[clear])
    assert after.spacing_mm == pytest.approx([mm * n / m for mm, n, m in zip(old, before.size, size, strict=True)])


def test_a_coarse_axis_is_resampled_slice_by_slice() -> None:
    """In plane by splines, and along the coarse axis by the nearest slice (nnU-Net's order_z = 0)."""
    transform = pytest.importorskip("skimage.transform")
    before = picture((6, 12, 14), (5.0, 1.0, 1.0))
    after = ResampleNnunet((2.5, 0.8, 1.2))(before)
    assert after.size == (12, 15, 12)
    for z in range(12):
        one = before.pixels[0, min(z // 2, 5)].numpy().astype(float)
        expected = transform.resize(one, (15, 12), 3, mode="edge", clip=True, anti_aliasing=False)
        np.testing.assert_allclose(after.pixels[0, z].numpy(), expected, atol=1e-5)
    flat = ResampleNnunet((5.0, 1.0, 1.0))(before)
    assert flat is before


def test_values_of_nnunet_itself() -> None:
    """From nnU-Net 2.8.1 (``resample_data_or_seg_to_shape``) for a ramp, with order 3 and the edge's value beyond it."""
    ramp = torch.arange(6.0).view(1, 1, 1, 6).expand(1, 2, 2, 6).contiguous()
    found = ResampleNnunet((1.0, 1.0, 1.5))(Picture(ramp, None, (1.0, 1.0, 1.0))).pixels
    torch.testing.assert_close(found[0, 0, 0], torch.tensor(RAMP), atol=1e-5, rtol=0)


RAMP = [0.1736253798007965, 1.759854793548584, 3.240145206451416, 4.826374530792236]


def test_scaling_is_numpys() -> None:
    before = picture()
    image = before.pixels.clone() * 100
    image[:, 0], image[:, :, :2] = 0, 0
    image[:, 5, 5, 5] = 0  # a hole, which belongs to the region
    given = Picture(image, before.mask, before.spacing_mm)
    whole = Normalize(("zscore", "zscore"))(given).pixels.numpy()
    expected = image.numpy().astype(float)
    for found, one in zip(whole, expected, strict=True):
        np.testing.assert_allclose(found, (one - one.mean()) / one.std(), atol=1e-5)
    masked = Normalize(("zscore", "none"), nonzero=(True, False))(given).pixels.numpy()
    region = np.zeros(image.shape[1:], bool)
    region[1:, 2:] = True
    inside = expected[0][region]
    np.testing.assert_allclose(masked[0][region], (inside - inside.mean()) / inside.std(), atol=1e-5)
    assert (masked[0][~region] == 0).all()
    np.testing.assert_array_equal(masked[1], image[1].numpy())
    ct = Normalize(("ct", "range"), low=(-50, 0), high=(80, 0), mean=(20, 0), deviation=(30, 1))(given).pixels.numpy()
    np.testing.assert_allclose(ct[0], (expected[0].clip(-50, 80) - 20) / 30, atol=1e-5)
    np.testing.assert_allclose(ct[1], (expected[1] - expected[1].min()) / np.ptp(expected[1]), atol=1e-5)
    constant = Normalize(("zscore", "range"))(Picture(torch.full((2, 4, 4), 7.0)))
    assert (constant.pixels == 0).all()
    empty = Normalize(("zscore",), nonzero=(True,))(Picture(torch.zeros(1, 4, 4)))
    assert (empty.pixels == 0).all()


def test_the_steps_lead_back_to_the_file() -> None:
    """Labels on the prepared grid, brought back by the geometry, overlap the file's mask; without resampling exactly."""
    before = picture((10, 20, 24), (1.0, 1.0, 1.0))
    image = before.pixels.clone()
    image[:, :1], image[:, :, 18:] = 0, 0
    before = Picture(image, before.mask, before.spacing_mm, before.geometry)
    steps: list[Callable[[Picture], Picture]] = [Transpose((2, 0, 1)), CropNonzero(), Normalize(("zscore", "zscore"))]
    after = before
    for step in steps:
        after = step(after)
    assert after.size == (24, 9, 18)
    assert after.geometry is not None
    assert after.mask is not None
    assert before.mask is not None
    assert before.geometry is not None
    scores = torch.nn.functional.one_hot(after.mask, 3).movedim(-1, 0).float()
    back = after.geometry.in_file(after.geometry.labels(scores))
    assert torch.equal(back.long(), before.mask)
    finer = ResampleNnunet((0.8, 0.8, 0.8))(after)
    assert finer.geometry is not None
    assert finer.mask is not None
    scores = torch.nn.functional.one_hot(finer.mask, 3).movedim(-1, 0).float()
    back = finer.geometry.in_file(finer.geometry.labels(scores)).long()
    overlap = 2 * ((back == 2) & (before.mask == 2)).sum() / ((back == 2).sum() + (before.mask == 2).sum())
    assert float(overlap) > 0.95


def test_mistakes_are_named() -> None:
    with pytest.raises(DataError, match=r"axes = \[0, 0, 1\]: name each of \[0, 1, 2\] once"):
        Transpose((0, 0, 1))
    with pytest.raises(DataError, match="the image has 3 axes"):
        Transpose((1, 0))(picture())
    with pytest.raises(DataError, match="'zcore' is none of zscore, ct, range, none"):
        Normalize(("zcore",))
    with pytest.raises(DataError, match='deviation: with the scheme "ct", give 2 numbers'):
        Normalize(("ct", "ct"), low=(0, 0), high=(1, 1), mean=(0, 0), deviation=(1,))
    with pytest.raises(DataError, match="there are 1, and the image has 2 channels"):
        Normalize(("zscore",))(picture())
    with pytest.raises(DataError, match="does not state its voxel size"):
        ResampleNnunet((1.0, 1.0, 1.0))(Picture(torch.zeros(1, 4, 4, 4)))
    with pytest.raises(DataError, match="too large"):
        ResampleNnunet((1e-3, 1e-3, 1e-3))(picture())
    assert {"transpose", "crop_nonzero", "normalize", "resample_cubic"} <= STEPS.keys()
