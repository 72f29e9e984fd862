"""Segmentation of overlapping regions: loss, painted labels and scores equal a second computation."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from polyclinic.errors import ConfigError
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.segmentation import IGNORED, Segmentation, own_labels
from polyclinic.learning.training.local import LocalTraining
from tests.conftest import Rows
from tests.support.known import known

BRATS = ((1, 2, 3), (2, 3), (3,))
"""Complete tumor, tumor core, enhancing tumor: labels edema, necrosis and enhancing tumor."""
TASK = Segmentation(Network("residual-unet", (1, 16, 16), 3, (("levels", 2), ("width", 4))), regions=BRATS)


class Fixed(nn.Module):
    """A network with given outputs."""

    def __init__(self, *outputs: torch.Tensor) -> None:
        super().__init__()
        self.outputs = [nn.Parameter(one) for one in outputs]

    def forward(self, x: torch.Tensor) -> Any:
        return self.outputs if len(self.outputs) > 1 else self.outputs[0]


def drawn(seed: int = 0, ignored: bool = True, shape: tuple[int, ...] = (2, 8, 8)) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of three regions and labels 0 to 3, some without annotation."""
    rng = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 4, shape, generator=rng)
    if ignored:
        y[torch.rand(shape, generator=rng) < 0.2] = IGNORED
    return 2 * torch.randn(shape[0], 3, *shape[1:], generator=rng), y


def by_hand(logits: torch.Tensor, labels: torch.Tensor, together: bool = False) -> float:
    """The loss in NumPy: Dice of each image and region (of all images at once if ``together``), and cross-entropy."""
    z, y = logits.double().numpy(), labels.numpy()
    p = 1 / (1 + np.exp(-z))
    known = y != -1
    dice, entropy = [], []
    for k, region in enumerate(BRATS):
        t = np.isin(y, region)
        for i in [slice(None)] if together else range(len(z)):
            a, b = p[i, k][known[i]], t[i][known[i]]
            dice.append(1 - (2 * (a * b).sum() + 1e-5) / (a.sum() + b.sum() + 1e-5))
        chance = np.where(t, p[:, k], 1 - p[:, k])[known]
        entropy += (-np.log(chance)).tolist()
    return float(np.mean(dice) + np.mean(entropy))


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("together", [False, True])
def test_the_loss_is_that_of_numpy(ignored: bool, together: bool) -> None:
    z, y = drawn(1, ignored)
    task = dataclasses.replace(TASK, batch_dice=together)
    assert float(task.loss(Fixed(z), (z, y))) == pytest.approx(by_hand(z, y, together), rel=1e-5)


def test_pixels_without_annotation_do_not_matter() -> None:
    z, y = drawn(2)
    model = Fixed(z)
    TASK.loss(model, (z, y)).backward()
    gradient = known(model.outputs[0].grad)
    assert (gradient.movedim(1, 0)[:, y == IGNORED] == 0).all()
    assert (gradient.movedim(1, 0)[:, y != IGNORED] != 0).all()
    nothing = torch.full_like(y, IGNORED)
    assert torch.isfinite(TASK.loss(model, (z, nothing)))
    other = torch.where((y == IGNORED)[:, None], -z, z)
    assert torch.equal(TASK.outputs(model, (z, y))["dice"], TASK.outputs(Fixed(other), (z, y))["dice"])


def test_deep_supervision_weights_the_losses() -> None:
    z, y = drawn(3, shape=(2, 16, 16))
    coarse, _ = drawn(4, shape=(2, 8, 8))
    reduced = torch.nn.functional.interpolate(y[:, None].float(), (8, 8), mode="nearest-exact")[:, 0].long()
    found = float(TASK.loss(Fixed(z, coarse), (z, y)))
    assert found == pytest.approx((2 * by_hand(z, y) + by_hand(coarse, reduced)) / 3, rel=1e-5)


def test_labels_are_painted_in_the_order_of_the_regions() -> None:
    """As in nnU-Net: the last region that contains a pixel decides, also where the larger ones were missed."""
    z, _ = drawn(5)
    painted = TASK.labels(z.movedim(1, 0)).numpy()
    for at in np.ndindex(painted.shape):
        inside = [k for k in range(3) if z[at[0], k, at[1], at[2]] > 0]
        assert painted[at] == (inside[-1] + 1 if inside else 0)
    assert {0, 1, 2, 3} == set(np.unique(painted))


