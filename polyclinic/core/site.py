"""A site: one hospital as a method sees it."""

import hashlib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Site:
    """The data, the device and the dice of one place.

    Attributes:
        name: A stable identifier, such as ``"cleveland"``.
        data: Data by role: ``"train"``, ``"val"``, ``"test"``, ``"unlabeled"``; each has a length and yields
            (inputs, targets) when indexed by a tensor of positions.
        device: Where computation at this site happens.
        seed: The study's seed. Every reproducible random number at the site follows from it.
        entropy: Where secrets come from: ``n`` bytes that nobody can predict. Replaced only by tests.
    """

    name: str
    data: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    seed: int = 0
    entropy: Callable[[int], bytes] = os.urandom

    def rng(self, *key: int | str) -> torch.Generator:
        """A generator that depends on the study, the site and ``key``, and on nothing else."""
        text = repr((self.seed, self.name, *key)).encode()
        seed = int.from_bytes(hashlib.blake2b(text, digest_size=7).digest())
        return torch.Generator().manual_seed(seed)

    def secret_rng(self) -> "SecretRng":
        """Dice for privacy noise and masks: unrelated to any seed, never the same twice."""
        return SecretRng(self.entropy)


@dataclass(frozen=True)
class SecretRng:
    """Random numbers from the operating system, which no seed reproduces."""

    entropy: Callable[[int], bytes] = os.urandom

    def uniform(self, size: int) -> Tensor:
        """``size`` numbers in (0, 1), never 0 or 1: the middles of 2⁵² equal parts. Shape [size], float64."""
        bits = torch.frombuffer(bytearray(self.entropy(8 * size)), dtype=torch.int64) if size else torch.zeros(0)
        return ((bits.long() >> 12 & (2**52 - 1)).double() + 0.5) / 2**52

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers by Box and Muller's transform. Shape [*shape], float64."""
        size = math.prod(shape)
        half = (size + 1) // 2
        radius, angle = (-2 * self.uniform(half).log()).sqrt(), 2 * math.pi * self.uniform(half)
        return torch.cat([radius * angle.cos(), radius * angle.sin()])[:size].reshape(shape)
