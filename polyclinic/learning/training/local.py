"""Local training: the training loop of a site.

An ordinary PyTorch loop without side effects: the same start, data and seeds give bit-identical results. Methods adapt
it by their arguments (a loss, a penalty, a gradient hook), or take individual steps with ``stepper``. No method has its
own loop.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from polyclinic.core.site import Site
from polyclinic.core.tree import Tree
from polyclinic.errors import ConfigError
from polyclinic.learning.batch import Batch
from polyclinic.learning.networks.model_tree import cached_model, params_of
from polyclinic.learning.training.optimizers import SGD, Adam, Optimizer

Loss: TypeAlias = Callable[[nn.Module, Batch], Tensor]
Penalty: TypeAlias = Callable[[nn.Module, Tree], Tensor]
Correct: TypeAlias = Callable[[str, Tensor], Tensor]
Augment: TypeAlias = Callable[[Batch, torch.Generator], Batch]


class Trainable(Protocol):
    """The parts of a task that training needs."""

    def model(self) -> nn.Module: ...
    def loss(self, model: nn.Module, batch: Batch) -> Tensor: ...


@dataclass(frozen=True)
class LocalTraining:
    """Local training of one site in a round.

    Attributes:
        epochs: Passes over the site's data.
        batch_size: Examples in a minibatch. The last one of an epoch may be smaller. It is omitted if it has a single
            example, which batch normalization cannot use, unless the site has no other.
        optimizer: ``sgd``, ``adam`` or ``adamw``. Its state is reset every round.
        lr: Learning rate.
        lr_decay: Factor of the learning rate after every round.
        warmup_rounds: Number of rounds over which the learning rate rises to ``lr``.
        cosine_rounds: Number of rounds over which it falls along half a cosine; usually those of the study.
        steps: Number of optimizer steps, instead of ``epochs``.
        clip_norm: The largest Euclidean norm of a minibatch's gradient.
        amp: Whether to compute in bfloat16 on a GPU.
        penalty: Added to the loss; receives the module and its initial parameters.
        augment: Changes a minibatch before it is used, with the given random generator.
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
        """Return the parameters after training from ``start`` on a site's data.

        Args:
            round: Seeds, with the site, the order of examples and dropout; determines the learning rate.
            role: The role of the data.
            data: Data to use instead of those of ``role``.
            loss: Replaces the task's loss.
            gradient_hook: Edits each gradient by name before the optimizer step.
            trainable: Selects the parameters to train; all others are unchanged.
            after_step: Called with the model after each step, for example to update a second model.
            slot: Name of the model, if several of one task are used at the same time.
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
        model.zero_grad(set_to_none=True)  # frees the gradients before the parameters are copied
        return params_of(model)

    def batches(self, data: Any, rng: torch.Generator, device: str = "cpu") -> Iterator[Batch]:
        """Yield shuffled minibatches of ``data`` for one round."""
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
        """Return a function that takes one optimizer step on the loss that it is given."""
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
        """Return the number of optimizer steps of ``fit`` on ``data``."""
        per_epoch = self._per_epoch(len(data))
        return self.epochs * per_epoch if self.steps is None or not per_epoch else self.steps  # without data, no step

    def rate(self, round: int) -> float:
        """Return the learning rate of a round, counted from 0. It is never 0, so that methods may divide by it."""
        rate = self.lr * self.lr_decay**round
        if round < self.warmup_rounds:
            rate *= (round + 1) / (self.warmup_rounds + 1)
        if self.cosine_rounds:
            rate *= (1 + math.cos(math.pi * min(round, self.cosine_rounds - 1) / self.cosine_rounds)) / 2
        return rate

    def with_penalty(self, penalty: Penalty) -> "LocalTraining":
        """Return a copy with ``penalty`` added to the existing one."""
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
        raise ConfigError(f"unknown optimizer {self.optimizer!r}; use sgd, adam or adamw")

    @contextmanager
    def _precision(self, device: str) -> Iterator[None]:
        if self.amp and device.startswith("cuda"):
            with torch.autocast("cuda", torch.bfloat16):
                yield
        else:
            yield


def plain(local: LocalTraining) -> LocalTraining:
    """Return the settings of ``local`` without those of a subclass, such as privacy."""
    return LocalTraining(**{field.name: getattr(local, field.name) for field in fields(LocalTraining)})


@contextmanager
def seeded(rng: torch.Generator, device: str = "cpu") -> Iterator[None]:
    """Seed PyTorch's global generators (for dropout and the like) from ``rng``, and restore them afterwards."""
    cuda = [torch.device(device)] if device.startswith("cuda") else []
    seed = int(torch.randint(2**62, (), generator=rng))
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        yield


@dataclass(frozen=True)
class Proximal:
    """The FedProx penalty, ``μ/2 · ‖w − w₀‖²`` (Li et al., MLSys 2020, equation 2)."""

    mu: float

    def __call__(self, model: nn.Module, start: Tree) -> Tensor:
        """Return the penalty of the trainable parameters."""
        gaps = [(p - start[name]).square().sum() for name, p in model.named_parameters()]
        return self.mu / 2 * torch.stack(gaps).sum()


@dataclass(frozen=True)
class Both:
    """The sum of two penalties."""

    first: Penalty
    second: Penalty

    def __call__(self, model: nn.Module, start: Tree) -> Tensor:
        """Return the sum of the penalties."""
        return self.first(model, start) + self.second(model, start)
