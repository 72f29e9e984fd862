"""SGD, Adam and AdamW through PyTorch's functions instead of its optimizer classes.

The first optimizer object of a process makes PyTorch import its compiler, which is not needed: it costs two seconds and
70 MB in every worker and at every site. The results are bit-identical to those of the classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd


@dataclass
class Optimizer(ABC):
    """Updates its parameters from their gradients."""

    parameters: Sequence[Tensor]
    lr: float

    @abstractmethod
    def step(self) -> None:
        """Update every parameter that has a gradient."""

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
    """Stochastic gradient descent, with momentum."""

    momentum: float = 0.0
    weight_decay: float = 0.0
    _buffers: dict[int, Tensor | None] = field(default_factory=dict)

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        places, parameters, gradients = self.due()
        buffers = [self._buffers.get(i) for i in places]
        sgd(
            parameters,
            gradients,
            buffers,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            lr=self.lr,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )
        if self.momentum:
            self._buffers |= zip(places, buffers, strict=True)


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
        )
