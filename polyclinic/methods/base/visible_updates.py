"""Replies with one site's change and its number of training examples, for servers that weigh each site by itself."""

from typing import TypeVar

import torch
from torch import Tensor

from polyclinic.core import tree
from polyclinic.core.aggregates import WEIGHT, PerSite, PerSiteUniform, Reply, require_weight
from polyclinic.core.method import Capabilities, Method
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees

State = TypeVar("State")


class VisibleUpdates(Method[State]):
    """A method whose server sees the change of each site."""

    capabilities = Capabilities(needs_each_reply=True)

    def visible(self, change: Tree, site: Site) -> Reply:
        """Return the reply of ``site`` with its ``change``."""
        examples = torch.tensor(float(len(site.data["train"])))
        return Reply({"update": PerSiteUniform({site.name: {**change, WEIGHT: examples}})})

    def received(self, reply: Reply) -> tuple[Trees, Tensor]:
        """Return the changes by site, in the order of their names, and the numbers of examples: float64 [K].

        Raises:
            Weightless: If no site has an example.
        """
        sent = reply.gather("update")
        changes = {site: tree.select(sent[site], lambda name: name != WEIGHT) for site in sorted(sent)}
        sizes = require_weight(PerSite(sent).stated_weights())
        return changes, torch.tensor([sizes[site] for site in changes], dtype=torch.float64)
