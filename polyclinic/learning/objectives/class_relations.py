"""Relations between classes in a model's predictions, and selection of reliable predictions.

From FedIRM: Liu, Yang, Dou and Heng, MICCAI 2021, equations 3 to 6. https://arxiv.org/abs/2106.08600.
"""

import math
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from polyclinic.core.aggregates import ElementwiseMean
from polyclinic.core.tree import Tree
from polyclinic.learning.objectives.distillation_loss import answers
from polyclinic.learning.tasks.task import Task


def matrix(logits: Tensor, of: Tensor, temperature: float = 2.0) -> Tensor:
    """Return the relation matrix [C, C]: row c is softmax(mean logits of class c / T).

    Args:
        logits: [b, C].
        of: [b, C], 1 if an example is of a class. A class without examples has a uniform row.
        temperature: T; 2 in the paper.
    """
    mean = of.T @ logits / of.sum(0).clamp_min(1e-8)[:, None]
    return (mean / temperature).softmax(1)


def mismatch(own: Tensor, shared: Tensor, present: Tensor) -> Tensor:
    """Return half the symmetric KL divergence of two relation matrices by row, averaged over ``present`` classes."""
    own, shared = own.clamp_min(1e-8), shared.clamp_min(1e-8)
    each = ((own - shared) * (own.log() - shared.log())).sum(1) / 2
    return (each * present).sum() / present.sum().clamp_min(1)


def reliable(logits: Tensor, passes: Tensor, confidence: float, entropy: float) -> Tensor:
    """Return the reliable predicted class of each example as one-hot [b, C]; a row of 0 if it is not reliable.

    Args:
        logits: [b, C].
        passes: [T, b, C], logits of T forward passes with dropout; their mean must not be too uncertain.
        confidence: The least probability of the most likely class.
        entropy: The largest entropy of the mean over passes, as a fraction of ln C.
    """
    p, q = logits.softmax(1), passes.mean(0).softmax(1)
    uncertainty = -(q * q.clamp_min(1e-8).log()).sum(1)
    sure = (p.amax(1) >= confidence) & (uncertainty < entropy * math.log(p.shape[1]))
    return F.one_hot(p.argmax(1), p.shape[1]) * sure[:, None].to(p)


def relation_of(task: Task, params: Tree, data: Any, temperature: float, device: str = "cpu") -> ElementwiseMean:
    """Return the relation matrix on labeled ``data`` for merging over sites; only rows of present classes count."""
    classes = task.network.outputs
    logits, targets = answers(task, params, data, device)
    of = F.one_hot(targets, classes).float()
    present = (of.sum(0) > 0).float()[:, None].repeat(1, classes)
    return ElementwiseMean.of({"matrix": matrix(logits, of, temperature)}, {"matrix": present})
