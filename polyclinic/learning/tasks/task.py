"""Interface of a task: a network, its loss, its outputs and their scores."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from polyclinic.core.tree import Tree
from polyclinic.learning.batch import Batch
from polyclinic.learning.networks.model_tree import Inspection, initial, inspect
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.own_metrics import value_of


@dataclass(frozen=True)
class Task(ABC):
    """A learning task in terms of tensors and losses, independent of federated learning.

    Attributes:
        network: Builds the model. Usually a ``Network``; any hashable callable that returns a module is allowed.
        metrics: Names of metrics of packages, which are computed in addition to the task's own.
    """

    network: Network
    metrics: tuple[str, ...] = field(default=(), kw_only=True)

    kind: ClassVar[str]

    @property
    def by_example(self) -> bool:
        """Whether the loss of a batch is a mean over its examples."""
        return True

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the training loss of one (inputs, targets). Shape []."""

    @abstractmethod
    def outputs(self, model: nn.Module, batch: Batch, *, full_metrics: bool = False) -> dict[str, Tensor]:
        """Return predictions and targets of each example: tensors of shape [b, ...] by name.

        Args:
            full_metrics: Whether to include slow metrics, such as surface distances, as for a final test.
        """

    def outputs_of(
        self, model: nn.Module, data: Any, index: Tensor, device: str = "cpu", *, full_metrics: bool = False
    ) -> dict[str, Tensor]:
        """Return the outputs of the examples of ``data`` at ``index``. A task may read more of them than a batch."""
        x, y = data[index]
        return self.outputs(model, (x.to(device), y.to(device)), full_metrics=full_metrics)

    @abstractmethod
    def summary(self, outputs: Tree) -> dict[str, float]:
        """Compute scores of one site's ``outputs``, by name. Undefined scores are omitted."""

    def scores(self, outputs: Tree) -> dict[str, float]:
        """Compute ``summary`` and the metrics of packages."""
        own = {name: self._own_score(name, outputs) for name in self.metrics}
        return self.summary(outputs) | {name: value for name, value in own.items() if math.isfinite(value)}

    def _own_score(self, name: str, outputs: Tree) -> float:
        if "score" in outputs:
            return value_of(name, outputs["score"].double().numpy(), outputs["target"].numpy())
        values = outputs[name].double()  # of each image and class
        known = values.isfinite() & ~outputs["absent"].bool() if "absent" in outputs else values.isfinite()
        return float(values[known].mean())

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

    @property
    def label_count(self) -> int:
        """Number of classes, labels or values of a target."""
        return int(self.network.outputs)

    def with_network(self, network: Any) -> Self:
        """Return a copy of the task with another network."""
        return replace(self, network=network)


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


@lru_cache(maxsize=64)
def _inspected(task: Task) -> Inspection:
    return inspect(task.model())
