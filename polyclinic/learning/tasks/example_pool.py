"""A site's examples taken together, and without their targets.

Data whose targets must not be used stand under the role ``"unlabeled"``; a site without labels has an empty
``"train"``. What these functions return yields no target of an unlabeled example, whatever its source holds.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polyclinic.core.site import Site
from polyclinic.core.tree import Tree
from polyclinic.errors import ConfigError
from polyclinic.learning.tasks.task import Batch, Task
from polyclinic.learning.training.local import LocalTraining, Loss


@dataclass(frozen=True)
class Untargeted:
    """The inputs of ``data``; where targets would be, each example's position, int64 [b]."""

    data: Any

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: Tensor) -> Batch:
        return self.data[index][0], index.clone()


@dataclass(frozen=True)
class Chained:
    """Several data sets as one, in order, without their targets."""

    parts: tuple[Any, ...]

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def __getitem__(self, index: Tensor) -> Batch:
        inputs: Tensor | None = None
        begin = 0
        for part in self.parts:
            here = (index >= begin) & (index < begin + len(part))
            if bool(here.any()):
                found = part[index[here] - begin][0]
                inputs = found.new_empty(len(index), *found.shape[1:]) if inputs is None else inputs
                inputs[here] = found
            begin += len(part)
        if inputs is None:
            raise IndexError(f"no example at {index.tolist()[:5]} among {begin}")
        return inputs, index.clone()


def size(data: Mapping[str, Any], role: str) -> int:
    """How many examples there are under ``role``."""
    return len(data.get(role, ()))


def unlabeled(data: Mapping[str, Any]) -> Untargeted:
    """The examples whose targets must not be used. Their targets are not there."""
    return Untargeted(data.get("unlabeled", ()))


def all_inputs(data: Mapping[str, Any]) -> Chained:
    """Every input that a site may learn from, labeled or not, without targets."""
    return Chained(tuple(data[role] for role in ("train", "unlabeled") if size(data, role)))


def public(data: Mapping[str, Any], who: str, method: str) -> Untargeted:
    """The images that are nobody's patients, the same everywhere.

    Raises:
        ValueError: Where there are none, with what to do.
    """
    if not size(data, "public"):
        raise ConfigError(
            f"{method} distils on public images, and {who} has none: give data under the role 'public', "
            "the same at every place, or choose a method without them, such as fedavg"
        )
    return Untargeted(data["public"])


def endless(local: LocalTraining, data: Any, rng: torch.Generator, device: str = "cpu") -> Iterator[Batch]:
    """Minibatches of ``data`` as ``local`` makes them, without end: a second stream beside the one in
    ``LocalTraining.fit``.

    Yields nothing where ``data`` is empty.
    """
    while len(data):
        yield from local.batches(data, rng, device)


def fit_both(
    local: LocalTraining,
    task: Task,
    start: Tree,
    site: Site,
    round: int,
    known: Loss,
    alone: Callable[[nn.Module, Tensor], Tensor],
    *,
    wait: bool = False,
    after_step: Callable[[nn.Module], None] | None = None,
) -> tuple[Tree, int, int]:
    """``LocalTraining.fit`` on labeled and unlabeled examples side by side; on either alone, where a site has no
    other.

    Args:
        known: The loss of a labeled minibatch.
        alone: The loss of unlabeled inputs. Where there are labels too, each step adds it for another minibatch.
        wait: Whether unlabeled examples are not used yet.
        after_step: As in ``LocalTraining.fit``, where unlabeled examples are used.

    Returns:
        The parameters at the end, and how many labeled and unlabeled examples they were learned from.
    """
    labels, free = size(site.data, "train"), 0 if wait else size(site.data, "unlabeled")
    stream = endless(local, unlabeled(site.data), site.rng(round, "unlabeled"), site.device)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        if not labels:
            return alone(model, batch[0])
        value = known(model, batch)
        return value + alone(model, next(stream)[0]) if free else value

    data = site.data["train"] if labels else unlabeled(site.data) if free else ()
    end = local.fit(task, start, site, round, data=data, loss=loss, after_step=after_step if free else None)
    return end, labels, free
