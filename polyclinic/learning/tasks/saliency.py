"""Mean attribution maps over a site's patients: the share of a model's attribution at each place of its input.

Sundararajan, Taly, Yan, "Axiomatic Attribution for Deep Networks", ICML 2017, https://arxiv.org/abs/1703.01365,
equation 1, as captum computes it, with an input of zeros as baseline. Each example's absolute attributions are summed
over channels and normalized to sum 1, then averaged over a patient's examples and over patients. Each patient therefore
has equal weight, and no map of a single example leaves the site.

For images, the mean map is meaningful if they are registered or cropped alike (for example, centered on a nodule).
Otherwise it only shows the region of the frame that the model uses.
"""

from typing import Any

import torch
from torch import Tensor, nn

from polyclinic.core.execution import Refused
from polyclinic.core.tree import Tree
from polyclinic.learning.batch import chunks
from polyclinic.learning.networks.model_tree import cached_model
from polyclinic.learning.tasks.task import Task

KINDS = ("classification", "multilabel", "regression", "survival")
FEWEST = 10


def saliency(
    task: Task, params: Tree, data: Any, device: str = "cpu", *, fewest: int = FEWEST, steps: int = 16, size: int = 32
) -> Tree:
    """Compute the mean attribution map of the model with ``params`` over the patients of ``data``.

    Args:
        fewest: The minimum number of patients.
        steps: Steps of the path integral from zeros to the example.
        size: Examples per batch.

    Returns:
        ``map`` [*spatial] or [F], nonnegative with sum 1; and ``patients``, the number of patients.

    Raises:
        Refused: If there are too few patients, the kind of task is not supported, or captum is not installed.
    """
    names = list(getattr(data, "patients", range(len(data))))
    patients = list(dict.fromkeys(names))
    if len(patients) < fewest:
        raise Refused(f"{len(patients)} patients, but a mean map requires at least {fewest}")
    if task.kind not in KINDS:
        raise Refused(f"a task of kind {task.kind!r} cannot be explained; the kinds are {', '.join(KINDS)}")
    try:
        from captum.attr import IntegratedGradients
    except ImportError:
        raise Refused("explanations need captum: pip install 'polyclinic[explain]'") from None
    model = cached_model(task, params, device).eval()
    gradients = IntegratedGradients(_Answer(model, task.kind))
    number = {patient: i for i, patient in enumerate(patients)}
    owner = torch.tensor([number[name] for name in names])
    total: Tensor | None = None
    votes = 1.0 / torch.bincount(owner).double()  # the weight of an example within its patient
    for chunk in chunks(data, size):
        x = data[chunk][0].to(device)
        maps = gradients.attribute(x, n_steps=steps, internal_batch_size=4 * size).detach().abs().double().cpu()
        maps = maps.sum(1) if maps.ndim > 2 else maps
        weight = maps.flatten(1).sum(1)
        share = maps / weight.clamp_min(1e-300).reshape(-1, *[1] * (maps.ndim - 1))
        part = torch.tensordot(votes[owner[chunk]], share, dims=1)
        total = part if total is None else total + part
    model.zero_grad(set_to_none=True)
    assert total is not None
    mean = total / len(patients)
    return {"map": mean.float(), "patients": torch.tensor([len(patients)])}


class _Answer(nn.Module):
    """One number per example: log odds of the second of two classes, the largest of several logits, or the sum."""

    def __init__(self, model: nn.Module, kind: str) -> None:
        super().__init__()
        self.model, self.kind = model, kind

    def forward(self, x: Tensor) -> Tensor:
        """Return the explained number. Shape [b]."""
        outputs: Tensor = self.model(x)
        if self.kind != "classification":
            return outputs.sum(1)
        return outputs[:, 1] - outputs[:, 0] if outputs.shape[1] == 2 else outputs.max(1).values
