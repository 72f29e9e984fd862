"""How a site trains: the one training loop of Polyclinic.

An ordinary PyTorch loop, pure when seen from outside: the same start, data and dice give the same bits. Methods bend
it by what they pass (a loss, a penalty, a correction of gradients), or step through it themselves with ``stepper``;
none has a loop of its own.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from polyclinic.core.site import Site
from polyclinic.core.tree import Tree
from polyclinic.errors import ConfigError
from polyclinic.learning.networks.model_tree import params_of
from polyclinic.learning.tasks.task import Batch, cached_model
from polyclinic.learning.training.optimizers import SGD, Adam, Optimizer

Loss: TypeAlias = Callable[[nn.Module, Batch], Tensor]
Penalty: TypeAlias = Callable[[nn.Module, Tree], Tensor]
Correct: TypeAlias = Callable[[str, Tensor], Tensor]
Augment: TypeAlias = Callable[[Batch, torch.Generator], Batch]


class Trainable(Protocol):
    """All that training needs of a task."""

    def model(self) -> nn.Module: ...
    def loss(self, model: nn.Module, batch: Batch) -> Tensor: ...


@dataclass(frozen=True)
class LocalTraining:
    """One site's share of a round.

    Attributes:
        epochs: Passes over the site's data. ``steps``, where given, counts optimizer steps instead.
        batch_size: Examples in a minibatch; the last of an epoch may be smaller, and is left out where it would hold
            one example only (batch normalization cannot use it), unless the site has no other.
        optimizer: ``sgd``, ``adam`` or ``adamw``. Its memory begins anew every round.
        lr: Learning rate. ``decay``: what it is multiplied with after every round.
        warmup_rounds: Over how many rounds the learning rate rises to ``lr``.
        cosine_rounds: Over how many rounds it falls, along half a cosine; usually as many as the study has.
        clip_norm: The largest Euclidean norm of a minibatch's gradient.
        amp: Whether to compute in bfloat16 where the device is a GPU.
        penalty: Added to the loss; receives the module and the parameters it started from.
        augment: Changes a minibatch before it is used, with dice of its own.
    """

    epochs: int = 1
    batch_size: int = 16
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = 0.05
    momentum: float = 0.0
    weight_decay: float = 0.0
    lr_decay: float = 1.0
    warmup_rounds: int = 0
    cosine_rounds: int | None = None
    steps: int | None = None
    clip_norm: float | None = None
    amp: bool = False
    penalty: Penalty | None = None
    augment: Augment | None = None

    def fit(
        self,
        task: Trainable,
        start: Tree,
        site: Site,
        round: int,
        *,
        role: str = "train",
        data: Any = None,
        loss: Loss | None = None,
        gradient_hook: Correct | None = None,
        trainable: Callable[[str], bool] | None = None,
        after_step: Callable[[nn.Module], None] | None = None,
        slot: str = "",
    ) -> Tree:
        """The parameters after training from ``start`` on a site's data.

        Args:
            round: Decides, with the site, the order of examples and the dropout; and the learning rate by ``decay``.
            role: Which of the site's data to train on; or ``data`` instead.
            loss: Replaces the task's.
            gradient_hook: Edits each gradient by name before the optimizer sees it.
            trainable: Which parameters to train; the others keep their values.
            after_step: Called with the model after each step, as for a second model that follows it.
            slot: Names the model, where several of one task live side by side.
        """
        model, data = cached_model(task, start, site.device, slot), site.data[role] if data is None else data
        loss, rng = loss or task.loss, site.rng(round, "train", role, slot)
        origin = {name: leaf.to(site.device) for name, leaf in start.items()} if self.penalty else start
        with seeded(rng, site.device):
            step = self.stepper(model, round, gradient_hook=gradient_hook, trainable=trainable)
            for batch in self.batches(data, rng, site.device):
                with self._precision(site.device):
                    value = loss(model, batch)
                    if self.penalty:
                        value = value + self.penalty(model, origin)
                step(value)
                if after_step:
                    after_step(model)
        model.zero_grad(set_to_none=True)  # so that gradients are gone when what was learned is copied
        return params_of(model)

    def batches(self, data: Any, rng: torch.Generator, device: str = "cpu") -> Iterator[Batch]:
        """Shuffled minibatches of ``data`` for the whole of a site's share of a round."""
        left = self.count(data)
        while left:
            chunks = torch.randperm(len(data), generator=rng).split(self.batch_size)
            for chunk in chunks[: self._per_epoch(len(data))][:left]:
                batch = data[chunk]
                if self.augment:
                    batch = self.augment(batch, rng)
                left -= 1
                yield batch[0].to(device), batch[1].to(device)

    def stepper(
        self,
        model: nn.Module,
        round: int = 0,
        *,
        gradient_hook: Correct | None = None,
        trainable: Callable[[str], bool] | None = None,
    ) -> Callable[[Tensor], None]:
        """A function that takes one optimizer step down the loss it is given."""
        named = [
            (name, p)
            for name, p in model.named_parameters()
            if p.requires_grad and (trainable is None or trainable(name))
        ]
        parameters = [p for _, p in named]
        optimizer = self._optimizer(parameters, self.rate(round))

        def step(loss: Tensor) -> None:
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            if gradient_hook:
                for name, p in named:
                    if p.grad is not None:
                        p.grad = gradient_hook(name, p.grad)
            if self.clip_norm is not None:
                nn.utils.clip_grad_norm_(parameters, self.clip_norm)
            optimizer.step()

        return step

    def count(self, data: Any) -> int:
        """How many optimizer steps ``fit`` takes on ``data``."""
        whole = self._per_epoch(len(data))
        return self.epochs * whole if self.steps is None or not whole else self.steps  # nothing to learn from: no step

    def rate(self, round: int) -> float:
        """The learning rate in a round, the first of which is 0. Never 0, so that methods may divide by it."""
        rate = self.lr * self.lr_decay**round
        if round < self.warmup_rounds:
            rate *= (round + 1) / (self.warmup_rounds + 1)
        if self.cosine_rounds:
            rate *= (1 + math.cos(math.pi * min(round, self.cosine_rounds - 1) / self.cosine_rounds)) / 2
        return rate

    def with_penalty(self, penalty: Penalty) -> "LocalTraining":
        """The same, with ``penalty`` added to whatever is added already."""
        return replace(self, penalty=penalty if self.penalty is None else Both(self.penalty, penalty))

    def _per_epoch(self, examples: int) -> int:
        batches = -(-examples // self.batch_size)
        return batches - 1 if batches > 1 and examples % self.batch_size == 1 else batches

    def _optimizer(self, parameters: Sequence[Tensor], lr: float) -> Optimizer:
        match self.optimizer:
            case "sgd":
                return SGD(parameters, lr, self.momentum, self.weight_decay)
            case "adam" | "adamw":
                return Adam(parameters, lr, self.weight_decay, apart=self.optimizer == "adamw")
        raise ConfigError(f"no optimizer is called {self.optimizer!r}; there are sgd, adam, adamw")

    @contextmanager
    def _precision(self, device: str) -> Iterator[None]:
        if self.amp and device.startswith("cuda"):
            with torch.autocast("cuda", torch.bfloat16):
                yield
        else:
            yield


@contextmanager
def seeded(rng: torch.Generator, device: str = "cpu") -> Iterator[None]:
    """Draws PyTorch's own randomness (dropout and the like) from ``rng``, and leaves the global one as it was."""
    cuda = [torch.device(device)] if device.startswith("cuda") else []
    seed = int(torch.randint(2**62, (), generator=rng))
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        yield


@dataclass(frozen=True)
class Proximal:
    """The FedProx penalty, μ/2 · ‖w − w₀‖² (Li et al., MLSys 2020, equation 2)."""

    mu: float

    def __call__(self, model: nn.Module, start: Tree) -> Tensor:
        """For the trainable parameters only."""
        gaps = [(p - start[name]).square().sum() for name, p in model.named_parameters()]
        return self.mu / 2 * torch.stack(gaps).sum()


@dataclass(frozen=True)
class Both:
    """The sum of two penalties."""

    first: Penalty
    second: Penalty

    def __call__(self, model: nn.Module, start: Tree) -> Tensor:
        """The sum."""
        return self.first(model, start) + self.second(model, start)
