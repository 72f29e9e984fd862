"""Local training: the training loop of a site.

An ordinary PyTorch loop without side effects: the same start, data and seeds give bit-identical results. Methods adapt
it by their arguments (a loss, a penalty, a gradient hook), or take individual steps with ``stepper``. No method has its
own loop.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal, Protocol, TypeAlias
from weakref import WeakSet

import torch
from torch import Tensor, nn

from polyclinic.core import tree
from polyclinic.core.site import Compute, Site
from polyclinic.core.tree import Tree
from polyclinic.errors import ConfigError
from polyclinic.learning.batch import Batch
from polyclinic.learning.networks.model_tree import cached_model, changes_of, params_of
from polyclinic.learning.networks.model_tree import trainable as trainable_of
from polyclinic.learning.training.gradient_memory import take_gradients
from polyclinic.learning.training.image_augmentation import ImageAugmentation
from polyclinic.learning.training.minibatches import Sampler, drawn, weights
from polyclinic.learning.training.optimizers import SGD, Adam, Optimizer, current_memory
from polyclinic.learning.training.seeding import seeded
from polyclinic.learning.training.step_progress import counted

Loss: TypeAlias = Callable[[nn.Module, Batch], Tensor]
Penalty: TypeAlias = Callable[[nn.Module, Tree], Tensor]
Correct: TypeAlias = Callable[[str, Tensor], Tensor | None]
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
        optimizer: ``sgd``, ``adam`` or ``adamw``. Its state is reset every round unless it is kept.
        lr: Learning rate.
        lr_decay: Factor of the learning rate after every round.
        warmup_rounds: Number of rounds over which the learning rate rises to ``lr``.
        cosine_rounds: Number of rounds over which it falls along half a cosine; usually those of the study.
        steps: Number of optimizer steps, instead of ``epochs``.
        clip_norm: The largest Euclidean norm of a minibatch's gradient.
        amp: Whether to compute in bfloat16 on a GPU.
        penalty: Added to the loss; receives the module and its initial parameters.
        augment: Changes a minibatch before it is used, with the given random generator.
        schedule: ``poly`` if the learning rate falls as ``(1 - t/T)^power`` over all steps of all rounds.
        schedule_rounds: Number of rounds of ``schedule``; usually those of the study.
        power: The exponent of ``schedule``.
        milestones: Numbers of completed rounds after which the learning rate is multiplied with ``milestone_factor``.
        milestone_factor: The factor.
        nesterov: Whether momentum is Nesterov's.
        keep_optimizer: Whether a site keeps the optimizer's state between rounds (``methods.base.kept_optimizer``). By
            default if SGD has a momentum of at least 0.95, which a round may be too short to build up.
        augmentation: Changes of each sample, with a generator of its own.
        foreground: Probability that a patch contains foreground, for data with random patches.
        balance: How far classes are made equally frequent, from 0 to 1 (``minibatches.weights``).
        balance_patients: Whether all patients are equally frequent.
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
    schedule: Literal["poly"] | None = None
    schedule_rounds: int | None = None
    power: float = 0.9
    milestones: tuple[int, ...] = ()
    milestone_factor: float = 0.1
    nesterov: bool = False
    keep_optimizer: bool | None = None
    augmentation: ImageAugmentation | None = None
    foreground: float = 0.0
    balance: float = 0.0
    balance_patients: bool = False

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
        result: Callable[[nn.Module, Tree], Tree] = params_of,
    ) -> Tree:
        """Return the parameters after training from ``start`` on a site's data.

        Args:
            round: Seeds, with the site, the order of examples and dropout; determines the learning rate.
            role: The role of the data.
            data: Data to use instead of those of ``role``.
            loss: Replaces the task's loss.
            gradient_hook: Edits each gradient by name before the optimizer step; None leaves its parameter unchanged.
            trainable: Selects the parameters to train; all others are unchanged.
            after_step: Called with the model after each step, for example to update a second model.
            slot: Name of the model, if several of one task are used at the same time.
            result: What is returned of the trained model, with which it must share no memory. Its second argument holds
                tensors that it may overwrite and return.
        """
        model, data = cached_model(task, start, site.device, slot), site.data[role] if data is None else data
        loss, rng = loss or task.loss, site.rng(round, "train", role, slot)
        origin = {name: leaf.to(site.device) for name, leaf in start.items()} if self.penalty else start
        total, key, memory = self.count(data), f"{role}/{slot}", current_memory() if self.keeps_optimizer else None
        with seeded(rng, site.device), placed(model, site) as model:
            named = dict(_trained(model, trainable))
            optimizer = self._optimizer(list(named.values()), self.rate(round))
            if memory is not None:
                optimizer.load(memory.get(key, {}), list(named))
            step = self._step(optimizer, list(named.items()), gradient_hook)
            for done, batch in enumerate(self.batches(data, rng, site.device, site.compute)):
                if self.schedule:
                    optimizer.lr = self.rate(round, done / total)
                with self._precision(site.device):
                    value = loss(model, batch)
                    if self.penalty:
                        value = value + self.penalty(model, origin)
                step(value)
                if after_step:
                    after_step(model)
            if memory is not None:
                memory[key] = {**memory.get(key, {}), **optimizer.state(list(named))}
        gradients = take_gradients(model)
        # A hook may have kept a gradient; without hooks, no one needs the last ones, and their memory is used again.
        return result(model, {} if gradient_hook or after_step else gradients)

    def change(self, task: Trainable, start: Tree, site: Site, round: int, **options: Any) -> Tree:
        """Return the change of the parameters by ``fit``, which no one else uses. ``options`` are those of ``fit``."""
        if type(self).fit is LocalTraining.fit:  # another ``fit`` may change the parameters that it returns
            return self.fit(task, start, site, round, **options, result=partial(changes_of, start=start))
        change = self.fit(task, start, site, round, **options)
        tree.sub_(change, start)
        return change

    def batches(
        self, data: Any, rng: torch.Generator, device: str = "cpu", compute: Compute = Compute()
    ) -> Iterator[Batch]:
        """Yield shuffled minibatches of ``data`` for one round.

        Examples are drawn without replacement in each epoch; with replacement if classes or patients are balanced.
        """
        single = hasattr(data, "draw") or self.augmentation is not None
        chunks = self._single(data, rng, compute) if single else (data[i] for i in self._order(data, rng))
        for batch in counted(chunks, self.count(data)):
            x, y = self.augment(batch, rng) if self.augment else batch
            yield _moved(x, device, compute), _moved(y, device)

    def _order(self, data: Any, rng: torch.Generator) -> Iterator[Tensor]:
        """Yield the examples of each minibatch of a round."""
        left, weight = self.count(data), None
        if left and (self.balance or self.balance_patients):
            weight = weights(data, self.balance, self.balance_patients)
        while left:
            order = (
                torch.randperm(len(data), generator=rng)
                if weight is None
                else torch.multinomial(weight, len(data), replacement=True, generator=rng)
            )
            for chunk in order.split(self.batch_size)[: self._per_epoch(len(data))][:left]:
                left -= 1
                yield chunk

    def _single(self, data: Any, rng: torch.Generator, compute: Compute) -> Iterator[Batch]:
        """Yield minibatches of samples that are drawn one by one."""
        # A generator of its own: what the caller draws from rng between two minibatches must not depend on threads.
        own = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=rng)))
        chunks = (
            (chunk.tolist(), torch.randint(2**62, (len(chunk),), generator=own).tolist())
            for chunk in self._order(data, own)
        )
        return drawn(Sampler(data, self.augmentation, self.foreground), chunks, compute.threads)

    def stepper(
        self,
        model: nn.Module,
        round: int = 0,
        *,
        gradient_hook: Correct | None = None,
        trainable: Callable[[str], bool] | None = None,
    ) -> Callable[[Tensor], None]:
        """Return a function that takes one optimizer step on the loss that it is given.

        The learning rate is that of the round's first step. The optimizer's state is not kept.

        Raises:
            ConfigError: If the state should be kept.
        """
        if self.keep_optimizer:
            raise ConfigError(
                "keep_optimizer: this method takes individual training steps and resets its optimizers each round; set "
                "keep_optimizer = false"
            )
        named = _trained(model, trainable)
        return self._step(self._optimizer([p for _, p in named], self.rate(round)), named, gradient_hook)

    def _step(
        self, optimizer: Optimizer, named: Sequence[tuple[str, nn.Parameter]], gradient_hook: Correct | None
    ) -> Callable[[Tensor], None]:
        def step(loss: Tensor) -> None:
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            if gradient_hook:
                for name, p in named:
                    if p.grad is not None:
                        p.grad = gradient_hook(name, p.grad)
            if self.clip_norm is not None:
                nn.utils.clip_grad_norm_([p for _, p in named], self.clip_norm)
            optimizer.step()

        return step

    def count(self, data: Any) -> int:
        """Return the number of optimizer steps of ``fit`` on ``data``."""
        per_epoch = self._per_epoch(len(data))
        return self.epochs * per_epoch if self.steps is None or not per_epoch else self.steps  # without data, no step

    def rate(self, round: int, done: float = 0.0) -> float:
        """Return the learning rate of a round, counted from 0. It is never 0, so that methods may divide by it.

        Args:
            round: The round.
            done: The share of the round's steps that are done, below 1.
        """
        rate = self.lr * self.lr_decay**round
        if round < self.warmup_rounds:
            rate *= (round + 1) / (self.warmup_rounds + 1)
        if self.cosine_rounds:
            rate *= (1 + math.cos(math.pi * min(round, self.cosine_rounds - 1) / self.cosine_rounds)) / 2
        if self.schedule:
            if not self.schedule_rounds:
                raise ConfigError(f'schedule = "{self.schedule}" needs schedule_rounds, the number of rounds')
            rate *= (1 - (min(round, self.schedule_rounds - 1) + done) / self.schedule_rounds) ** self.power
        return rate * self.milestone_factor ** sum(round >= milestone for milestone in self.milestones)

    def distance(self, round: int, steps: int) -> float:
        """Return the sum of the learning rates of a round's ``steps``: how far a constant gradient of 1 moves."""
        if not self.schedule:
            return steps * self.rate(round)
        return math.fsum(self.rate(round, done / steps) for done in range(steps))

    @property
    def keeps_optimizer(self) -> bool:
        """Whether a site keeps the optimizer's state between rounds."""
        usual = self.optimizer == "sgd" and self.momentum >= 0.95
        return usual if self.keep_optimizer is None else self.keep_optimizer

    def mirror_axes(self, dims: int) -> tuple[int, ...]:
        """Return the spatial axes, of ``dims``, that training mirrors; 0 is the first."""
        return self.augmentation.mirror_axes(dims) if self.augmentation else ()

    def with_penalty(self, penalty: Penalty) -> "LocalTraining":
        """Return a copy with ``penalty`` added to the existing one."""
        return replace(self, penalty=penalty if self.penalty is None else Both(self.penalty, penalty))

    def _per_epoch(self, examples: int) -> int:
        batches = -(-examples // self.batch_size)
        return batches - 1 if batches > 1 and examples % self.batch_size == 1 else batches

    def _optimizer(self, parameters: Sequence[Tensor], lr: float) -> Optimizer:
        match self.optimizer:
            case "sgd":
                return SGD(parameters, lr, self.momentum, self.weight_decay, self.nesterov)
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
def placed(model: nn.Module, site: Site) -> Iterator[nn.Module]:
    """Lay out and compile ``model`` as the site's ``compute`` says, and restore the layout afterwards."""
    compute = site.compute
    dims = {p.ndim for p in model.parameters()} if compute.channels_last else set()
    layout = torch.channels_last_3d if 5 in dims else torch.channels_last
    if dims & {4, 5}:
        model.to(memory_format=layout)  # type: ignore[call-overload]
    if compute.compile and model not in _compiled:
        model.compile()
        _compiled.add(model)
    try:
        yield model
    finally:
        if dims & {4, 5}:
            model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


_compiled: "WeakSet[nn.Module]" = WeakSet()


def _moved(x: Tensor, device: str, compute: Compute = Compute()) -> Tensor:
    """Return ``x`` on ``device``; copies to a GPU are asynchronous, from page-locked memory."""
    if compute.channels_last and x.ndim in (4, 5):
        x = x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
    if device.startswith("cuda") and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def _trained(model: nn.Module, trainable: Callable[[str], bool] | None) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters to train, by name."""
    return [(name, p) for name, p in trainable_of(model).items() if trainable is None or trainable(name)]


@dataclass(frozen=True)
class Proximal:
    """The FedProx penalty, ``μ/2 · ‖w − w₀‖²`` (Li et al., MLSys 2020, equation 2)."""

    mu: float

    def __call__(self, model: nn.Module, start: Tree) -> Tensor:
        """Return the penalty of the trainable parameters."""
        gaps = [(p - start[name]).square().sum() for name, p in trainable_of(model).items()]
        return self.mu / 2 * torch.stack(gaps).sum()


@dataclass(frozen=True)
class Both:
    """The sum of two penalties."""

    first: Penalty
    second: Penalty

    def __call__(self, model: nn.Module, start: Tree) -> Tensor:
        """Return the sum of the penalties."""
        return self.first(model, start) + self.second(model, start)
