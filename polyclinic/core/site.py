"""A client site as a method sees it."""

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Compute:
    """How a site computes. It is a property of the site's machine, not of a study.

    Attributes:
        threads: Number of threads that prepare training samples; they change no bit of a result.
        channels_last: Whether images are stored with channels last, which is faster on some devices.
        compile: Whether networks are compiled by ``torch.compile`` before training.
    """

    threads: int = 0
    channels_last: bool = False
    compile: bool = False


@dataclass(frozen=True)
class Site:
    """A client site: its data sets, compute device and random generators.

    Attributes:
        name: A stable identifier, such as ``"cleveland"``.
        data: Data by role: ``"train"``, ``"val"``, ``"test"``, ``"unlabeled"``; each has a length and yields
            (inputs, targets) when indexed by a tensor of positions.
        device: The compute device of the site, such as ``"cpu"`` or ``"cuda:0"``.
        seed: The study's seed, from which every reproducible random number at the site follows.
        entropy: Returns ``n`` unpredictable bytes, from which secrets are made. Replaced only in tests.
        compute: How the site computes.
    """

    name: str
    data: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    seed: int = 0
    entropy: Callable[[int], bytes] = os.urandom
    compute: Compute = Compute()

    def rng(self, *key: int | str) -> torch.Generator:
        """Return a generator that depends only on the study's seed, the site and ``key``."""
        text = repr((self.seed, self.name, *key)).encode()
        seed = int.from_bytes(hashlib.blake2b(text, digest_size=7).digest())
        return torch.Generator().manual_seed(seed)

    def secret_rng(self) -> "SecretRng":
        """Return a generator for privacy noise and masks, independent of any seed and different on every call."""
        return SecretRng(self.entropy)


class SitesOnDemand(Mapping[str, Site]):
    """Sites that are built at each access and not kept, for simulations of more sites than memory could hold.

    Engines on one machine accept them in place of a mapping of sites.
    """

    def __init__(self, names: Iterable[str], build: Callable[[str], Site]) -> None:
        """Name the sites. ``build`` returns a site by name, with the same data each time."""
        self._names, self._build = dict.fromkeys(names), build

    def __getitem__(self, name: str) -> Site:
        """Build the site ``name``."""
        self._names[name]  # an unknown name is a KeyError here too
        return self._build(name)

    def __iter__(self) -> Iterator[str]:
        """Return the names."""
        return iter(self._names)

    def __len__(self) -> int:
        """Return the number of sites."""
        return len(self._names)


@dataclass(frozen=True)
class SecretRng:
    """Random numbers from the operating system, not reproducible from a seed."""

    entropy: Callable[[int], bytes] = os.urandom

    def uniform(self, size: int) -> Tensor:
        """Draw ``size`` numbers from (0, 1): the midpoints of 2⁵² equal intervals. Shape [size], float64."""
        bits = torch.frombuffer(bytearray(self.entropy(8 * size)), dtype=torch.int64) if size else torch.zeros(0)
        return ((bits.long() >> 12 & (2**52 - 1)).double() + 0.5) / 2**52

    def normal(self, *shape: int) -> Tensor:
        """Draw standard normal numbers by the Box-Muller transform. Shape [*shape], float64."""
        size = math.prod(shape)
        half = (size + 1) // 2
        radius, angle = (-2 * self.uniform(half).log()).sqrt(), 2 * math.pi * self.uniform(half)
        return torch.cat([radius * angle.cos(), radius * angle.sin()])[:size].reshape(shape)
