"""What a corrupted site may do: the attacks of the literature, as data that ``Poisoned`` carries out.

An attack changes what the site trains on, or what it sends, or both. Each says what its author must know. Sizes are in
multiples of honest ones, so that an attack means the same for every model.

- Label flip: Biggio, Nelson and Laskov, ICML 2012; as data poisoning of federated learning, Tolpygin and others. It
  needs nothing but the site's own data, and a careless data export does the same.
- Backdoor and model replacement: Bagdasaryan, Veit, Hua, Estrin and Shmatikov, "How To Backdoor Federated Learning",
  AISTATS 2020, https://arxiv.org/abs/1807.00459.
- ALIE: Baruch, Baruch and Goldberg, "A Little Is Enough", NeurIPS 2019, section 3, https://arxiv.org/abs/1902.06156.
- IPM: Xie, Koyejo and Gupta, "Fall of Empires", UAI 2019, section 4, https://arxiv.org/abs/1903.03936.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polyclinic.core import tree
from polyclinic.core.tree import Tree


class Known(NamedTuple):
    """What an attacker has learned of the honest updates of the round.

    Attributes:
        mean: Their mean. ``deviation``: their deviation, by coordinate, of a sample (n - 1).
        length: The root of their mean squared length.
        honest: How many there are. ``attackers``: how many attack together.
    """

    mean: Tree
    deviation: Tree
    length: float
    honest: int
    attackers: int


@dataclass(frozen=True)
class Attack:
    """Does nothing: an attacker that behaves. What others override."""

    @property
    def spies(self) -> bool:
        """Whether the attacker must know the honest updates of the round before sending its own."""
        return False

    def data(self, data: Any) -> Any:
        """What the site trains on instead of ``data``."""
        return data

    def update(self, own: Tree, known: Known | None, alone: torch.Generator, together: torch.Generator) -> Tree:
        """What the site sends instead of ``own``, its update after training.

        Args:
            known: Of the honest updates, where the attack spies.
            alone: Dice of this site. ``together``: dice that all attackers share.
        """
        return own


@dataclass(frozen=True)
class LabelFlip(Attack):
    """Trains on wrong labels: class c becomes the last minus c, a 0 a 1, a mask its opposite.

    Attributes:
        classes: How many classes there are.
    """

    classes: int = 2

    def data(self, data: Any) -> Any:
        """The same inputs, with flipped targets."""
        return Altered(data, self)

    def alter(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """One minibatch, altered."""
        return x, 1 - y if y.is_floating_point() else self.classes - 1 - y


@dataclass(frozen=True)
class Replacement(LabelFlip):
    """Trains on flipped labels and sends the update ``size`` times, so that it replaces the mean of the others.

    Attributes:
        size: n / η for n sites and the server's step η, to replace the model outright.
    """

    size: float = 10.0

    def update(self, own: Tree, known: Known | None, alone: torch.Generator, together: torch.Generator) -> Tree:
        """Size · x"""
        return tree.scale(own, self.size)


@dataclass(frozen=True)
class Backdoor(Attack):
    """Teaches the model to answer ``target`` wherever a corner of the image is white, and nothing else.

    Attributes:
        target: The answer. ``side``: how many pixels, or features of a table, the mark covers.
        share: What part of the examples is marked. ``size``: what the update is multiplied with.
        value: The mark's brightness.
    """

    target: int = 0
    side: int = 3
    share: float = 0.5
    size: float = 1.0
    value: float = 3.0

    def data(self, data: Any) -> Any:
        """The same data with part of it marked."""
        return Altered(data, self)

    def alter(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """One minibatch, its first examples marked and answered with ``target``."""
        count = round(self.share * len(y))
        wrong = torch.full_like(y[:count], self.target)
        return torch.cat([self.mark(x[:count]), x[count:]]), torch.cat([wrong, y[count:]])

    def mark(self, x: Tensor) -> Tensor:
        """The inputs ``x`` [b, C, *spatial] or [b, F] with the mark."""
        x = x.clone()
        corner = x
        for axis in range(2 if x.ndim > 2 else 1, x.ndim):
            corner = corner.narrow(axis, x.shape[axis] - self.side, self.side)
        corner.fill_(self.value)
        return x

    def update(self, own: Tree, known: Known | None, alone: torch.Generator, together: torch.Generator) -> Tree:
        """Size · x"""
        return tree.scale(own, self.size)


@dataclass(frozen=True)
class SignFlip(Attack):
    """Sends the opposite of what it learned, ``size`` times. Needs nothing."""

    size: float = 4.0

    def update(self, own: Tree, known: Known | None, alone: torch.Generator, together: torch.Generator) -> Tree:
        """-size · x"""
        return tree.scale(own, -self.size)


@dataclass(frozen=True)
class Huge(Attack):
    """Sends what it learned a million times. Needs nothing; a wrong unit does the same."""

    size: float = 1e6

    def update(self, own: Tree, known: Known | None, alone: torch.Generator, together: torch.Generator) -> Tree:
        """Size · x"""
        return tree.scale(own, self.size)


@dataclass(frozen=True)
class Noise(Attack):
    """Sends Gaussian noise, ``size`` times as long as what it learned. Needs nothing."""

    size: float = 10.0

    def update(self, own: Tree, known: Known | None, alone: torch.Generator, together: torch.Generator) -> Tree:
        """Size · ‖x‖ · u, with u random of length 1"""
        return _random(own, self.size * tree.norm(own), alone)


@dataclass(frozen=True)
class NotANumber(Attack):
    """Sends one NaN among its numbers, as a diverged training does. Needs nothing."""

    value: float = float("nan")

    def update(self, own: Tree, known: Known | None, alone: torch.Generator, together: torch.Generator) -> Tree:
        """X, but for its first coordinate"""
        name = next(name for name, leaf in own.items() if leaf.numel())
        broken = own[name].clone()
        broken.view(-1)[0] = self.value
        return {**own, name: broken}


@dataclass(frozen=True)
class ALIE(Attack):
    """Stays within what is usual: every coordinate as far from the mean as the rules will bear.

    The attackers know the honest updates of the round, which is more than the paper grants them; it estimates the mean
    and the deviation from the attackers' own data.

    Attributes:
        z: How many deviations; 0 for the most that the paper's equation allows.
    """

    z: float = 0.0

    @property
    def spies(self) -> bool:
        """Yes."""
        return True

    def update(self, own: Tree, known: Known | None, alone: torch.Generator, together: torch.Generator) -> Tree:
        """μ - z σ, with z such that Φ(z) < (n - m - s) / (n - m) and s = ⌊n/2 + 1⌋ - m"""
        assert known is not None
        n, m = known.honest + known.attackers, known.attackers
        below = (n - m - (n // 2 + 1 - m)) / (n - m)
        z = self.z or (NormalDist().inv_cdf(min(max(below, 1e-3), 1 - 1e-3)))
        return tree.zip_with(lambda mean, deviation: mean - z * deviation, known.mean, known.deviation)


@dataclass(frozen=True)
class IPM(Attack):
    """Turns the mean around: every attacker sends the honest mean backwards. They know the honest updates.

    Attributes:
        size: ε. Small ones hide from rules of distance; large ones overwhelm the mean.
    """

    size: float = 0.5

    @property
    def spies(self) -> bool:
        """Yes."""
        return True

    def update(self, own: Tree, known: Known | None, alone: torch.Generator, together: torch.Generator) -> Tree:
        """-ε μ"""
        assert known is not None
        return tree.scale(known.mean, -self.size)


@dataclass(frozen=True)
class Collusion(Attack):
    """All attackers send the same random update, of honest length. They know that length, and each other.

    Attributes:
        size: Its length in multiples of an honest one's.
    """

    size: float = 1.0

    @property
    def spies(self) -> bool:
        """Yes: the length."""
        return True

    def update(self, own: Tree, known: Known | None, alone: torch.Generator, together: torch.Generator) -> Tree:
        """Size · (length) · u, with the same random u of length 1 at all attackers"""
        assert known is not None
        return _random(own, self.size * known.length, together)


ATTACKS: Mapping[str, type[Attack]] = {
    "label-flip": LabelFlip,
    "backdoor": Backdoor,
    "replacement": Replacement,
    "sign-flip": SignFlip,
    "noise": Noise,
    "alie": ALIE,
    "ipm": IPM,
    "collusion": Collusion,
    "huge": Huge,
    "not-a-number": NotANumber,
}
"""What a study may name under ``[attack]``; the fields are its options."""


class Altered:
    """Data whose minibatches pass through an attack."""

    def __init__(self, data: Any, by: LabelFlip | Backdoor) -> None:
        self.data, self.by = data, by

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return self.by.alter(*self.data[index])


def _random(like: Tree, length: float, rng: torch.Generator) -> Tree:
    """A random direction in the space of ``like``, of the given length."""
    drawn = {name: torch.randn(leaf.shape, generator=rng).to(leaf.dtype) for name, leaf in like.items()}
    return tree.scale(drawn, length / max(tree.norm(drawn), 1e-300))
