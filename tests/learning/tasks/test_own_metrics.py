"""Metrics and augmentations of a program: what they are given, and what is refused."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import polyclinic as pc
from polyclinic.core import extensions
from polyclinic.core.tree import Tree
from polyclinic.errors import ConfigError
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.learning.tasks.mr_reconstruction import Reconstruction
from polyclinic.learning.tasks.own_metrics import OwnMetric, own_metric, value_of
from polyclinic.learning.tasks.regression import Regression
from polyclinic.learning.tasks.segmentation import IGNORED, Segmentation
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.tasks.task_evaluation import outputs
from polyclinic.learning.training.image_augmentation import ImageAugmentation, augmentation_of
from polyclinic.testing import Broken, check_augmentation, check_metric
from tests.conftest import Rows, blobs

Values = NDArray[Any]


def accuracy(scores: Values, target: Values) -> float:
    return float((scores.argmax(1) == target).mean())


def absolute(predicted: Values, target: Values) -> float:
    return float(np.abs(predicted - target).mean())


def dice(predicted: Values, truth: Values) -> float:
    assert predicted.dtype == truth.dtype == bool
    both = predicted.sum() + truth.sum()
    return float(2 * (predicted & truth).sum() / both) if both else float("nan")


def noise(image: Values, truth: Values) -> float:
    return float(((image - truth) ** 2).sum() / (truth**2).sum())


def masks() -> Rows:
    """Images of two classes; one of them is absent from an image, and some pixels have no annotation."""
    x = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long() + (x[:, 0] > 1).long()
    y[0][y[0] == 2], y[1, :4] = 1, IGNORED
    return Rows(x, y)


def scores(task: Task, data: Any) -> Tree:
    return outputs(task, task.first(0), data)


@pytest.mark.parametrize(
    ("function", "task", "data", "name"),
    [
        (accuracy, Classification(Network("cnn", (1, 8, 8), 2)), blobs(0, 20, (1, 8, 8)), "accuracy"),
        (
            absolute,
            Regression(Network("mlp", (4,), 1)),
            Rows(torch.randn(9, 4), torch.randn(9, 1)),
            "mae",
        ),
        (dice, Segmentation(Network("unet", (1, 16, 16), 3, (("width", 2), ("norm", "batch")))), masks(), "dice"),
        (
            noise,
            Reconstruction(Network("unet", (1, 16, 16), 1, (("width", 2), ("norm", "batch")))),
            Rows(masks().x, masks().x + 1),
            "nmse",
        ),
    ],
    ids=["classification", "regression", "segmentation", "reconstruction"],
)
def test_a_metric_of_ones_own_equals_the_same_metric_of_the_task(
    function: Any, task: Task, data: Any, name: str
) -> None:
    from dataclasses import replace

    called = pc.metric(function)
    task = replace(task, metrics=(called,))
    found = task.scores(scores(task, data))
    assert found[called] == pytest.approx(found[name], rel=1e-5)
    assert task.metrics == task.with_network(task.network).metrics


def test_what_is_undefined_is_left_out() -> None:
    called = pc.metric(lambda scores, target: float("nan"), name="never")
    task = Classification(Network("mlp", (4,), 2), metrics=(called,))
    assert called not in task.scores(scores(task, blobs(0, 6, (4,))))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda scores, target: scores.mean(1), r"returned an array of shape \(6,\): return one number"),
        (lambda scores, target: "0.5", "returned a str: return one number"),
        (lambda scores, target: None, "returned a NoneType: return one number"),
    ],
)
def test_a_metric_returns_one_number(function: Any, message: str) -> None:
    name = extensions.register("metrics", f"bad-{id(function)}", OwnMetric(function))
    with pytest.raises(ConfigError, match=message):
        value_of(name, np.zeros((6, 2)), np.zeros(6))


def test_names_cannot_be_those_of_other_scores() -> None:
    with pytest.raises(ConfigError, match="at least one hyphen"):
        own_metric("auc")
    with pytest.raises(ConfigError, match=r"at least one hyphen"):
        own_metric("../a-b")
    extensions.register("metrics", "plain-function", accuracy)
    with pytest.raises(ConfigError, match="is a function, not an OwnMetric"):
        own_metric("local:plain-function")


def test_check_metric_finds_broken_promises() -> None:
    predictions, target = np.random.default_rng(0).dirichlet([1, 1], 10), np.arange(10) % 2

    def changing(scores: Values, target: Values) -> float:
        scores += 1
        return 0.0

    check_metric(OwnMetric(accuracy), predictions, target)
    for function, message in (
        (lambda s, t: s.mean(1), "the value is one number"),
        (lambda s, t: float("inf"), "the value is one number"),
        (changing, "changes none of its arguments"),
        (lambda s, t: float(s[0, 0]), "the order of cases has no effect"),
        (lambda s, t: np.random.rand(), "repeats itself"),
    ):
        with pytest.raises(Broken, match=message):
            check_metric(OwnMetric(function), predictions, target)


def shifted(image: torch.Tensor, target: torch.Tensor, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    return image + torch.rand((), generator=rng), target


def test_an_augmentation_of_ones_own_is_applied_last_and_follows_the_samples_generator() -> None:
    name = pc.augmentation(shifted)
    table = {"brightness": {"probability": 1.0, "low": 2.0, "high": 2.0}, "own": [name]}
    change = augmentation_of(table)
    assert augmentation_of(change.to_table()) == change
    x, y = torch.ones(1, 4, 4), torch.tensor(1)

    def sample(change: ImageAugmentation) -> torch.Tensor:
        rng = torch.Generator().manual_seed(3)
        changed: torch.Tensor = change(x.clone(), y, change.place((4, 4), rng), (4, 4), rng)[0]
        return changed

    with_own, without = sample(change), sample(augmentation_of({"brightness": table["brightness"]}))
    assert torch.equal(without, torch.full_like(x, 2.0))
    assert torch.equal(with_own, sample(change))
    assert 0 < float((with_own - without).unique()) < 1


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x, y, rng: x, "returned a Tensor: return image and target"),
        (lambda x, y, rng: (x[:, :2], y), r"given an image float32 \[1, 4, 4\] .* returned float32 \[1, 2, 4\]"),
        (lambda x, y, rng: (x.double(), y), r"returned float64 \[1, 4, 4\]"),
    ],
)
def test_an_augmentation_keeps_the_form_of_a_sample(function: Any, message: str) -> None:
    change = ImageAugmentation(own=(extensions.register("augmentations", f"bad-{id(function)}", function),))
    rng = torch.Generator().manual_seed(0)
    with pytest.raises(ConfigError, match=message):
        change(torch.ones(1, 4, 4), torch.tensor(1), change.place((4, 4), rng), (4, 4), rng)


def test_check_augmentation_finds_broken_promises() -> None:
    check_augmentation(shifted, (1, 4, 4))
    check_augmentation(shifted, (1, 4, 4), torch.zeros(4, 4).long())
    for function, message in (
        (lambda x, y, rng: x, "returns image and target"),
        (lambda x, y, rng: (x[:, :2], y), "shapes and types remain"),
        (lambda x, y, rng: (x / 0, y), "finite"),
        (lambda x, y, rng: (x + torch.rand(()), y), "come from the generator"),
    ):
        with pytest.raises(Broken, match=message):
            check_augmentation(function, (1, 4, 4))
