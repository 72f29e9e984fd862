"""Lesion-wise comparison against the official code of BraTS 2023, and detection counted by hand."""

import numpy as np
import pytest
import torch

from polyclinic.evaluation.records.predictions import Predictions, as_images, by_patient
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.lesions import Lesions, lesion_scores
from polyclinic.learning.tasks.segmentation import Segmentation, agreement

# Dice, true lesions, those with a prediction, and false components of the 20 cases below, computed with
# get_LesionWiseScores of rachitsaluja/BraTS-2023-Metrics (metrics.py): for dilation 3 and 50 mm3, and for 1 and 2 mm3.
OFFICIAL = [
    ((0.271722, 1, 1, 0), (0.2221778, 4, 2, 1)),
    ((0.2701149, 1, 1, 1), (0.2838915, 2, 2, 1)),
    ((0.53, 2, 2, 0), (0.5106726, 3, 3, 0)),
    ((0.4611529, 1, 1, 0), (0.272997, 2, 2, 0)),
    ((0.2493369, 1, 1, 1), (0.2886347, 3, 3, 1)),
    ((0.0561798, 1, 1, 1), (0.0561798, 1, 1, 1)),
    ((0.1407407, 1, 1, 1), (0.1637931, 2, 1, 1)),
    ((0.1644737, 1, 1, 1), (0.1908451, 4, 2, 1)),
    ((0.5646438, 1, 1, 0), (0.5276238, 2, 2, 0)),
    ((0.0, 1, 0, 1), (0.1122112, 2, 1, 1)),
    ((0.5322896, 1, 1, 0), (0.2525534, 2, 1, 1)),
    ((1.0, 0, 0, 0), (1.0, 0, 0, 0)),
    ((0.0, 1, 0, 0), (0.2091887, 3, 2, 0)),
    ((0.2798111, 1, 1, 1), (0.2901743, 4, 3, 2)),
    ((0.0, 0, 0, 1), (0.0, 0, 0, 1)),
    ((0.2854701, 1, 1, 1), (0.2388618, 4, 3, 2)),
    ((0.1440329, 1, 1, 1), (0.2269272, 3, 2, 1)),
    ((0.0168776, 1, 1, 0), (0.0610704, 2, 2, 0)),
    ((0.3234043, 1, 1, 0), (0.1871395, 2, 2, 1)),
    ((0.2120482, 1, 1, 1), (0.2120482, 1, 1, 1)),
]


