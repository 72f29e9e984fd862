"""The linear baseline: the minimum of the penalized loss, the penalty chosen on validation data."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from polyclinic.core.tree import Tree
from polyclinic.data.examples import Examples
from polyclinic.learning import linear_model
from polyclinic.learning.linear_model import fit_linear, linear_task
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification, MultiLabel
from polyclinic.learning.tasks.own_loss import with_loss
from polyclinic.learning.tasks.regression import Regression
from polyclinic.learning.tasks.survival import Survival
from polyclinic.learning.tasks.task import Task

FEATURES = 5


def table(targets: Tensor, seed: int = 0, strength: float = 1.0) -> Examples:
    """Features of unequal scale with a constant column; the first one follows the target."""
    n = len(targets)
    x = torch.randn(n, FEATURES, generator=torch.Generator().manual_seed(seed)) * torch.tensor([1.0, 10, 0.1, 1, 0])
    x[:, 0] += strength * targets.reshape(n, -1)[:, 0]
    names = tuple(f"p{i}" for i in range(n))
    return Examples(x, targets, names, names)


def classes(n: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(seed))


def linear(task: Task) -> Task:
    found = linear_task(task)
    assert found is not None
    return found


def mlp(outputs: int) -> Network:
    return Network("mlp", (FEATURES,), outputs, (("width", 8), ("depth", 2)))


def scores(params: Tree, x: Tensor) -> Tensor:
    return x @ params["head.weight"].T + params["head.bias"]


def test_is_logistic_regression(monkeypatch: pytest.MonkeyPatch) -> None:
    """A softmax over two penalized vectors is a logistic regression with half the penalty on their difference."""
    monkeypatch.setattr(linear_model, "PENALTIES", (0.1,))
    train = table(classes(60))
    found = fit_linear(linear(Classification(mlp(2))), train, None)
    assert found is not None
    x = train.inputs.double().numpy()
    deviation = np.where(x.std(0) > 0, x.std(0), 1.0)
    scaled = (x - x.mean(0)) / deviation
    known = LogisticRegression(C=2 / (0.1 * len(x)), tol=1e-10, max_iter=10_000).fit(scaled, train.targets.numpy())
    ours = torch.softmax(scores(found, train.inputs), 1)[:, 1].numpy()
    assert np.abs(ours - known.predict_proba(scaled)[:, 1]).max() < 1e-4


def events(n: int) -> Tensor:
    rng = torch.Generator().manual_seed(3)
    return torch.stack([1 + 10 * torch.rand(n, generator=rng), (torch.rand(n, generator=rng) < 0.7).float()], 1)


TASKS: dict[str, tuple[Task, Tensor]] = {
    "classification": (Classification(mlp(2)), classes(50)),
    "weighted": (Classification(mlp(2), class_weights=(1.0, 3.0), label_smoothing=0.1), classes(50)),
    "multilabel": (MultiLabel(mlp(2)), torch.stack([classes(50), classes(50, 1)], 1).float()),
    "regression": (Regression(mlp(1), 5.0, 2.0), 5 + torch.randn(50, 1, generator=torch.Generator().manual_seed(2))),
    "hazards": (Survival(mlp(3), (2.0, 5.0, 8.0)), events(50)),
    "cox": (Survival(mlp(1), (2.0, 5.0, 8.0), "proportional"), events(50)),
}


@pytest.mark.parametrize("classes_", [2, 3])
@pytest.mark.parametrize("penalty", [3.0, 0.001])
def test_the_minimum_is_that_of_scikit_learn(classes_: int, penalty: float) -> None:
    """Before parameters are rounded to single precision; only differences between classes are determined."""
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(80, FEATURES, generator=rng, dtype=torch.double)
    y = torch.randint(0, classes_, (80,), generator=rng)
    y[:classes_] = torch.arange(classes_)
    model = linear(Classification(mlp(classes_))).model().double()
    layer: Any = next(m for m in model.modules() if isinstance(m, nn.Linear))
    linear_model._minimize(linear(Classification(mlp(classes_))), model, layer, (x, y), penalty)
    factor = 2 if classes_ == 2 else 1  # of two classes, the library penalizes the difference
    known = LogisticRegression(C=factor / (penalty * 80), tol=1e-12, max_iter=10_000, solver="newton-cholesky")
    known.fit(x.numpy(), y.numpy())
    weight = layer.weight.detach().numpy()
    ours = weight[1] - weight[0] if classes_ == 2 else weight - weight.mean(0)
    theirs = known.coef_[0] if classes_ == 2 else known.coef_ - known.coef_.mean(0)
    assert np.abs(ours - theirs).max() < 1e-8
    bias = layer.bias.detach().numpy()
    offset = bias[1] - bias[0] if classes_ == 2 else bias - bias.mean()
    expected = known.intercept_[0] if classes_ == 2 else known.intercept_ - known.intercept_.mean()
    assert np.abs(offset - expected).max() < 1e-8


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("name", ["classification", "weighted", "multilabel", "regression", "hazards", "cox"])
def test_the_penalized_loss_is_at_its_minimum(name: str, wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_model, "PENALTIES", (0.1,))
    monkeypatch.setattr(linear_model, "WIDE", 0 if wide else 512)
    task, targets = TASKS[name]
    train = table(targets)
    task = linear(task)
    found = fit_linear(task, train, None)
    assert found is not None
    x = train.inputs.double()
    scale = x.std(0, correction=0)
    scale = torch.where(scale > 0, scale, 1.0)
    model = task.model().double()
    layer: Any = next(m for m in model.modules() if isinstance(m, nn.Linear))
    with torch.no_grad():
        layer.weight.copy_(found["head.weight"] * scale)
        layer.bias.copy_(found["head.bias"] + found["head.weight"].double() @ x.mean(0))
    y = targets.double() if targets.is_floating_point() else targets
    loss = task.loss(model, ((x - x.mean(0)) / scale, y)) + 0.05 * layer.weight.square().sum()
    gradients = torch.autograd.grad(loss, [layer.weight, layer.bias])
    assert max(float(g.abs().max()) for g in gradients) < 1e-4


def test_outliers_do_not_stop_a_robust_loss() -> None:
    """Where all errors are large, the loss of a regression has no curvature."""
    task = linear(Regression(mlp(1), 0.0, 1.0))
    model = task.model().double()
    layer: Any = next(m for m in model.modules() if isinstance(m, nn.Linear))
    x = torch.randn(40, FEATURES, generator=torch.Generator().manual_seed(4), dtype=torch.double)
    y = 50 + 30 * x[:, :1]
    y[0] = -1e4
    linear_model._minimize(task, model, layer, (x, y), 0.001)
    loss = task.loss(model, (x, y)) + 0.0005 * layer.weight.square().sum()
    gradients = torch.autograd.grad(loss, [layer.weight, layer.bias])
    assert max(float(g.abs().max()) for g in gradients) < 1e-6


def test_small_tables_do_not_load_the_compiler() -> None:
    code = """
