"""Canaries in differentially private training: units of synthetic data with gradients that the auditor can recognize.

A canary is an additional unit (a patient with one image) in the training data of DP-SGD. Its loss is linear in the
parameters, so that its gradient is the same in every step: a fixed direction, larger than the clipping bound C, which
clipping reduces to length C. This is the largest contribution of one unit (Nasr, Hayes, Steinke, Balle, Tramèr,
Jagielski, Carlini and Terzis, "Tight Auditing of Differentially Private Machine Learning", USENIX Security 2023,
https://arxiv.org/abs/2302.07956; Andrew et al., https://arxiv.org/abs/2302.03098). Sampling, clipping and noise are
those of ``DPSGD``, without any replacement.

Each canary has its own coordinates, drawn at random with random signs among those that training without canaries
changes least. Directions are therefore orthogonal, no other canary or real patient hides one, and they need no more
memory than the model. (The guarantee holds for any data, so the auditor may know all real data.) Canaries that the coin
excludes stay in the data with gradient 0, so that the sampling rate, which is public, does not depend on the coins.

The auditor sees everything that leaves the site in every round, as a server does, and projects every tensor with the
shape of a parameter onto the canaries' directions.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from polyclinic.core.aggregates import ElementwiseMean, PerSite, Reply, WeightedMean
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, norm
from polyclinic.errors import ConfigError
from polyclinic.learning.batch import Batch
from polyclinic.learning.networks.model_tree import trainable
from polyclinic.learning.tasks.task import Task

LENGTH = 10.0
"""Length of a canary's gradient before clipping, relative to the clipping bound."""


@dataclass(frozen=True, eq=False)
class Canaries:
    """The canaries of one training run.

    Attributes:
        block: By parameter, the canary of each coordinate: int64 of the parameter's shape, −1 for none.
        sign: By parameter, +1 or −1 for each coordinate.
        inside: The coins, bool [m].
        size: Number of coordinates of each canary.
        bound: C.
    """

    block: Mapping[str, Tensor]
    sign: Mapping[str, Tensor]
    inside: Tensor
    size: int
    bound: float

    @classmethod
    def draw(cls, busy: Tree, count: int, bound: float, site: Site, *key: int | str) -> "Canaries":
        """Draw directions and coins for ``count`` canaries from the random generator of ``site`` for ``key``.

        Args:
            busy: By parameter, the change of each coordinate in training without canaries (``Motion``). Canaries share
                the half with the smallest change, so that real patients hide none of them.
            count: Number of canaries.
            bound: C.
            site: The site of the random generator.
            key: The key of the random generator.

        Raises:
            ValueError: If there are more than half as many canaries as trainable parameters, or fewer than two.
        """
        shapes = {name: leaf.shape for name, leaf in busy.items()}
        moved = torch.cat([leaf.flatten().double() for leaf in busy.values()])
        total = len(moved)
        if not 2 <= count <= total // 2:
            raise ConfigError(
                f"{count} canaries for a network of {total} parameters: at least 2 canaries are required, with at "
                "least two parameters each"
            )
        rng, size = site.rng("canaries", *key), total // 2 // count
        owner = torch.full((total,), -1, dtype=torch.long)
        quiet = moved.argsort(stable=True)[: size * count]
        owner[quiet[torch.randperm(len(quiet), generator=rng)]] = torch.arange(len(quiet)) % count
        sign = torch.randint(2, (total,), generator=rng).float() * 2 - 1
        inside = torch.randint(2, (count,), generator=rng).bool()
        sizes = [shape.numel() for shape in shapes.values()]

        def shaped(flat: Tensor) -> dict[str, Tensor]:
            return {n: part.reshape(s) for (n, s), part in zip(shapes.items(), flat.split(sizes), strict=True)}

        return cls(shaped(owner), shaped(sign), inside, size, bound)

    def __len__(self) -> int:
        return len(self.inside)

    def loss(self, model: nn.Module, who: Tensor) -> Tensor:
        """Return the loss of the canary with index ``who`` []: ``−⟨direction, parameters⟩``."""
        height, total = LENGTH * self.bound / math.sqrt(self.size), who.new_zeros(())
        for name, p in trainable(model).items():
            if name in self.block:
                own = self.sign[name].to(p) * (self.block[name].to(p.device) == who)
                total = total - (own * p).sum() * height
        return total

    def project(self, released: Tree) -> Tensor | None:
        """Project ``released`` on each direction, in deviations of a random vector of its length. [m], float64.

        None if nothing in it has the name and shape of a parameter, or all of it is 0.
        """
        along, square, many = torch.zeros(len(self), dtype=torch.float64), 0.0, 0
        for name, block in self.block.items():
            leaf = released.get(name)
            if leaf is None or leaf.shape != block.shape:
                continue
            x, own = leaf.detach().cpu().double().nan_to_num(0.0, 0.0, 0.0).flatten(), block.flatten()
            mine = own >= 0
            along.index_add_(0, own[mine], (x * self.sign[name].flatten())[mine])
            square, many = square + float(x.square().sum()), many + x.numel()
        if square == 0.0:
            return None
        return along / math.sqrt(self.size * square / many)


