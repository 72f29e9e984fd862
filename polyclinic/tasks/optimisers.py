"""SGD, Adam and AdamW: PyTorch's own arithmetic, through its functions rather than its classes.

The first optimiser object of a process makes PyTorch import its compiler, which is not used here: two seconds and 70 MB
in every worker and at every hospital. The bits are those of the classes, whose names the functions bear.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd


class Optimiser(Protocol):
    """Steps its parameters down their gradients."""

    def step(self) -> None: ...


@dataclass
class SGD:
    """Stochastic gradient descent, with momentum."""

    parameters: Sequence[Tensor]
    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    _buffers: dict[int, Tensor | None] = field(default_factory=dict)

    @torch.no_grad()
    def step(self) -> None:
        """One step of every parameter that has a gradient."""
        mine = [(i, p, p.grad) for i, p in enumerate(self.parameters) if p.grad is not None]
        buffers = [self._buffers.get(i) for i, _, _ in mine]
        sgd([p for _, p, _ in mine], [g for _, _, g in mine], buffers, weight_decay=self.weight_decay,
            momentum=self.momentum, lr=self.lr, dampening=0.0, nesterov=False, maximize=False)  # fmt: skip
        if self.momentum:
            self._buffers |= {i: buffer for (i, _, _), buffer in zip(mine, buffers, strict=True)}


@dataclass
class Adam:
    """Adam (Kingma and Ba, ICLR 2015); AdamW (Loshchilov and Hutter, ICLR 2019) where weight decay is ``apart``."""

    parameters: Sequence[Tensor]
    lr: float
    weight_decay: float = 0.0
    apart: bool = False
    _moments: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    @torch.no_grad()
    def step(self) -> None:
        """One step of every parameter that has a gradient."""
        mine = [(i, p, p.grad) for i, p in enumerate(self.parameters) if p.grad is not None]
        for i, p, _ in mine:
            if i not in self._moments:
                self._moments[i] = torch.zeros_like(p), torch.zeros_like(p), torch.tensor(0.0)
        first, second, steps = ([self._moments[i][k] for i, _, _ in mine] for k in range(3))
        adam([p for _, p, _ in mine], [g for _, _, g in mine], first, second, [], steps, amsgrad=False, beta1=0.9,
             beta2=0.999, lr=self.lr, weight_decay=self.weight_decay, eps=1e-8, maximize=False,
             decoupled_weight_decay=self.apart)  # fmt: skip
