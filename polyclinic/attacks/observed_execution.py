"""One job at one site, observed: what left, what it spent, and what mechanisms were given, with stand-ins for noise."""

import hashlib
import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch

from polyclinic.core.aggregates import Reply
from polyclinic.core.execution import execute
from polyclinic.core.metering import Noise, Spend, Use, audited, metered
from polyclinic.core.method import Method, Request
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees


@dataclass(frozen=True)
class Seen:
    """What was observed.

    Attributes:
        reply: What would have left; None where the job failed, and then ``lost`` says why.
        memory: What the site keeps.
        spent: What was metered. ``uses``: what each use of a mechanism was given.
    """

    reply: Reply | None
    lost: str
    memory: Trees
    spent: tuple[Spend, ...]
    uses: tuple[Use, ...]


class Repeated:
    """Entropy that repeats itself: the same calls in the same order give the same bytes; longer ones begin alike."""

    def __init__(self, *key: object) -> None:
        self._key, self._calls = repr(key).encode(), itertools.count()

    def __call__(self, size: int) -> bytes:
        return hashlib.shake_128(self._key + next(self._calls).to_bytes(8)).digest(size)


def observed(
    method: Method[Any], request: Request, memory: Trees, site: Site, key: tuple[object, ...], scale: float = 1.0
) -> Seen:
    """Does ``request`` at ``site``, whose secrets follow from ``key``, with stand-ins ``scale`` times the noise."""
    uses: list[Use] = []

    def stand_in(use: Use, noise: Noise) -> Tree:
        # A copy: whoever made the value may reuse its memory
        uses.append(replace(use, value={name: leaf.detach().clone() for name, leaf in use.value.items()}))
        return stand_in_for(use, (*key, len(uses)), scale)

    site = replace(site, entropy=Repeated(*key))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in one order
    try:
        with audited(stand_in), metered() as spent:
            reply, kept = execute(method, request, memory, site)
        return Seen(reply, "", kept, tuple(spent), tuple(uses))
    except Exception as error:
        return Seen(None, f"{type(error).__name__}: {error}", memory, (), tuple(uses))
    finally:
        torch.set_num_threads(threads)


def stand_in_for(use: Use, key: tuple[object, ...], scale: float = 1.0) -> Tree:
    """Numbers of the form of ``use.value`` that depend on ``key`` alone, ``scale`` times as large as the noise."""
    found: dict[str, torch.Tensor] = {}
    for name, leaf in use.value.items():
        seed = int.from_bytes(hashlib.blake2b(repr((key, name)).encode(), digest_size=7).digest())
        drawn = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        size = use.bound or use.deviations.get(name, 0.0)
        found[name] = (drawn * size * scale).to(leaf.dtype).to(leaf.device)
    return found
