"""Site weights in a mean: in proportion to the number of training examples, or equal."""

from typing import TypeVar

from polyclinic.core import tree
from polyclinic.core.aggregates import WeightedMean
from polyclinic.core.method import Capabilities, Method
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree

State = TypeVar("State")


class SizeWeighted(Method[State]):
    """A method that weights each site by its number of training examples, or all equally if ``uniform``.

    Attributes:
        uniform: Whether all sites have equal weight, instead of in proportion to their training examples.
    """

    uniform: bool

    @property
    def needs_each_reply(self) -> bool:
        """Whether the server needs the reply of each site, so that their sum does not suffice."""
        return False

    @property
    def capabilities(self) -> Capabilities:
        """Whether the server needs each reply, and whether all sites have equal weight."""
        return Capabilities(needs_each_reply=self.needs_each_reply, uniform=self.uniform)

    def site_weight(self, site: Site) -> float:
        """Return the weight of ``site`` in a mean."""
        return 1.0 if self.uniform else float(len(site.data["train"]))

    def update(self, end: Tree, start: Tree, site: Site) -> WeightedMean:
        """Return the change from ``start`` to ``end`` at ``site``, with the site's weight."""
        return WeightedMean.of_own(tree.sub(end, start), self.site_weight(site))
