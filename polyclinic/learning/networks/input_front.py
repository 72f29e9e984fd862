"""A network whose inputs pass through another module first, and whose tensors keep their names.

Harmonization is part of the model: whatever prepares an image at training prepares it at prediction, wherever the
model goes. So a method that harmonizes replaces its task's network by a fronted one and says that it predicts with it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor, nn

from polyclinic.core import tree
from polyclinic.core.tree import Tree
from polyclinic.learning.networks.composite import Composed, predicting_with
from polyclinic.learning.networks.model_tree import initial
from polyclinic.learning.tasks.task import Task

T = TypeVar("T", bound=Task)


@dataclass(frozen=True)
class Fronted(Composed):
    """``network`` with ``front`` before it. The front's tensors are called ``front.…``.

    Attributes:
        front: Builds the module that inputs pass through; hashable.
    """

    front: Callable[[], nn.Module]

    def __call__(self) -> nn.Module:
        """A new module with random parameters."""
        model = self.network()
        model.add_module("front", self.front())
        model.register_forward_pre_hook(_enter)
        return model

    def in_encoder(self, name: str) -> bool:
        """Whether a tensor belongs to the network's encoder."""
        return not in_front(name) and self.network.in_encoder(name)


def fronted(task: T, front: Callable[[], nn.Module]) -> T:
    """``task`` with a front before its network."""
    return predicting_with(task, Fronted(task.network, front))


def in_front(name: str) -> bool:
    """Whether a tensor belongs to the front."""
    return name.startswith("front.")


def with_front(task: Task, params: Tree, leaves: Tree | None = None) -> Tree:
    """``params`` of the network alone, completed by the front's ``leaves``, or by those that it is built with."""
    leaves = tree.select(initial(task.network, 0), in_front) if leaves is None else tree.prefixed("front", leaves)
    return {**tree.select(params, lambda name: not in_front(name)), **leaves}


def _enter(model: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (model.get_submodule("front")(given[0]), *given[1:])