def masks(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a predicted and a true mask of up to five balls; some are missed, shifted or false."""
    rng, size = np.random.default_rng(seed), (24, 26, 22)
    grid = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), -1)
    truth, predicted = np.zeros(size, bool), np.zeros(size, bool)
    for _ in range(int(rng.integers(0, 6))):
        center, radius = rng.uniform(3, 20, 3), rng.uniform(0.8, 3.5)
        truth |= ((grid - center) ** 2).sum(-1) <= radius * radius
        if rng.random() < 0.7:
            moved = grid - center - rng.uniform(-1.5, 1.5, 3)
            predicted |= (moved**2).sum(-1) <= (radius * rng.uniform(0.6, 1.3)) ** 2
    for _ in range(int(rng.integers(0, 3))):
        center, radius = rng.uniform(3, 20, 3), rng.uniform(0.8, 2.5)
        predicted |= ((grid - center) ** 2).sum(-1) <= radius * radius
    return torch.from_numpy(predicted), torch.from_numpy(truth)


@pytest.mark.parametrize("seed", range(20))
def test_lesions_are_compared_as_in_brats(seed: int) -> None:
    predicted, truth = (mask[None, None] for mask in masks(seed))
    for how, expected in zip((Lesions(), Lesions(1, 2.0)), OFFICIAL[seed], strict=True):
        found = lesion_scores(predicted, truth, (1.0, 1.0, 1.0), how)
        got = [found[name].item() for name in ("lesion_dice", "lesions", "lesions_found", "lesions_false")]
        assert got == pytest.approx(expected, abs=1e-6)
        assert 0 <= found["lesion_hd95"].item() <= (24**2 + 26**2 + 22**2) ** 0.5 + 1e-3


def test_distances_of_lesions_are_in_millimeters_and_missed_ones_are_a_diagonal_away() -> None:
    truth, predicted = torch.zeros(1, 1, 20, 20, dtype=torch.bool), torch.zeros(1, 1, 20, 20, dtype=torch.bool)
    truth[..., 2:5, 2:5] = True
    predicted[..., 2:5, 3:6] = True  # one pixel to the side
    truth[..., 15:18, 15:18] = True  # missed
    predicted[..., 2:4, 16:18] = True  # false
    diagonal = (40**2 + 60**2) ** 0.5
    found = lesion_scores(predicted, truth, (2.0, 3.0), Lesions(0, 0.0))
    assert found["lesion_hd95"].item() == pytest.approx((3.0 + 2 * diagonal) / 3, rel=1e-5)
    assert found["lesion_dice"].item() == pytest.approx((2 * 6 / 18) / 3)
    assert {k: found[k].item() for k in found if k.startswith("lesions")} == {
        "lesions": 2,
        "lesions_found": 1,
        "lesions_predicted": 2,
        "lesions_false": 1,
    }
    assert "lesion_hd95_px" in lesion_scores(predicted, truth, None, Lesions())
    small = lesion_scores(predicted, truth, (2.0, 3.0), Lesions(0, 9 * 6.0))
    assert (small["lesions"].item(), small["lesions_false"].item(), small["lesion_dice"].item()) == (0, 1, 0)


def test_detection_is_a_ratio_only_where_there_is_something_to_detect() -> None:
    cases = {
        "dice": np.array([[0.5], [0.0], [1.0], [0.0]]),
        "absent": np.array([[0], [0], [1], [0]]),
        "lesions": np.array([[4], [0], [0], [2]]),
        "lesions_found": np.array([[3], [0], [0], [0]]),
        "lesions_predicted": np.array([[5], [2], [0], [0]]),
        "lesions_false": np.array([[2], [2], [0], [0]]),
    }
    values = as_images(Predictions(np.arange(4), cases=cases)).values
    np.testing.assert_allclose(values["lesion_sensitivity"].ravel(), [0.75, np.nan, np.nan, 0.0])
    precision, recall = 3 / 5, 3 / 4
    f1 = 2 * precision * recall / (precision + recall)
    np.testing.assert_allclose(values["lesion_f1"].ravel(), [f1, 0.0, np.nan, 0.0])
    np.testing.assert_allclose(values["lesions_false"].ravel(), [2, 2, np.nan, 0])


def test_slices_of_a_patient_are_one_volume() -> None:
    """The Dice of the stacked slices, not the mean over slices: an empty prediction gets 0, not the share of blanks."""
    rng = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 3, (12, 8, 8), generator=rng)
    truth[::2] = 0
    predicted = torch.where(torch.rand(12, 8, 8, generator=rng) < 0.7, truth, 0)
    patient = torch.arange(12) // 4
    outputs = agreement(predicted, truth, 3, counts=True)
    outputs |= {"sliced": torch.ones(12), "patient": patient}
    expected = [
        [
            2.0
            * float(((predicted == k) & (truth == k))[patient == who].sum())
            / float((predicted == k)[patient == who].sum() + (truth == k)[patient == who].sum())
            for k in (1, 2)
        ]
        for who in range(3)
    ]
    task = Segmentation(Network("unet", (1, 8, 8), 3))
    assert task.summary(outputs)["dice"] == pytest.approx(np.mean(expected), abs=1e-6)
    cases = {k: v.numpy().reshape(12, -1) for k, v in outputs.items() if k != "patient"}
    volumes = by_patient(Predictions(patient.numpy(), cases=cases)).values
    np.testing.assert_allclose(volumes["dice"], expected, rtol=1e-6)
    alone = by_patient(Predictions(patient.numpy(), cases={k: v for k, v in cases.items() if k != "sliced"})).values
    assert np.abs(alone["dice"] - volumes["dice"]).max() > 1e-3


def test_lesions_are_in_the_outputs_of_the_final_test_only() -> None:
    task = Segmentation(
        Network("unet", (1, 16, 16), 2, (("width", 4), ("norm", "batch"))), lesions=True, lesion_dilation=1
    )
    model = task.model().eval()
    batch = torch.rand(2, 1, 16, 16), torch.ones(2, 16, 16, dtype=torch.long)
    with torch.inference_mode():
        full, fast = (task.outputs(model, batch, full_metrics=full) for full in (True, False))
    assert "lesion_dice" in full
    assert not [name for name in fast if name.startswith("lesion")]
