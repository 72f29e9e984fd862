"""Networks split into pieces: sequential layers, divided so that pieces can be executed in different places."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from polyclinic.core.tree import Tree
from polyclinic.errors import ConfigError
from polyclinic.learning.networks.model_tree import cached_model, params_of, trainable
from polyclinic.learning.networks.small_networks import Classifier
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining


class Links(nn.Module):
    """Consecutive layers of a chain, under their names in the complete network."""

    def __init__(self, whole: Classifier, start: int, stop: int) -> None:
        super().__init__()
        layers = list(whole.encoder.named_children())
        self.encoder = nn.ModuleDict(dict(layers[start:stop]))
        self.head = whole.head if stop > len(layers) else None

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layers in order."""
        for layer in self.encoder.values():
            x = layer(x)
        return x if self.head is None else self.head(x)


@dataclass(frozen=True)
class Piece:
    """The layers ``start`` to ``stop`` of a task's network, which is a chain; the head is the last layer.

    Like a task's complete model, a piece can be used with ``cached_model``.
    """

    task: Task
    start: int
    stop: int

    def model(self) -> nn.Module:
        """Build the piece with random parameters."""
        return Links(_chain(self.task), self.start, self.stop)

    def of(self, params: Tree) -> Tree:
        """Return the piece's part of ``params``."""
        return {name: leaf for name, leaf in params.items() if name in _names(self)}

    def say(self, params: Tree, x: Tensor, device: str = "cpu") -> Tensor:
        """Return the output of the piece with its part of ``params`` for ``x``, in training mode. Shape [b, ...]."""
        with torch.no_grad():
            output: Tensor = cached_model(self, self.of(params), device)(_fresh(x, device))
        return output.cpu()

    def learn(
        self,
        params: Tree,
        x: Tensor,
        loss: Callable[[Tensor], Tensor],
        local: LocalTraining,
        round: int,
        device: str = "cpu",
    ) -> tuple[Tree, Tensor]:
        """Take one optimizer step on ``loss``, a function of the piece's output for ``x``.

        Returns:
            ``params`` with the piece's part after the step, and the gradient of the loss with respect to ``x``.
        """
        model, inside = cached_model(self, self.of(params), device), _fresh(x, device).requires_grad_()
        value = loss(model(inside))
        if trainable(model):
            local.stepper(model, round)(value)
        else:
            value.backward()  # type: ignore[no-untyped-call]
        assert inside.grad is not None
        return {**params, **params_of(model)}, inside.grad.cpu()


def _fresh(x: Tensor, device: str) -> Tensor:
    """Copy ``x`` to contiguous memory of its own: sums over views or other axis orders may be rounded differently."""
    return x.detach().to(device, copy=True, memory_format=torch.contiguous_format)


@lru_cache(maxsize=64)
def length(task: Task) -> int:
    """Return the number of layers of the chain, including its head.

    Raises:
        ValueError: If the task's network is not a chain.
    """
    return len(list(_chain(task).encoder.children())) + 1


@lru_cache(maxsize=64)
def first_bend(task: Task) -> int:
    """Return the number of layers up to and including the first nonlinear one."""
    layers = list(_chain(task).encoder.children())
    return 1 + next((i for i, layer in enumerate(layers) if isinstance(layer, nn.ReLU)), len(layers) - 1)


@lru_cache(maxsize=64)
def _names(piece: Piece) -> frozenset[str]:
    return frozenset(params_of(piece.model()))


def _chain(task: Task) -> Classifier:
    with torch.random.fork_rng(devices=[]):
        whole = task.model()
    if not isinstance(whole, Classifier) or not isinstance(whole.encoder, nn.Sequential):
        raise ConfigError(
            f"only a network of sequential layers can be split: choose mlp or cnn, not {task.network.name}"
        )
    return whole
