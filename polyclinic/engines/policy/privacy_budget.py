"""Policy with a privacy budget: each release is first charged to the site's ledger of the data set."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polyclinic.core.aggregates import PerSite, Reply
from polyclinic.core.method import Method, Request
from polyclinic.core.site import Site
from polyclinic.engines.policy.site_policy import Enforced
from polyclinic.engines.site_description import JOB, Describe
from polyclinic.privacy.budget_policy import SCORES, Budget
from polyclinic.privacy.ledger import Ledger

DECIMALS = 2
PREDICTIONS = ("predict/test", "predict/val")


def coarse(reply: Reply, min_cell: int) -> Reply:
    """Round the scores in ``reply`` to two decimals and their numbers of patients to a multiple of ``min_cell``.

    Scores are not charged to a budget. Rounding, and the limited number of requests in the schedule, restrict what they
    reveal.
    """
    score = reply.parts.get("score")
    if not isinstance(score, PerSite):
        return reply
    items = {
        site: {name: _coarse(name, leaf, min_cell) for name, leaf in leaves.items()}
        for site, leaves in score.items.items()
    }
    return Reply({**reply.parts, "score": PerSite(items)})


def _coarse(name: str, leaf: Tensor, min_cell: int) -> Tensor:
    if name != "n":
        return torch.round(leaf, decimals=DECIMALS)
    step = max(min_cell, 1)
    return (torch.round(leaf / step) * step).clamp_min(step)


@dataclass(frozen=True)
class Paid:
    """A policy whose replies are charged to the ledger of a data set before they leave.

    Attributes:
        rules: The policy that is checked first.
        budget: The budget that is charged.
    """

    rules: Enforced
    budget: Budget

    @classmethod
    def of(cls, rules: Enforced, ledger: Ledger) -> "Paid":
        """Use the budget of ``ledger``. Predictions are not charged; the policy alone decides about them."""
        return cls(rules, Budget(ledger, (*SCORES, *PREDICTIONS)))

    def admit(self, method: Method[Any], request: Request, site: Site) -> None:
        """Check the rules, then start metering."""
        self.rules.admit(method, request, site)
        if not _surveys(method, request):
            self.budget.admit(method, request, site)

    def release(self, method: Method[Any], request: Request, reply: Reply, site: Site) -> None:
        """Check the rules, then charge the budget."""
        self.rules.release(method, request, reply, site)
        if not _surveys(method, request):
            self.budget.release(method, request, reply, site)


def _surveys(method: Method[Any], request: Request) -> bool:
    """Return whether this is the survey. The class decides, because any method could name a job like it."""
    return isinstance(method, Describe) and request.job == JOB
