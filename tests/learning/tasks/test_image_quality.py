"""Image quality compared with scikit-image, and in its limits."""

from typing import Any

import numpy as np
import pytest
import torch

from polyclinic.learning.tasks.image_quality import nmse, psnr, ssim


def pair(shape: Any, seed: Any = 0) -> Any:
    """Three noisy images and the true ones, [3, 1, *shape], float64."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=(3, 1, *shape)).cumsum(-1)
    return torch.from_numpy(truth + 0.3 * rng.normal(size=truth.shape)), torch.from_numpy(truth)


@pytest.mark.parametrize("shape", [(24, 30), (14, 16, 18), (40,)])
def test_equals_scikit_image(shape: tuple[int, ...]) -> None:
    sk = pytest.importorskip("skimage.metrics", reason="scikit-image is the second implementation")
    image, truth = pair(shape)
    for i in range(3):
        x, y = image[i, 0].numpy(), truth[i, 0].numpy()
        span = float(np.ptp(y))
        assert ssim(image, truth)[i] == pytest.approx(sk.structural_similarity(y, x, data_range=span), abs=1e-6)
        assert psnr(image, truth)[i] == pytest.approx(sk.peak_signal_noise_ratio(y, x, data_range=span), rel=1e-6)
    given = torch.tensor([2.0, 4.0, 8.0])
    wanted = [
        sk.structural_similarity(y[0], x[0], data_range=float(s))
        for x, y, s in zip(image.numpy(), truth.numpy(), given, strict=True)
    ]
    assert ssim(image, truth, given).tolist() == pytest.approx(wanted, abs=1e-6)


def test_a_table_row_is_one_window() -> None:
    rows, truth = torch.tensor([[1.0, 2.0, 4.0, 9.0]]), torch.tensor([[2.0, 1.0, 5.0, 7.0]])
    x, y, span = rows[0].numpy(), truth[0].numpy(), 6.0
    cov, c1, c2 = np.cov(x, y), (0.01 * span) ** 2, (0.03 * span) ** 2
    top = (2 * x.mean() * y.mean() + c1) * (2 * cov[0, 1] + c2)
    wanted = top / ((x.mean() ** 2 + y.mean() ** 2 + c1) * (cov[0, 0] + cov[1, 1] + c2))
    assert float(ssim(rows, truth)) == pytest.approx(wanted, rel=1e-6)


def test_a_window_is_not_larger_than_the_image() -> None:
    image, truth = pair((5, 30))
    wide = [float(ssim(image[i : i + 1], truth[i : i + 1], width=5)) for i in range(3)]
    assert ssim(image, truth).tolist() == pytest.approx(wide)


def test_equal_images_are_perfect_and_zero_is_the_worst_nmse() -> None:
    image, truth = pair((16, 16))
    assert ssim(truth, truth).tolist() == pytest.approx([1, 1, 1])
    assert psnr(truth, truth).tolist() == [100, 100, 100]
    assert nmse(truth, truth).tolist() == [0, 0, 0]
    assert nmse(0 * truth, truth).tolist() == pytest.approx([1, 1, 1])
    assert nmse(image, 0 * truth).isfinite().all()
    assert psnr(image, 0 * truth + 3).isfinite().all()  # a constant image has the range 1


def test_ten_times_the_error_is_twenty_decibels() -> None:
    image, truth = pair((16, 16))
    worse = truth + 10 * (image - truth)
    assert (psnr(image, truth) - psnr(worse, truth)).tolist() == pytest.approx([20.0] * 3, rel=1e-5)
    assert nmse(worse, truth).tolist() == pytest.approx((100 * nmse(image, truth)).tolist())
