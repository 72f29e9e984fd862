"""Optimizer state that sites keep between rounds.

Local training begins each round with a new optimizer. A momentum of 0.99 needs some hundred steps to build up, so that
short rounds would train with another optimizer than the one that was chosen. Sites that keep the state continue with
it; it is part of the site state, which never leaves a site. Departure from FedAvg: the momentum of a site is that of
its own earlier rounds, although its model is replaced by the server's.
"""

from dataclasses import dataclass
from typing import Any, Final

from polyclinic.core.aggregates import Reply
from polyclinic.core.method import Method, MethodWrapper, Request, State
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.learning.training.optimizers import optimizer_memory

PREFIX: Final = "optimizer:"
OWN_OPTIMIZERS: Final = frozenset({"apfl", "fed-align", "fedharmony", "fl-mrcm", "pfedme"})
"""Methods that take individual training steps with optimizers of their own, which begin anew each round."""


@dataclass(frozen=True)
class KeptOptimizer(MethodWrapper[State]):
    """A method whose sites keep the state of their optimizers.

    Attributes:
        inner: A method that trains with ``LocalTraining.fit``. Its state is unchanged.
    """

    inner: Method[Any]

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        """Run the inner method's site update with the optimizer states in ``memory``."""
        kept = {name.removeprefix(PREFIX): leaves for name, leaves in memory.items() if name.startswith(PREFIX)}
        with optimizer_memory(kept):
            reply, own = self.inner.site_update(request, _without(memory), site)
        return reply, {**own, **{PREFIX + name: leaves for name, leaves in kept.items()}}

    def site_model(self, request: Request, memory: Trees) -> Tree:
        """Return the inner method's site model."""
        return self.inner.site_model(request, _without(memory))

    def adapted_model(self, request: Request, memory: Trees, site: Site, role: str) -> Tree:
        """Return the inner method's adapted model."""
        return self.inner.adapted_model(request, _without(memory), site, role)


def _without(memory: Trees) -> Trees:
    """Return the inner method's part of a site state."""
    return {name: leaves for name, leaves in memory.items() if not name.startswith(PREFIX)}