class Motion:
    """Change of each coordinate in training, over all replies of a site.

    Attributes:
        far: By trainable parameter, the sum of absolute changes, with equal weight for each part of a reply.
    """

    def __init__(self, task: Task) -> None:
        named = trainable(task.model()).items()
        self.far = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in named}

    def watch(self, reply: Reply) -> None:
        """Add the reply of one exchange."""
        for released in (tree for stat in reply.parts.values() for tree in _trees(stat)):
            shaped = [n for n, far in self.far.items() if n in released and released[n].shape == far.shape]
            mine = {n: released[n].detach().cpu().double().nan_to_num(0.0, 0.0, 0.0) for n in shaped}
            if mine and (length := norm(mine)):
                self.far |= {n: self.far[n] + x.abs() / length for n, x in mine.items()}


class WithCanaries:
    """Data with the canaries added as units of their own.

    An example's target is its own, flattened, with one more number: 0 for a real example, the canary's number, from 1,
    for one that is included, and −1 for one that is not.
    """

    def __init__(self, data: Any, canaries: Canaries) -> None:
        self.data, self.real = data, len(data)
        number = torch.arange(1, len(canaries) + 1)
        self.marks = torch.cat([torch.zeros(self.real, dtype=torch.long), torch.where(canaries.inside, number, -1)])
        if (patients := getattr(data, "patients", None)) is not None:
            self.patients: Sequence[Any] = (*patients, *(f"canary/{i}" for i in range(len(canaries))))

    def __len__(self) -> int:
        return len(self.marks)

    def __getitem__(self, index: Tensor) -> Batch:
        x, y = self.data[torch.where(index < self.real, index, 0)]  # a canary's image is not used
        return x, torch.cat([y.reshape(len(y), -1).double(), self.marks[index].double()[:, None]], 1)


def audited(task: Task, canaries: Canaries, like: Tensor) -> Task:
    """Return ``task`` with a loss for examples of ``WithCanaries``: the task's own, or a canary's.

    Args:
        task: The task.
        canaries: The canaries in the data.
        like: Example targets, with the shape and type that the task's loss expects.
    """
    kind: Any = type(task)

    def loss(self: Task, model: nn.Module, batch: Batch) -> Tensor:
        def one(x: Tensor, target: Tensor) -> Tensor:
            mark, y = target[-1], target[:-1].reshape(1, *like.shape[1:]).to(like.dtype)
            honest: Tensor = kind.loss(self, model, (x[None], y))
            planted = torch.where(mark > 0, canaries.loss(model, (mark - 1).long()), torch.zeros_like(honest))
            return torch.where(mark == 0, honest, planted.to(honest))

        return torch.stack([one(x, target) for x, target in zip(*batch, strict=True)]).mean()

    audited_task: Task = type(f"Audited{kind.__name__}", (kind,), {"loss": loss})(
        **{field.name: getattr(task, field.name) for field in fields(task)}
    )
    return audited_task


class Observer:
    """Accumulates the projections of everything that leaves a site, over rounds.

    Attributes:
        seen: By part of the reply, the sum over rounds of its projections [m].
    """

    def __init__(self, canaries: Canaries) -> None:
        self.canaries, self.seen = canaries, dict[str, Tensor]()

    def watch(self, reply: Reply) -> None:
        """Add the reply of one exchange."""
        for part, stat in reply.parts.items():
            for released in _trees(stat):
                if (projection := self.canaries.project(released)) is not None:
                    self.seen[part] = self.seen.get(part, torch.zeros(len(self.canaries)).double()) + projection

    def learned(self) -> dict[str, float]:
        """Return by part the mean difference of projections between included and excluded canaries, for a control."""
        inside = self.canaries.inside
        return {part: float(z[inside].mean() - z[~inside].mean()) for part, z in self.seen.items()}

    def scores(self, weights: Mapping[str, float]) -> Tensor:
        """Return the weighted sum [m] over parts; size and sign of the weights are learned from the control."""
        total = torch.zeros(len(self.canaries), dtype=torch.float64)
        for part, z in self.seen.items():
            total += weights.get(part, 0.0) * z
        return total


def _trees(stat: WeightedMean | ElementwiseMean | PerSite) -> list[Tree]:
    """Return the values in a part of a reply."""
    if isinstance(stat, PerSite):
        return list(stat.items.values())
    if isinstance(stat, WeightedMean) and not stat.weight:
        return [stat.total]
    return [stat.value]
