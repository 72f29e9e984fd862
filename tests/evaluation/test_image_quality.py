"""Image quality against a second library, in its limits, and with bad input."""

import numpy as np
import pytest

from polyclinic.evaluation.image_quality import nmse, psnr, ssim


def pair(shape, seed=0):
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=(3, *shape)).cumsum(-1)
    return truth + 0.3 * rng.normal(size=truth.shape), truth


@pytest.mark.parametrize("shape", [(24, 30), (14, 16, 18)])
def test_equals_scikit_image(shape: tuple[int, ...]) -> None:
    sk = pytest.importorskip("skimage.metrics", reason="scikit-image is the second implementation")
    image, truth = pair(shape)
    for i in range(3):
        span = float(np.ptp(truth[i]))
        theirs = sk.structural_similarity(
            truth[i], image[i], data_range=span, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert ssim(image, truth)[i] == pytest.approx(theirs, abs=1e-10)
        assert psnr(image, truth)[i] == pytest.approx(sk.peak_signal_noise_ratio(truth[i], image[i], data_range=span))


def test_equal_images_are_perfect_and_zero_is_the_worst_nmse() -> None:
    image, truth = pair((16, 16))
    assert ssim(truth, truth) == pytest.approx(np.ones(3))
    assert np.isinf(psnr(truth, truth)).all()
    assert nmse(truth, truth) == pytest.approx(np.zeros(3))
    assert nmse(0 * truth, truth) == pytest.approx(np.ones(3))
    assert np.isnan(nmse(image, 0 * truth)).all()


def test_ten_times_the_error_is_twenty_decibels() -> None:
    image, truth = pair((16, 16))
    assert psnr(image, truth) - psnr(truth + 10 * (image - truth), truth) == pytest.approx(np.full(3, 20.0))
    assert nmse(truth + 10 * (image - truth), truth) == pytest.approx(100 * nmse(image, truth))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="against"):
        psnr(np.zeros((2, 12, 12)), np.zeros((2, 12, 13)))
    with pytest.raises(ValueError, match="at least 11 pixels"):
        ssim(np.zeros((2, 8, 30)), np.zeros((2, 8, 30)))
