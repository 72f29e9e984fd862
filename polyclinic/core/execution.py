"""What every engine runs at a site."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from polyclinic.core.aggregates import Reply
from polyclinic.core.method import Method, Request
from polyclinic.core.site import Site
from polyclinic.core.tree import Trees
from polyclinic.errors import PolicyRefusal


class Refused(PolicyRefusal):
    """A site's policy does not allow what was asked, or what would be sent. The message says why and what to do."""


class Policy(Protocol):
    """What a site allows. It reads the values at hand, not declarations about them, and raises ``Refused``."""

    def admit(self, method: Method[Any], request: Request, site: Site) -> None:
        """Before anything runs."""

    def release(self, method: Method[Any], request: Request, reply: Reply, site: Site) -> None:
        """Before anything leaves."""


class Open:
    """The policy of a simulation: everything is allowed."""

    def admit(self, method: Method[Any], request: Request, site: Site) -> None:
        """Allows it."""

    def release(self, method: Method[Any], request: Request, reply: Reply, site: Site) -> None:
        """Allows it."""


def execute(
    method: Method[Any], request: Request, memory: Trees, site: Site, policy: Policy | None = None
) -> tuple[Reply, Trees]:
    """Does what ``request`` says at ``site``, within its ``policy``.

    Raises:
        Refused: Where the policy does not allow it; nothing has left the site, and its memory is unchanged.
    """
    policy, mine = policy or Open(), request.for_site(site.name)
    policy.admit(method, mine, site)
    reply, kept = method.site_update(mine, memory, site)
    policy.release(method, mine, reply, site)
    return reply, kept


def sample_sites(sites: Sequence[str], size: int, round: int, seed: int = 0) -> Sequence[str]:
    """``size`` of ``sites``, drawn afresh and without replacement for each round, in name order."""
    import torch

    if size >= len(sites):
        return sorted(sites)
    rng = Site("server", seed=seed).rng("cohort", round)
    chosen = torch.randperm(len(sites), generator=rng)[:size].tolist()
    return sorted(sites[i] for i in chosen)


@dataclass(frozen=True)
class UniformSampler:
    """A cohort of ``size`` of the sites that train, drawn afresh for each round; all of them where they are no more."""

    trainers: tuple[str, ...]
    size: int
    seed: int = 0

    def __call__(self, sites: Sequence[str], round: int) -> Sequence[str]:
        """Who is asked in ``round``."""
        return sample_sites(self.trainers, self.size, round, self.seed)