def test_scores_are_those_of_the_regions_in_the_painted_labels() -> None:
    z, y = drawn(6)
    outputs = TASK.outputs(Fixed(z), (z, y), full_metrics=True)
    painted = TASK.labels(z.movedim(1, 0)).numpy()
    for i in range(2):
        known = y[i].numpy() != -1
        for k, region in enumerate(BRATS):
            p, t = np.isin(painted[i], region) & known, np.isin(y[i].numpy(), region)
            assert float(outputs["dice"][i, k]) == pytest.approx(2 * (p & t).sum() / (p.sum() + t.sum()))
            assert float(outputs["volume_px"][i, k]) == abs(p.sum() - t.sum())
    perfect = torch.stack([20.0 * torch.isin(y, torch.tensor(region)) - 10 for region in BRATS], 1)
    assert TASK.scores(TASK.outputs(Fixed(perfect), (z, y)))["dice"] == 1


def test_regions_of_one_label_are_as_classes_to_the_scores() -> None:
    z, y = drawn(7)
    single = dataclasses.replace(TASK, regions=((1,), (2,), (3,)))
    plain = dataclasses.replace(TASK, regions=())
    maximal = torch.cat([torch.zeros(2, 1, 8, 8), z], 1)  # argmax with a background of 0 where one region is positive
    one = (z > 0).sum(1) <= 1
    target = torch.where(one, y, IGNORED)
    a, b = single.outputs(Fixed(z), (z, target)), plain.outputs(Fixed(maximal), (z, target))
    assert torch.equal(a["dice"], b["dice"])


@pytest.mark.parametrize(
    ("regions", "says"),
    [
        (((1, 2), (2, 3)), r"\[2, 3\] has the labels 2, 3 outside of the regions after it"),
        (((1,), (1, 2)), r"\[1\] has no label outside"),
        (((1, 2), ()), "must be different labels from 1 to 255"),
        (((0, 1),), "must be different labels from 1 to 255"),
        (((1, 1),), "must be different labels from 1 to 255"),
        (((300,),), "must be different labels from 1 to 255"),
    ],
)
def test_regions_that_no_mask_can_hold_are_refused(regions: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        own_labels(regions)


def test_own_labels() -> None:
    assert own_labels(BRATS) == (1, 2, 3)
    assert own_labels(((1, 2, 3), (1, 3), (3,))) == (2, 1, 3)
    assert TASK.label_count == 4
    assert dataclasses.replace(TASK, regions=()).label_count == 3


def nested(seed: int, n: int) -> Rows:
    """Images of three nested discs, brighter inside."""
    rng = torch.Generator().manual_seed(seed)
    grid = torch.stack(torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")).float()
    center = 6 + 4 * torch.rand(n, 2, 1, 1, generator=rng)
    distance = (grid - center).square().sum(1).sqrt()
    y = (distance < 6).long() + (distance < 4).long() + (distance < 2).long()
    return Rows((y + 0.2 * torch.randn(n, 16, 16, generator=rng))[:, None], y)


def test_a_network_learns_nested_regions() -> None:
    from polyclinic.core.site import Site
    from polyclinic.learning.tasks.task_evaluation import outputs

    train, test = nested(0, 16), nested(1, 8)
    local = LocalTraining(epochs=20, batch_size=4, lr=0.02, optimizer="adam")
    params = local.fit(TASK, TASK.first(), Site("a", {"train": train}), 0)
    found = outputs(TASK, params, test)
    assert found["dice"].shape == (8, 3)
    assert (found["dice"].mean(0) > torch.tensor([0.9, 0.9, 0.6])).all()
    assert TASK.scores(found)["dice"] > TASK.scores(outputs(TASK, TASK.first(), test))["dice"] + 0.3


def test_counts_leave_out_pixels_without_annotation() -> None:
    from polyclinic.learning.tasks.data_sums import count_up

    data = nested(3, 6)
    before = count_up(data, TASK.label_count)["classes"]
    assert before.tolist() == [float((data.y == k).sum()) for k in range(4)]
    data.y[:, :4] = IGNORED
    assert count_up(data, TASK.label_count)["classes"].tolist() == [float((data.y == k).sum()) for k in range(4)]
