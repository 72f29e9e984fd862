"""Interface of a task: a network, its loss, its outputs and their scores."""

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
    """What a site learns, in terms of tensors and losses. Tasks are independent of federated learning.

    Attributes:
        network: Builds the model. Usually a ``Network``; any hashable callable that returns a module is allowed.
    """

    network: Network

    kind: ClassVar[str]

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the training loss of one (inputs, targets). Shape []."""

    @abstractmethod
    def outputs(self, model: nn.Module, batch: Batch, *, full_metrics: bool = False) -> dict[str, Tensor]:
        """Return predictions and targets of each example: tensors of shape [b, ...] by name.

        Args:
            full_metrics: Whether to include slow metrics, such as surface distances, as for a final test.
        """

    @abstractmethod
    def summary(self, outputs: Tree) -> dict[str, float]:
        """Compute scores of one site's ``outputs``, by name. Undefined scores are omitted."""

    def guess(self, score: Tensor) -> float:
        """Return the uninformed prediction that replaces non-finite entries of ``score`` [n, ...]."""
        return 0.0

    def model(self) -> nn.Module:
        """Build a model with random parameters, without changing the global random state."""
        with torch.random.fork_rng(devices=[]):
            return self.network()

    def first(self, seed: int = 0) -> Tree:
        """Return the initial parameters of a run with ``seed``."""
        return initial(self.network, seed)


_built = threading.local()


def cached_model(task: Any, params: Tree, device: str = "cpu", slot: str = "") -> nn.Module:
    """Return the thread's model for ``task`` with ``params`` loaded, in training mode.

    Models are built once and reused: the next call with the same task and ``slot`` changes the model that this call
    returned. Use a separate slot for each model of a task that is needed at the same time.
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
    """Tests whether a tensor belongs to a normalization layer of the task's model, by module type and not by name."""

    task: Task

    def __call__(self, name: str) -> bool:
        """Return whether the tensor ``name`` does."""
        return name in _inspected(self.task).normalization


@dataclass(frozen=True)
class InRunningStatistics:
    """Tests whether a tensor is a running statistic of batch normalization."""

    task: Task

    def __call__(self, name: str) -> bool:
        """Return whether the tensor ``name`` is."""
        return name in _inspected(self.task).running


@dataclass(frozen=True)
class InHead:
    """Tests whether a tensor belongs to the model's head, which maps a representation to a prediction."""

    task: Task

    def __call__(self, name: str) -> bool:
        """Return whether the tensor ``name`` does."""
        return self.task.network.in_head(name)


@dataclass(frozen=True)
class InEncoder:
    """Tests whether a tensor precedes the representation: the encoder of a U-Net, else all but the head."""

    task: Task

    def __call__(self, name: str) -> bool:
        """Return whether the tensor ``name`` does."""
        return self.task.network.in_encoder(name)


@dataclass(frozen=True)
class Not:
    """Negates another test of tensor names."""

    choice: Any

    def __call__(self, name: str) -> bool:
        """Return whether the other test is false for ``name``."""
        return not self.choice(name)


def _inspected(task: Task) -> Any:
    inspections: dict[Any, Any] = _built.__dict__.setdefault("inspected", {})
    if task not in inspections:
        inspections[task] = inspect(task.model())
    return inspections[task]


def represent(task: Task, model: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the representation that enters the head, and the model's prediction.

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
    """Compute the area under the ROC curve of ``score`` [n] for the truth ``positive`` [n]; ties count half.

    Returns None if only one class is present.
    """
    positive = positive.bool()
    n1, n0 = int(positive.sum()), int((~positive).sum())
    if not n1 or not n0:
        return None
    _, inverse, counts = torch.unique(score.double(), return_inverse=True, return_counts=True)
    ranks = counts.cumsum(0).double() - (counts - 1).double() / 2  # the mean rank of tied values
    return float((ranks[inverse][positive].sum() - n1 * (n1 + 1) / 2) / (n1 * n0))
