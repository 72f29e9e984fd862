"""A policy with a privacy budget: what it lets leave is paid for first, from the site's ledger of that data set."""

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
    """``reply`` with scores rounded to two decimals and their number of patients to a multiple of ``min_cell``.

    Scores are not paid for from a budget. Rounded, and counted by the schedule, they are no exact oracle.
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
    """A policy whose replies are paid for, before they leave, from the ledger of a data set.

    Attributes:
        rules: What else is asked first.
    """

    rules: Enforced
    budget: Budget

    @classmethod
    def of(cls, rules: Enforced, ledger: Ledger) -> "Paid":
        """With the budget of ``ledger``. Predictions, which the policy alone may let leave, are not paid for."""
        return cls(rules, Budget(ledger, (*SCORES, *PREDICTIONS)))

    def admit(self, method: Method[Any], request: Request, site: Site) -> None:
        """Asks the rules, and begins to count."""
        self.rules.admit(method, request, site)
        if not _surveys(method, request):
            self.budget.admit(method, request, site)

    def release(self, method: Method[Any], request: Request, reply: Reply, site: Site) -> None:
        """Asks the rules, and pays."""
        self.rules.release(method, request, reply, site)
        if not _surveys(method, request):
            self.budget.release(method, request, reply, site)


def _surveys(method: Method[Any], request: Request) -> bool:
    """Whether this is the survey, by who answers: any method could answer a job of that name with anything."""
    return isinstance(method, Describe) and request.job == JOB
