"""Network with an input module in front, whose other tensors keep their names.

Harmonization is part of the model, so that training and prediction prepare images in the same way. A method that
harmonizes therefore replaces its task's network by one with a front and declares this task as its prediction task.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor, nn

from polyclinic.core import tree
from polyclinic.core.tree import Tree
from polyclinic.learning.networks.composite import Composed
from polyclinic.learning.networks.model_tree import initial
from polyclinic.learning.tasks.task import Task

T = TypeVar("T", bound=Task)


@dataclass(frozen=True)
class Fronted(Composed):
    """``network`` preceded by ``front``, whose tensors are named ``front.…``.

    Attributes:
        front: Builds the module that processes the inputs; hashable.
    """

    front: Callable[[], nn.Module]

    def __call__(self) -> nn.Module:
        """Build a module with random parameters."""
        model = self.network()
        model.add_module("front", self.front())
        model.register_forward_pre_hook(_enter)
        return model

    def in_encoder(self, name: str) -> bool:
        """Return whether a tensor belongs to the network's encoder."""
        return not in_front(name) and self.network.in_encoder(name)


def fronted(task: T, front: Callable[[], nn.Module]) -> T:
    """Return ``task`` with a front before its network."""
    return task.with_network(Fronted(task.network, front))


def in_front(name: str) -> bool:
    """Return whether a tensor belongs to the front."""
    return name.startswith("front.")


def with_front(task: Task, params: Tree, leaves: Tree | None = None) -> Tree:
    """Add the front's ``leaves``, by default its initial ones, to the ``params`` of the network alone."""
    leaves = tree.select(initial(task.network, 0), in_front) if leaves is None else tree.prefixed("front", leaves)
    return {**tree.select(params, lambda name: not in_front(name)), **leaves}


def _enter(model: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (model.get_submodule("front")(given[0]), *given[1:])
