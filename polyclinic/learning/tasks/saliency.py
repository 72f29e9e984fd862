"""What a model looks at, as an aggregate over a site's patients: the share of its attribution at each place.

Sundararajan, Taly, Yan, "Axiomatic Attribution for Deep Networks", ICML 2017, https://arxiv.org/abs/1703.01365,
equation 1, as captum computes it, from an input of zeros. Each example's absolute attributions are summed over channels
and divided by their sum; then come the mean over a patient's examples, and that over patients. So a patient has one
vote, and no example's map leaves by itself.

For images, the mean has a meaning where they are registered or cropped alike (all nodules in the middle, say); where
they are not, it says where in the frame the model looks, and no more.
"""

from typing import Any

import torch
from torch import Tensor, nn

from polyclinic.core.execution import Refused
from polyclinic.core.tree import Tree
from polyclinic.learning.tasks.task import Task, cached_model

KINDS = ("classification", "multilabel", "regression")
FEWEST = 10


def saliency(
    task: Task, params: Tree, data: Any, device: str = "cpu", *, fewest: int = FEWEST, steps: int = 16, size: int = 32
) -> Tree:
    """Where the model with ``params`` looks in ``data``, on average over its patients.

    Args:
        fewest: Patients below which nothing is told.
        steps: Of the integral from zeros to the example.
        size: Examples at a time.

    Returns:
        ``map`` [*spatial] or [F], not negative, with sum 1; and ``patients``, their number.

    Raises:
        Refused: Where there are too few patients, the task has no one answer to explain, or captum is not installed.
    """
    names = list(getattr(data, "patients", range(len(data))))
    patients = list(dict.fromkeys(names))
    if len(patients) < fewest:
        raise Refused(f"{len(patients)} patients here, and a mean over fewer than {fewest} is not told")
    if task.kind not in KINDS:
        raise Refused(f"a task of kind {task.kind!r} has no one answer to explain; {', '.join(KINDS)} have")
    try:
        from captum.attr import IntegratedGradients
    except ImportError:
        raise Refused("explanations need captum: pip install 'polyclinic[explain]'") from None
    model = cached_model(task, params, device).eval()
    gradients = IntegratedGradients(_Answer(model, task.kind))
    number = {patient: i for i, patient in enumerate(patients)}
    owner = torch.tensor([number[name] for name in names])
    total: Tensor | None = None
    votes = 1.0 / torch.bincount(owner).double()  # an example's part of its patient's vote
    for chunk in torch.arange(len(data)).split(size):
        x = data[chunk][0].to(device)
        found = gradients.attribute(x, n_steps=steps, internal_batch_size=4 * size).detach().abs().double().cpu()
        found = found.sum(1) if found.ndim > 2 else found
        weight = found.flatten(1).sum(1)
        share = found / weight.clamp_min(1e-300).reshape(-1, *[1] * (found.ndim - 1))
        part = torch.tensordot(votes[owner[chunk]], share, dims=1)
        total = part if total is None else total + part
    model.zero_grad(set_to_none=True)
    assert total is not None
    whole = total / len(patients)
    return {"map": whole.float(), "patients": torch.tensor([len(patients)])}


class _Answer(nn.Module):
    """One number for each example: log odds of the second of two classes, the largest of several, or the sum of all."""

    def __init__(self, model: nn.Module, kind: str) -> None:
        super().__init__()
        self.model, self.kind = model, kind

    def forward(self, x: Tensor) -> Tensor:
        """Shape [b]."""
        said: Tensor = self.model(x)
        if self.kind != "classification":
            return said.sum(1)
        return said[:, 1] - said[:, 0] if said.shape[1] == 2 else said.max(1).values
