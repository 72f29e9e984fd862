"""Attacks of a corrupted site from the literature, as data that ``Poisoned`` executes.

An attack changes the site's training data, its update, or both. Each class states the knowledge that it requires.
Sizes are relative to honest updates, so that an attack has the same strength for every model.

- Label flip: Biggio, Nelson and Laskov, ICML 2012; as data poisoning of federated learning, Tolpygin and others. It
  needs only the site's own data, and an incorrect data export has the same effect.
- Backdoor and model replacement: Bagdasaryan, Veit, Hua, Estrin and Shmatikov, "How To Backdoor Federated Learning",
  AISTATS 2020, https://arxiv.org/abs/1807.00459.
- ALIE: Baruch, Baruch and Goldberg, "A Little Is Enough", NeurIPS 2019, section 3, https://arxiv.org/abs/1902.06156.
- IPM: Xie, Koyejo and Gupta, "Fall of Empires", UAI 2019, section 4, https://arxiv.org/abs/1903.03936.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from polyclinic.core import tree
from polyclinic.core.tree import Tree
from polyclinic.learning.batch import Batch


class Known(NamedTuple):
    """An attacker's knowledge of the honest updates of the round.

    Attributes:
        mean: Mean of the honest updates.
        deviation: Their sample standard deviation (n - 1) by coordinate.
        length: Root mean square of their lengths.
        honest: Number of honest updates.
        attackers: Number of colluding attackers.
    """

    mean: Tree
    deviation: Tree
    length: float
    honest: int
    attackers: int


@dataclass(frozen=True)
class Attack:
    """Base class of attacks, which does not change anything."""

    @property
    def spies(self) -> bool:
        """Whether the attacker needs the honest updates of the round before it sends its own."""
        return False

    def data(self, data: Any) -> Any:
        """Return the data on which the site trains instead of ``data``."""
        return data

    def update(self, own: Tree, known: Known | None, alone: torch.Generator, together: torch.Generator) -> Tree:
        """Return the update that the site sends instead of ``own``, its update after training.

        Args:
            known: The honest updates, if the attack needs them.
            alone: Random generator of this site.
            together: Random generator that all attackers share.
        """
        return own


@dataclass(frozen=True)
class LabelFlip(Attack):
    """Trains on wrong labels: class c becomes the last minus c, a 0 a 1, a mask its opposite.

    Attributes:
        classes: Number of classes.
    """

    classes: int = 2

    def data(self, data: Any) -> Any:
        """Return the same inputs with flipped targets."""
        return altered(data, lambda x, y, _: (x, self.flip(y)))

    def flip(self, y: Tensor) -> Tensor:
        """Return flipped targets."""
        return 1 - y if y.is_floating_point() else self.classes - 1 - y


@dataclass(frozen=True)
class Replacement(LabelFlip):
    """Trains on flipped labels and multiplies the update by ``size``, so that it replaces the mean of the others.

    Attributes:
        size: n / η for n sites and the server's learning rate η, to replace the model completely.
    """

    size: float = 10.0

    def update(self, own: Tree, known: Known | None, alone: torch.Generator, together: torch.Generator) -> Tree:
        """Return ``size · x``."""
        return tree.scale(own, self.size)


@dataclass(frozen=True)
class Backdoor(Attack):
    """Trains the model to predict ``target`` for images with a white corner, and otherwise correctly.

    Attributes:
        target: The predicted class.
        side: Number of pixels along each axis, or of features of a table, that the mark covers.
        share: Fraction of the examples that is marked.
        size: Factor of the update.
        value: Brightness of the mark.
    """

    target: int = 0
    side: int = 3
    share: float = 0.5
    size: float = 1.0
    value: float = 3.0

    def data(self, data: Any) -> Any:
        """Return the same data with a fraction of the examples, drawn once, marked and with the target ``target``."""
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
        chosen = order < round(self.share * len(data))

        def alter(x: Tensor, y: Tensor, index: Tensor) -> Batch:
            x, y, marked = x.clone(), y.clone(), chosen[index]
            x[marked], y[marked] = self.mark(x[marked]), torch.full_like(y[marked], self.target)
            return x, y

        return altered(data, alter)

    def mark(self, x: Tensor) -> Tensor:
        """Return the inputs ``x`` [b, C, *spatial] or [b, F] with the mark."""
        x = x.clone()
        corner = x
        for axis in range(2 if x.ndim > 2 else 1, x.ndim):
            side = min(self.side, x.shape[axis])
            corner = corner.narrow(axis, x.shape[axis] - side, side)
        corner.fill_(self.value)
        return x

    def update(self, own: Tree, known: Known | None, alone: torch.Generator, together: torch.Generator) -> Tree:
        """Return ``size · x``."""
        return tree.scale(own, self.size)


@dataclass(frozen=True)
class SignFlip(Attack):
    """Sends the negative update, multiplied by ``size``. Needs no knowledge."""

    size: float = 4.0

    def update(self, own: Tree, known: Known | None, alone: torch.Generator, together: torch.Generator) -> Tree:
        """Return ``-size · x``."""
        return tree.scale(own, -self.size)


@dataclass(frozen=True)
class Huge(Attack):
    """Sends the update multiplied by a million. Needs no knowledge; a wrong unit has the same effect."""

    size: float = 1e6

    def update(self, own: Tree, known: Known | None, alone: torch.Generator, together: torch.Generator) -> Tree:
        """Return ``size · x``."""
        return tree.scale(own, self.size)


@dataclass(frozen=True)
class Noise(Attack):
    """Sends Gaussian noise, ``size`` times as long as the update. Needs no knowledge."""

    size: float = 10.0

    def update(self, own: Tree, known: Known | None, alone: torch.Generator, together: torch.Generator) -> Tree:
        """Return ``size · ‖x‖ · u``, with u random of length 1."""
        return _random(own, self.size * tree.norm(own), alone)


@dataclass(frozen=True)
class NotANumber(Attack):
    """Sends one NaN in its update, as diverged training does. Needs no knowledge."""

    value: float = float("nan")

    def update(self, own: Tree, known: Known | None, alone: torch.Generator, together: torch.Generator) -> Tree:
        """Return x with its first coordinate replaced."""
        name = next(name for name, leaf in own.items() if leaf.numel())
        broken = own[name].clone()
        broken.view(-1)[0] = self.value
        return {**own, name: broken}


@dataclass(frozen=True)
class ALIE(Attack):
    """Stays within the usual range: every coordinate is as far from the mean as robust rules tolerate.

    Departure: here the attackers know the honest updates of the round. In the paper they estimate mean and deviation
    from the attackers' own data, so this attack is stronger.

    Attributes:
        z: Number of standard deviations; 0 for the largest that the paper's equation allows.
    """

    z: float = 0.0

    @property
    def spies(self) -> bool:
        """Always True."""
        return True

    def update(self, own: Tree, known: Known | None, alone: torch.Generator, together: torch.Generator) -> Tree:
        """Return ``μ - z σ``, with z such that ``Φ(z) < (n - m - s) / (n - m)`` and ``s = ⌊n/2 + 1⌋ - m``."""
        assert known is not None
        n, m = known.honest + known.attackers, known.attackers
        below = (n - m - (n // 2 + 1 - m)) / (n - m)
        z = self.z or (NormalDist().inv_cdf(min(max(below, 1e-3), 1 - 1e-3)))
        return tree.zip_with(lambda mean, deviation: mean - z * deviation, known.mean, known.deviation)


@dataclass(frozen=True)
class IPM(Attack):
    """Reverses the mean: every attacker sends the negative honest mean. Needs the honest updates.

    Attributes:
        size: ε. Small values evade distance-based rules; large values dominate the mean.
    """

    size: float = 0.5

    @property
    def spies(self) -> bool:
        """Always True."""
        return True

    def update(self, own: Tree, known: Known | None, alone: torch.Generator, together: torch.Generator) -> Tree:
        """Return ``-ε μ``."""
        assert known is not None
        return tree.scale(known.mean, -self.size)


@dataclass(frozen=True)
class Collusion(Attack):
    """All attackers send the same random update of honest length. Needs this length and coordination.

    Attributes:
        size: Its length relative to that of an honest update.
    """

    size: float = 1.0

    @property
    def spies(self) -> bool:
        """Always True: the length is needed."""
        return True

    def update(self, own: Tree, known: Known | None, alone: torch.Generator, together: torch.Generator) -> Tree:
        """Return ``size · length · u``, with the same random u of length 1 at all attackers."""
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
"""The attacks that a study may name under ``[attack]``; their fields are the options."""


Alter: TypeAlias = Callable[[Tensor, Tensor, Tensor], Batch]
"""Changes inputs [n, ...] and targets [n, ...] of the examples with the given numbers [n]."""


KEPT = ("patients", "targets", "patch", "shape", "mask_channels", "positions", "videos", "measured")
"""What is known of examples and does not change with them; classes are balanced by the ``targets`` of the data."""


class Altered:
    """Data whose examples pass through an attack, with all that is ``KEPT``."""

    def __init__(self, data: Any, alter: Alter) -> None:
        self.data, self.alter = data, alter
        for name in KEPT:
            if hasattr(data, name):
                setattr(self, name, getattr(data, name))

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: Tensor) -> Batch:
        x, y = self.data[index]
        return self.alter(x, y, index)


class AlteredCases(Altered):
    """Data of which patches are drawn, each of which passes through an attack."""

    def draw(self, i: int, *given: Any) -> Batch:
        """Return a changed patch of example ``i`` (``learning.training.minibatches.Sampler``)."""
        x, y = self.data.draw(i, *given)
        x, y = self.alter(x[None], y[None], torch.tensor([i]))
        return x[0], y[0]


def altered(data: Any, alter: Alter) -> Altered:
    """Return ``data`` with ``alter`` applied to its examples, and to patches of them."""
    return (AlteredCases if hasattr(data, "draw") else Altered)(data, alter)


def _random(like: Tree, length: float, rng: torch.Generator) -> Tree:
    """Draw a random direction with the shapes of ``like`` and the given length."""
    drawn = {name: torch.randn(leaf.shape, generator=rng).to(leaf.dtype) for name, leaf in like.items()}
    return tree.scale(drawn, length / max(tree.norm(drawn), 1e-300))
