"""Access to a site's labeled and unlabeled examples.

Data whose targets must not be used have the role ``"unlabeled"``; a site without labels has an empty ``"train"``. These
functions never return a target of an unlabeled example, even if its source has one.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polyclinic.core.site import Site
from polyclinic.core.tree import Tree
from polyclinic.errors import ConfigError
from polyclinic.learning.batch import Batch
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining, Loss


@dataclass(frozen=True)
class Untargeted:
    """The inputs of ``data``, with each example's position, int64 [b], in place of its target."""

    data: Any

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: Tensor) -> Batch:
        return self.data[index][0], index.clone()


@dataclass(frozen=True)
class UntargetedViews(Untargeted):
    """The same for data on disk, of whose images random views are drawn."""

    @property
    def patch(self) -> tuple[int, ...]:
        """The shape of a view."""
        return tuple(self.data.patch)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of an input."""
        return tuple(self.data.shape)

    def draw(self, i: int, rng: torch.Generator, forced: bool, size: tuple[int, ...]) -> Batch:
        """Return a random view of example ``i``, and its position. It is never forced, since that reveals a target."""
        return self.data.draw(i, rng, False, size)[0], torch.tensor(i)


@dataclass(frozen=True)
class Chained:
    """Several data sets concatenated in order, without their targets."""

    parts: tuple[Any, ...]

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def __getitem__(self, index: Tensor) -> Batch:
        inputs: Tensor | None = None
        begin = 0
        for part in self.parts:
            inside = (index >= begin) & (index < begin + len(part))
            if bool(inside.any()):
                chunk = part[index[inside] - begin][0]
                inputs = chunk.new_empty(len(index), *chunk.shape[1:]) if inputs is None else inputs
                inputs[inside] = chunk
            begin += len(part)
        if inputs is None:
            raise IndexError(f"no example at {index.tolist()[:5]}; there are {begin} examples")
        return inputs, index.clone()


@dataclass(frozen=True)
class ChainedViews(Chained):
    """The same for data on disk, of whose images random views are drawn."""

    @property
    def patch(self) -> tuple[int, ...]:
        """The shape of a view."""
        return tuple(self.parts[0].patch)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of an input."""
        return tuple(self.parts[0].shape)

    def draw(self, i: int, rng: torch.Generator, forced: bool, size: tuple[int, ...]) -> Batch:
        """Return a random view of example ``i``, and its position. It is never forced, since that reveals a target."""
        begin = 0
        for part in self.parts:
            if i < begin + len(part):
                return part.draw(i - begin, rng, False, size)[0], torch.tensor(i)
            begin += len(part)
        raise IndexError(f"no example at {i}; there are {begin} examples")


def size(data: Mapping[str, Any], role: str) -> int:
    """Return the number of examples with ``role``."""
    return len(data.get(role, ()))


def unlabeled(data: Mapping[str, Any]) -> Untargeted:
    """Return the unlabeled examples without their targets."""
    return _untargeted(data.get("unlabeled", ()))


def all_inputs(data: Mapping[str, Any]) -> Chained:
    """Return all inputs for training, labeled or not, without targets."""
    parts = tuple(data[role] for role in ("train", "unlabeled") if size(data, role))
    return ChainedViews(parts) if parts and all(hasattr(part, "draw") for part in parts) else Chained(parts)


def _untargeted(data: Any) -> Untargeted:
    return UntargetedViews(data) if hasattr(data, "draw") else Untargeted(data)


def public(data: Mapping[str, Any], who: str, method: str) -> Untargeted:
    """Return the public images, which are not of the sites' patients and are identical everywhere.

    Raises:
        ValueError: If there are none. The message gives the alternatives.
    """
    if not size(data, "public"):
        raise ConfigError(
            f"{method} distills on public images, and {who} has none: provide identical data with the role 'public' at "
            "every site and the server, or choose a method without public images, such as fedavg"
        )
    return _untargeted(data["public"])


def endless(local: LocalTraining, data: Any, rng: torch.Generator, device: str = "cpu") -> Iterator[Batch]:
    """Yield minibatches of ``data`` indefinitely, as a second stream in addition to that of ``LocalTraining.fit``.

    Yields nothing if ``data`` is empty.
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
    """Run ``LocalTraining.fit`` on labeled and unlabeled examples; on one kind alone if a site has no other.

    Args:
        known: The loss of a labeled minibatch.
        alone: The loss of unlabeled inputs. If there are labels, each step adds it for a second minibatch.
        wait: Whether unlabeled examples are not used yet.
        after_step: As in ``LocalTraining.fit``, if unlabeled examples are used.

    Returns:
        The final parameters, and the numbers of labeled and unlabeled examples used.
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
