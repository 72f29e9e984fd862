"""Regularized linear models of tables: the baseline that a network, and federating it, must be better than.

The model minimizes the task's loss on the training examples plus λ/2·‖W‖², without a penalty for the intercept. Inputs
are scaled to mean 0 and deviation 1 over these examples. The loss of every task here is convex in a linear model, so
L-BFGS finds its minimum, and neither rounds nor learning rates matter. λ is chosen on validation examples.
"""

from typing import Any

import torch
from torch import Tensor, nn

from polyclinic.core.tree import Tree
from polyclinic.learning.batch import Batch
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.task import Task

PENALTIES = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
"""The values of λ, from the strongest."""
KINDS = ("classification", "multilabel", "regression", "survival")
"""Kinds of tasks that a linear model of a table can learn."""
STEPS = 200
"""Largest number of L-BFGS steps for each λ."""


def linear_task(task: Task) -> Task | None:
    """Return the task with a linear model of its inputs; None for images, and for losses of packages."""
    network = task.network
    if (
        not isinstance(network, Network)
        or len(network.inputs) != 1
        or task.kind not in KINDS
        or hasattr(task, "objective")
    ):
        return None
    return task.with_network(Network("mlp", network.inputs, network.outputs, (("depth", 0),)))


def fit_linear(task: Task, train: Any, validation: Any | None) -> Tree | None:
    """Return the parameters of the linear model with the lowest loss on ``validation``.

    Args:
        task: A task with a linear model, from ``linear_task``.
        train: Training examples.
        validation: Validation examples; if there are none, λ is the middle of ``PENALTIES``.

    Returns:
        The parameters; None if no training example has a known target.
    """
    batch, held_out = _known(train), _known(validation) if validation is not None else None
    if not len(batch[0]):
        return None
    model = task.model().double()
    layer = next(module for module in model.modules() if isinstance(module, nn.Linear))
    center, scale = batch[0].mean(0), batch[0].std(0, correction=0)
    scale = torch.where(scale > 0, scale, 1.0)
    x = (batch[0] - center) / scale
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    judged = held_out is not None and len(held_out[0]) > 0
    best: tuple[Tensor, Tensor] | None = None
    lowest = float("inf")
    for penalty in PENALTIES if judged else (PENALTIES[len(PENALTIES) // 2],):
        _minimize(task, model, layer, (x, batch[1]), penalty)
        with torch.no_grad():
            loss = 0.0
            if held_out is not None and judged:
                loss = float(task.loss(model, ((held_out[0] - center) / scale, held_out[1])))
        if best is None or loss < lowest:
            weight = layer.weight.detach() / scale
            bias = layer.bias.detach() - weight @ center
            best, lowest = (weight.float(), bias.float()), loss
    assert best is not None
    with torch.no_grad():
        layer.weight.copy_(best[0])
        layer.bias.copy_(best[1])
    return {name: leaf.float() for name, leaf in model.state_dict().items()}


def _minimize(task: Task, model: nn.Module, layer: nn.Linear, batch: Batch, penalty: float) -> None:
    """Move the model to the minimum of the penalized loss, from where it is."""
    optimizer = torch.optim.LBFGS(
        layer.parameters(), max_iter=STEPS, tolerance_grad=1e-6, tolerance_change=1e-9, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        value = task.loss(model, batch) + penalty / 2 * layer.weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(objective)  # type: ignore[no-untyped-call, arg-type]


def _known(data: Any) -> Batch:
    """Return the inputs and targets of the examples of ``data`` whose target is known, in double precision."""
    x, y = data[torch.arange(len(data))]
    known = y.reshape(len(y), -1).isfinite().any(1) if y.is_floating_point() else y >= 0
    return x[known].double(), y[known].double() if y.is_floating_point() else y[known]
