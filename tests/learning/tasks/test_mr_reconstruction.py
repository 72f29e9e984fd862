"""Reconstruction: undersampling by numpy, scores by loops, and that learning helps."""

import numpy as np
import pytest
import torch

from polyclinic.core.site import Site
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.mr_reconstruction import Reconstruction, columns, likeness, undersample
from polyclinic.learning.tasks.task_evaluation import outputs
from polyclinic.learning.training.local import LocalTraining
from tests.conftest import segmentation_sites
from tests.support.undersampled import Accelerated


def test_undersampling_is_numpys() -> None:
    x = np.random.default_rng(0).normal(size=(2, 1, 8, 12)).astype("float32")
    measured = columns(12, 3, 0.25, torch.Generator().manual_seed(0))
    k = np.fft.fft2(x) * measured.numpy()
    np.testing.assert_allclose(undersample(torch.from_numpy(x), measured).numpy(), np.abs(np.fft.ifft2(k)), atol=1e-5)
    everything = torch.ones(12, dtype=torch.bool)
    np.testing.assert_allclose(undersample(torch.from_numpy(x), everything).numpy(), np.abs(x), atol=1e-5)


@pytest.mark.parametrize(("width", "acceleration", "center"), [(64, 4, 0.08), (31, 4, 0.1), (16, 1, 0.5), (20, 8, 0.5)])
def test_columns(width: int, acceleration: int, center: float) -> None:
    measured = columns(width, acceleration, center, torch.Generator().manual_seed(1))
    assert measured[0]
    half = max(0, (round(center * width) - 1) // 2)
    assert measured[: half + 1].all()
    assert measured[width - half :].all()
    assert int(measured.sum()) == max(width // acceleration, 2 * half + 1)
    for wrong, share in ((0.5, 0.1), (4, 0.0), (4, 1.5)):
        with pytest.raises(ValueError, match="acceleration must be"):
            columns(16, wrong, share, torch.Generator())


def test_scores_by_loops() -> None:
    rng = np.random.default_rng(0)
    truth = rng.uniform(size=(2, 1, 10, 9))
    image = truth + 0.1 * rng.normal(size=truth.shape)
    found = likeness(torch.from_numpy(image), torch.from_numpy(truth))
    for i in range(2):
        x, y = image[i, 0], truth[i, 0]
        assert float(found["nmse"][i]) == pytest.approx(((x - y) ** 2).sum() / (y**2).sum())
        assert float(found["psnr"][i]) == pytest.approx(10 * np.log10(y.max() ** 2 / ((x - y) ** 2).mean()))
        c1, c2, each = (0.01 * y.max()) ** 2, (0.03 * y.max()) ** 2, []
        for r in range(4):
            for c in range(3):
                a, b = x[r : r + 7, c : c + 7].ravel(), y[r : r + 7, c : c + 7].ravel()
                cov = np.cov(a, b)
                top = (2 * a.mean() * b.mean() + c1) * (2 * cov[0, 1] + c2)
                each.append(top / ((a.mean() ** 2 + b.mean() ** 2 + c1) * (cov[0, 0] + cov[1, 1] + c2)))
        assert float(found["ssim"][i]) == pytest.approx(np.mean(each), rel=1e-5)
    same = likeness(torch.from_numpy(truth), torch.from_numpy(truth))
    assert same["psnr"].tolist() == pytest.approx([100, 100])
    assert same["ssim"].tolist() == pytest.approx([1, 1])


def test_learning_beats_zero_filling() -> None:
    images = segmentation_sites(1)["site-0"].data
    measured = columns(16, 2, 0.2, torch.Generator().manual_seed(0))
    data = {role: Accelerated(images[role], measured) for role in ("train", "val")}
    task = Reconstruction(Network("unet", (1, 16, 16), 1, (("width", 4), ("norm", "batch"))))
    nothing = {name: torch.zeros_like(leaf) for name, leaf in task.first().items()}
    before = task.summary(outputs(task, nothing, data["val"]))
    end = LocalTraining(epochs=30, batch_size=5, optimizer="adam", lr=3e-3).fit(task, task.first(), Site("a", data), 0)
    after = task.summary(outputs(task, end, data["val"]))
    assert after["nmse"] < before["nmse"]
    assert after["psnr"] > before["psnr"]
