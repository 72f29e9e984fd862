"""Observation of one job at one site: its reply, spends, and inputs of mechanisms, with substitutes for noise."""

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
from polyclinic.learning.threads import one_thread


@dataclass(frozen=True)
class Seen:
    """The observed execution of a job.

    Attributes:
        reply: The reply; None if the job failed, with the reason in ``lost``.
        lost: Reason of a failure.
        memory: The new site state.
        spent: The metered spends.
        uses: The inputs of each use of a mechanism.
    """

    reply: Reply | None
    lost: str
    memory: Trees
    spent: tuple[Spend, ...]
    uses: tuple[Use, ...]


class Repeated:
    """Reproducible entropy: the same calls in the same order return the same bytes; longer results extend shorter."""

    def __init__(self, *key: object) -> None:
        self._key, self._calls = repr(key).encode(), itertools.count()

    def __call__(self, size: int) -> bytes:
        return hashlib.shake_128(self._key + next(self._calls).to_bytes(8)).digest(size)


def observed(
    method: Method[Any], request: Request, memory: Trees, site: Site, key: tuple[object, ...], scale: float = 1.0
) -> Seen:
    """Execute ``request`` at ``site``, with secrets from ``key``, and substitutes of ``scale`` times the noise."""
    uses: list[Use] = []

    def stand_in(use: Use, noise: Noise) -> Tree:
        # A copy, because the caller may reuse the memory of the value
        uses.append(replace(use, value={name: leaf.detach().clone() for name, leaf in use.value.items()}))
        return stand_in_for(use, (*key, len(uses)), scale)

    site = replace(site, entropy=Repeated(*key))
    try:
        with one_thread(), audited(stand_in), metered() as spent:
            reply, state = execute(method, request, memory, site)
        return Seen(reply, "", state, tuple(spent), tuple(uses))
    except Exception as error:
        return Seen(None, f"{type(error).__name__}: {error}", memory, (), tuple(uses))


def stand_in_for(use: Use, key: tuple[object, ...], scale: float = 1.0) -> Tree:
    """Return numbers in the form of ``use.value`` that depend on ``key`` alone, of ``scale`` times the noise."""
    substitutes: dict[str, torch.Tensor] = {}
    for name, leaf in use.value.items():
        seed = int.from_bytes(hashlib.blake2b(repr((key, name)).encode(), digest_size=7).digest())
        drawn = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        size = use.bound or use.deviations.get(name, 0.0)
        substitutes[name] = (drawn * size * scale).to(leaf.dtype).to(leaf.device)
    return substitutes
