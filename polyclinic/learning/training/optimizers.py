"""SGD, Adam and AdamW through PyTorch's functions instead of its optimizer classes.

The first optimizer object of a process makes PyTorch import its compiler, which is not needed: it costs two seconds and
70 MB in every worker and at every site. The results are bit-identical to those of the classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from polyclinic.core.tree import Tree
from polyclinic.errors import ConfigError

Memory = MutableMapping[str, Tree]
_memory: ContextVar[Memory | None] = ContextVar("memory", default=None)


@contextmanager
def optimizer_memory(memory: Memory) -> Iterator[None]:
    """Context in which local training continues with the optimizer states in ``memory``, and leaves its own there."""
    token = _memory.set(memory)
    try:
        yield
    finally:
        _memory.reset(token)


def current_memory() -> Memory | None:
    """Return the optimizer states of the current site; None outside of ``optimizer_memory``."""
    return _memory.get()


@dataclass
class Optimizer(ABC):
    """Updates its parameters from their gradients."""

    parameters: Sequence[Tensor]
    lr: float

    @abstractmethod
    def step(self) -> None:
        """Update every parameter that has a gradient."""

    @abstractmethod
    def state(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return copies of the optimizer's state, on the CPU, by the name of its kind and of its parameter.

        Args:
            names: The names of the parameters, in their order.
        """

    @abstractmethod
    def load(self, state: Tree, names: Sequence[str]) -> None:
        """Continue with ``state``, as ``state`` returned it. Parameters without a state begin anew.

        Raises:
            ConfigError: If a shape differs from that of its parameter.
        """

    def zero_grad(self) -> None:
        """Clear the gradients."""
        for p in self.parameters:
            p.grad = None

    def due(self) -> tuple[list[int], list[Tensor], list[Tensor]]:
        """Return the indices of the parameters with a gradient, these parameters, and their gradients."""
        pending = [(i, p, p.grad) for i, p in enumerate(self.parameters) if p.grad is not None]
        return [i for i, _, _ in pending], [p for _, p, _ in pending], [g for _, _, g in pending]


@dataclass
class SGD(Optimizer):
    """Stochastic gradient descent, with momentum, which may be Nesterov's."""

    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    _buffers: dict[int, Tensor | None] = field(default_factory=dict)

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        places, parameters, gradients = self.due()
        if parameters and not (self.momentum or self.weight_decay):
            torch._foreach_add_(parameters, gradients, alpha=-self.lr)  # all that PyTorch's function does, in one call
            return
        buffers = [self._buffers.get(i) for i in places]
        sgd(
            parameters,
            gradients,
            buffers,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            lr=self.lr,
            dampening=0.0,
            nesterov=self.nesterov,
            maximize=False,
            foreach=_foreach(parameters),
        )
        if self.momentum:
            self._buffers |= zip(places, buffers, strict=True)

    def state(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the momentum of each parameter that was updated."""
        return {f"momentum/{names[i]}": _copied(b) for i, b in sorted(self._buffers.items()) if b is not None}

    def load(self, state: Tree, names: Sequence[str]) -> None:
        """Continue with the momentum in ``state``."""
        for i, p in enumerate(self.parameters):
            if (buffer := state.get(f"momentum/{names[i]}")) is not None:
                self._buffers[i] = _fitting(buffer, p, names[i])


@dataclass
class Adam(Optimizer):
    """Adam (Kingma and Ba, ICLR 2015), or AdamW (Loshchilov and Hutter, ICLR 2019) if weight decay is ``apart``."""

    weight_decay: float = 0.0
    apart: bool = False
    _moments: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        places, parameters, gradients = self.due()
        for i, p in zip(places, parameters, strict=True):
            if i not in self._moments:
                self._moments[i] = torch.zeros_like(p), torch.zeros_like(p), torch.tensor(0.0)
        first, second, steps = ([self._moments[i][k] for i in places] for k in range(3))
        adam(
            parameters,
            gradients,
            first,
            second,
            [],
            steps,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=self.lr,
            weight_decay=self.weight_decay,
            eps=1e-8,
            maximize=False,
            decoupled_weight_decay=self.apart,
            foreach=_foreach(parameters),
        )

    def state(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the moments and the number of steps of each parameter that was updated."""
        kinds = ("first", "second", "steps")
        return {
            f"{kind}/{names[i]}": _copied(leaf)
            for i, leaves in sorted(self._moments.items())
            for kind, leaf in zip(kinds, leaves, strict=True)
        }

    def load(self, state: Tree, names: Sequence[str]) -> None:
        """Continue with the moments in ``state``."""
        for i, p in enumerate(self.parameters):
            if f"steps/{names[i]}" in state:
                first, second = (_fitting(state[f"{kind}/{names[i]}"], p, names[i]) for kind in ("first", "second"))
                self._moments[i] = first, second, state[f"steps/{names[i]}"].clone()


def _foreach(parameters: Sequence[Tensor]) -> bool | None:
    """Return PyTorch's choice for a CPU, which takes it longer than the step of a small model, and None for others."""
    return False if all(p.device.type == "cpu" for p in parameters) else None


def _copied(leaf: Tensor) -> Tensor:
    return leaf.detach().to("cpu", copy=True).contiguous()


def _fitting(leaf: Tensor, parameter: Tensor, name: str) -> Tensor:
    if leaf.shape != parameter.shape:
        raise ConfigError(
            f"keep_optimizer: the kept state of {name} has shape {tuple(leaf.shape)}, and the parameter has "
            f"{tuple(parameter.shape)}: this method trains networks of different shapes, so set keep_optimizer = false"
        )
    return leaf.to(parameter.device, copy=True)
