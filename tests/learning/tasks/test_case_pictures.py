"""Pictures of cases: which cases, which slices, and what leaves a site."""

from typing import Any, cast

import pytest
import torch
from torch import nn

from polyclinic.core.execution import Refused
from polyclinic.core.tree import Tree
from polyclinic.data.examples import Examples
from polyclinic.learning.networks.model_tree import params_of
from polyclinic.learning.tasks.case_pictures import FINEST, case_pictures, ranked
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.segmentation import Segmentation
from polyclinic.learning.tasks.task_evaluation import outputs


def test_the_best_the_median_and_the_worst_case_are_chosen() -> None:
    dice = torch.tensor([[0.5], [0.9], [0.7], [0.7], [1.0]])
    present = torch.zeros(5, 1, dtype=torch.uint8)
    assert ranked(dice, present) == {"best": 4, "median": 2, "worst": 0}  # of equal cases the first
    assert ranked(dice[:2], present[:2]) == {"best": 1, "worst": 0}
    assert ranked(dice[:1], present[:1]) == {"best": 0}
    assert ranked(dice[:0], present[:0]) == {}


def test_classes_that_a_case_lacks_do_not_count() -> None:
    dice, absent = torch.tensor([[0.5, 1.0], [0.6, 0.6], [1.0, 1.0]]), torch.tensor([[0, 1], [0, 0], [1, 1]])
    assert ranked(dice, absent) == {"best": 1, "worst": 0}  # 0.5 and not 0.75; the third has no class


class Threshold(nn.Module):
    """Predicts class 1 where the first channel is above 0.5."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.zeros_like(x[:, :1]), self.scale * (x[:, :1] - 0.5)], 1)


def pictures(inputs: torch.Tensor, targets: torch.Tensor) -> Tree:
    task, names = Segmentation(cast(Any, Threshold)), tuple(map(str, range(len(inputs))))
    data = Examples(inputs, targets, names, names)
    params = params_of(Threshold())
    return case_pictures(task, params, data, outputs(task, params, data))


def test_planes_go_through_the_center_of_the_true_foreground() -> None:
    place = torch.stack(torch.meshgrid(torch.arange(8), torch.arange(10), torch.arange(12), indexing="ij"))
    distance = (place - torch.tensor([3, 7, 2]).view(3, 1, 1, 1)).abs().sum(0)
    truth = (distance <= 1).long()[None]  # the center and its six neighbors: every slice of an axis is another
    image = truth[:, None].float()
    found = pictures(image, truth)
    assert {name.split("/")[0] for name in found} == {"best"}
    assert found["best/dice"].tolist() == [1.0]
    for plane, (axis, at) in enumerate(((0, 3), (1, 7), (2, 2))):
        expected = truth[0].select(axis, at)
        assert torch.equal(found[f"best/{plane}/truth"].long(), expected)
        assert torch.equal(found[f"best/{plane}/predicted"].long(), expected)
        assert torch.equal(found[f"best/{plane}/image"][..., 0].long(), 255 * expected)
        assert found[f"best/{plane}/truth"].dtype == torch.uint8


def test_pictures_are_small_and_colors_remain() -> None:
    truth = torch.zeros(1, 600, 300, dtype=torch.int64)
    truth[0, 100:300, 50:250] = 1
    found = pictures(truth[:, None].expand(1, 3, 600, 300).float().contiguous(), truth)
    assert found["best/0/image"].shape == (FINEST, FINEST, 3)
    assert found["best/0/truth"].shape == (FINEST, FINEST)
    assert float(found["best/0/aspect"]) == pytest.approx((600 / FINEST) / (300 / FINEST))
    assert float(found["best/0/truth"].float().mean()) == pytest.approx(200 * 200 / (600 * 300), abs=0.01)
    assert not [leaf for name, leaf in found.items() if leaf.numel() > 3 * FINEST**2]


def test_an_image_without_any_foreground_is_left_out() -> None:
    assert pictures(torch.zeros(2, 1, 8, 8), torch.zeros(2, 8, 8, dtype=torch.int64)) == {}


def test_only_masks_have_outlines() -> None:
    with pytest.raises(Refused, match="for segmentation, and this task is 'classification'"):
        case_pictures(Classification(cast(Any, Threshold)), {}, None, {})
