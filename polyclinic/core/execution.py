"""Execution of a request at a site, shared by every engine."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from polyclinic.core.aggregates import Reply
from polyclinic.core.method import Method, Request
from polyclinic.core.site import Site
from polyclinic.core.tree import Trees
from polyclinic.errors import PolicyRefusal


class Refused(PolicyRefusal):
    """A site's policy does not allow a request or its reply. The message gives the reason and a remedy."""


class Policy(Protocol):
    """A site's policy. It checks the actual values, not declarations about them, and raises ``Refused``."""

    def admit(self, method: Method[Any], request: Request, site: Site) -> None:
        """Check a request before it is executed."""

    def release(self, method: Method[Any], request: Request, reply: Reply, site: Site) -> None:
        """Check a reply before it leaves the site."""


class Open:
    """The policy of a simulation: everything is allowed."""

    def admit(self, method: Method[Any], request: Request, site: Site) -> None:
        """Allow every request."""

    def release(self, method: Method[Any], request: Request, reply: Reply, site: Site) -> None:
        """Allow every reply."""


def execute(
    method: Method[Any], request: Request, memory: Trees, site: Site, policy: Policy | None = None
) -> tuple[Reply, Trees]:
    """Execute ``request`` at ``site`` under ``policy``; return the reply and the new site state.

    Raises:
        Refused: If the policy does not allow it. Nothing has left the site, and the site state is unchanged.
    """
    policy, mine = policy or Open(), request.for_site(site.name)
    policy.admit(method, mine, site)
    reply, kept = method.site_update(mine, memory, site)
    policy.release(method, mine, reply, site)
    return reply, kept


def sample_sites(sites: Sequence[str], size: int, round: int, seed: int = 0) -> Sequence[str]:
    """Draw ``size`` of ``sites`` without replacement, independently in each round; return them in name order."""
    import torch

    if size >= len(sites):
        return sorted(sites)
    rng = Site("server", seed=seed).rng("cohort", round)
    chosen = torch.randperm(len(sites), generator=rng)[:size].tolist()
    return sorted(sites[i] for i in chosen)


@dataclass(frozen=True)
class UniformSampler:
    """Draws ``size`` of the training sites in each round; selects all of them if there are no more than ``size``."""

    trainers: tuple[str, ...]
    size: int
    seed: int = 0

    def __call__(self, sites: Sequence[str], round: int) -> Sequence[str]:
        """Return the sites to ask in ``round``."""
        return sample_sites(self.trainers, self.size, round, self.seed)
