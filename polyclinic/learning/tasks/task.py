"""A task: a network, what it means for it to be wrong, and what it says of an example."""

import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from polyclinic.core.tree import Tree
from polyclinic.learning.networks.model_tree import initial, inspect, load
from polyclinic.learning.networks.network_catalog import Network

Batch: TypeAlias = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task(ABC):
    """What a site learns. Tasks know tensors and losses; they know nothing of federations.

    Attributes:
        network: Builds the model. Usually a ``Network``; any hashable callable that returns a module will do.
    """

    network: Network

    kind: ClassVar[str]

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """What training makes small, for one (inputs, targets). Shape []."""

    @abstractmethod
    def outputs(self, model: nn.Module, batch: Batch, *, full_metrics: bool = False) -> dict[str, Tensor]:
        """What the model says of each example, and the truth: tensors of shape [b, ...] by name.

        Args:
            full_metrics: Whether to add what takes long, such as distances between surfaces; as for a final test.
        """

    @abstractmethod
    def summary(self, outputs: Tree) -> dict[str, float]:
        """Scores of one site's ``outputs``, by name. A score that is undefined there is left out."""

    def guess(self, score: Tensor) -> float:
        """What stands in ``score`` [n, ...] for an answer that is no number: that of somebody who knows nothing."""
        return 0.0

    def model(self) -> nn.Module:
        """A new model with random parameters. The global dice stay as they were."""
        with torch.random.fork_rng(devices=[]):
            return self.network()

    def first(self, seed: int = 0) -> Tree:
        """The parameters that a run with ``seed`` begins from."""
        return initial(self.network, seed)


_built = threading.local()


def cached_model(task: Any, params: Tree, device: str = "cpu", slot: str = "") -> nn.Module:
    """The worker's one model for ``task``, carrying ``params``, in training mode.

    Models are built once and refilled. So the next call with the same task and ``slot`` changes the model that
    this call returned; name a slot for each model that must live beside another of the same task.
    """
    models: dict[Any, nn.Module] = _built.__dict__.setdefault("models", {})
    if (key := (task, device, slot)) not in models:
        if len(models) >= 16:
            models.pop(next(iter(models)))
        models[key] = task.model().to(device)
    model = load(models[key], params).train()
    model.zero_grad(set_to_none=True)
    return model


@dataclass(frozen=True)
class InNormalization:
    """Whether a tensor lies in a normalization layer of the task's model. Found by module type, not by name."""

    task: Task

    def __call__(self, name: str) -> bool:
        """Whether ``name`` does."""
        return name in _inspected(self.task).normalization


@dataclass(frozen=True)
class InRunningStatistics:
    """Whether a tensor is a running statistic of batch normalization."""

    task: Task

    def __call__(self, name: str) -> bool:
        """Whether ``name`` is."""
        return name in _inspected(self.task).running


@dataclass(frozen=True)
class InHead:
    """Whether a tensor lies in the model's head, which turns a representation into a prediction."""

    task: Task

    def __call__(self, name: str) -> bool:
        """Whether ``name`` does."""
        return self.task.network.in_head(name)


@dataclass(frozen=True)
class InEncoder:
    """Whether a tensor lies before the representation: in a U-Net the way down, else all but the head."""

    task: Task

    def __call__(self, name: str) -> bool:
        """Whether ``name`` does."""
        return self.task.network.in_encoder(name)


@dataclass(frozen=True)
class Not:
    """The tensors that another choice leaves out."""

    choice: Any

    def __call__(self, name: str) -> bool:
        """Whether ``name`` is not chosen."""
        return not self.choice(name)


def _inspected(task: Task) -> Any:
    found: dict[Any, Any] = _built.__dict__.setdefault("inspected", {})
    if task not in found:
        found[task] = inspect(task.model())
    return found[task]


def represent(task: Task, model: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The representation that enters the head, and the prediction that leaves the model.

    Returns:
        h [b, features, ...] and z [b, outputs, ...], from one forward pass.
    """
    entering: list[Tensor] = []
    head = next(m for name, m in model.named_modules() if task.network.in_head(f"{name}."))
    hook = head.register_forward_pre_hook(lambda _, given: entering.append(given[0]))
    try:
        prediction = model(inputs)
    finally:
        hook.remove()
    return entering[-1], prediction if isinstance(prediction, Tensor) else prediction[0]


def auc(score: Tensor, positive: Tensor) -> float | None:
    """The area under the ROC curve of ``score`` [n] for the truth ``positive`` [n], ties counted half.

    None where only one class is present.
    """
    positive = positive.bool()
    n1, n0 = int(positive.sum()), int((~positive).sum())
    if not n1 or not n0:
        return None
    _, inverse, counts = torch.unique(score.double(), return_inverse=True, return_counts=True)
    ranks = counts.cumsum(0).double() - (counts - 1).double() / 2  # the mean rank of tied values
    return float((ranks[inverse][positive].sum() - n1 * (n1 + 1) / 2) / (n1 * n0))
