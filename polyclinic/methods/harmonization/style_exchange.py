"""Training on images in the styles of other sites, which a bank holds. The common part of AdaIN and FDA.

Every site sends the styles of some of its images once; in training, an image takes a random style of another site.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from polyclinic.core.aggregates import PerSite, Reply
from polyclinic.core.job_enumeration import once
from polyclinic.core.method import Job, Request
from polyclinic.core.serialization import savable
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.errors import ConfigError
from polyclinic.learning.batch import Batch
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.training.local import LocalTraining
from polyclinic.methods.base.site_weights import SizeWeighted


@savable("style-exchange.State", 1)
class State(NamedTuple):
    """The model, and the styles of each site's images: ``style`` [m, C, ...]."""

    round: int
    params: Tree
    bank: Trees


@dataclass(frozen=True)
class StyleExchange(SizeWeighted[State]):
    """FedAvg on images of which some have the style of an image of another site.

    Attributes:
        share: The fraction of a site's images whose styles enter the bank.
        probability: Probability with which an image changes its style.
        uniform: Whether all sites have equal weight, instead of in proportion to their training examples.
    """

    task: Task
    local: LocalTraining = LocalTraining()
    share: float = 0.125
    probability: float = 0.5
    uniform: bool = False

    def __post_init__(self) -> None:
        if len(self.task.network.inputs) < 3:
            raise ConfigError(f"a style needs images or volumes, not inputs of shape {self.task.network.inputs}")
        if not 0 < self.share <= 1 or not 0 <= self.probability <= 1:
            raise ConfigError(
                f"share must be above 0 and at most 1, and probability between 0 and 1, not {self.share:g} and "
                f"{self.probability:g}"
            )

    def styles(self, x: Tensor) -> Tensor:
        """Return the styles [b, C, ...] of the images ``x`` [b, C, *spatial]."""
        raise NotImplementedError

    def restyled(self, x: Tensor, style: Tensor) -> Tensor:
        """Return the images ``x`` [b, C, *spatial] in the styles ``style`` [b, C, ...]."""
        raise NotImplementedError

    needs_each_reply = True

    def init(self, params: Tree) -> State:
        return State(0, params, {})

    @property
    def jobs(self) -> tuple[Job, ...]:
        return once("styles"), Job("train")

    def request(self, state: State) -> Request:
        known = {f"bank.{name}": leaves for name, leaves in state.bank.items()}
        return Request(state.round, {"params": state.params, **known}, "train" if known else "styles")

    def site_update(self, request: Request, memory: Trees, site: Site) -> tuple[Reply, Trees]:
        start, data = request.trees["params"], site.data["train"]
        if request.job == "styles":
            count = max(1, int(self.share * len(data)))
            chosen = torch.randperm(len(data), generator=site.rng(request.round, "styles"))[:count]
            return Reply({"bank": PerSite({site.name: {"style": self.styles(data[chosen][0])}})}), memory
        others = [t["style"] for n, t in request.trees.items() if n not in ("params", f"bank.{site.name}")]
        bank = torch.cat(others) if others else torch.zeros(0)

        def augment(batch: Batch, rng: torch.Generator) -> Batch:
            x, y = self.local.augment(batch, rng) if self.local.augment else batch
            if not len(bank):
                return x, y
            style = bank[torch.randint(len(bank), (len(x),), generator=rng)].to(x)
            changes = (torch.rand(len(x), generator=rng) < self.probability).view(-1, *[1] * (x.ndim - 1))
            return torch.where(changes, self.restyled(x, style), x), y

        end = replace(self.local, augment=augment).fit(self.task, start, site, request.round)
        return Reply({"update": self.update(end, start, site)}), memory

    def server_update(self, state: State, reply: Reply, server: Site) -> State:
        if not state.bank:
            return state._replace(bank=dict(reply.gather("bank")))
        return State(state.round + 1, reply.mean("update").apply_to(state.params), state.bank)

    def evaluation_request(self, state: State) -> Request:
        return Request(state.round, {"params": state.params})