import sys, torch
from tests.learning.test_linear_model import TASKS, fit_linear, linear, table
for task, targets in TASKS.values():
    assert fit_linear(linear(task), table(targets), None) is not None
assert not {"torch._dynamo", "sympy"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_penalty_has_the_lowest_loss_on_validation_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve patients and labels that no feature explains ask for a strong penalty; a strong signal for a weak one."""
    task = linear(Classification(mlp(2)))
    names = tuple(f"p{i}" for i in range(200))
    labels = classes(200, 5)
    noise = Examples(torch.randn(200, FEATURES, generator=torch.Generator().manual_seed(9)), labels, names, names)
    chosen = []
    for train, held_out in (
        (noise.subset(torch.arange(12)), noise),
        (table(classes(200), strength=10.0), table(labels, 1, strength=10.0)),
    ):
        best, losses = fit_linear(task, train, held_out), dict[float, float]()
        assert best is not None
        for penalty in linear_model.PENALTIES:
            with monkeypatch.context() as patch:
                patch.setattr(linear_model, "PENALTIES", (penalty,))
                losses[penalty] = cross_entropy(fit_linear(task, train, None), held_out)
        assert cross_entropy(best, held_out) == pytest.approx(min(losses.values()), abs=1e-4)
        chosen.append(min(losses, key=lambda k: losses[k]))
    assert chosen == [max(linear_model.PENALTIES), min(linear_model.PENALTIES)]


def cross_entropy(params: Tree | None, data: Examples) -> float:
    assert params is not None
    return float(nn.functional.cross_entropy(scores(params, data.inputs), data.targets))


def test_withheld_labels_are_left_out() -> None:
    task, train = linear(Classification(mlp(2))), table(classes(60))
    labeled, hidden = train.subset(torch.arange(30)), train.subset(torch.arange(30, 60)).unlabeled()
    both = labeled.joined([hidden])
    first, second = (fit_linear(task, e, labeled) for e in (labeled, both))
    assert first is not None
    assert second is not None
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert fit_linear(task, hidden, labeled) is None


def test_images_and_own_losses_have_none() -> None:
    assert linear_task(Classification(Network("cnn", (1, 8, 8), 2))) is None
    assert linear_task(with_loss(Classification(mlp(2)), "mine")) is None
