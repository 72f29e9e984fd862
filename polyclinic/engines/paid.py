"""A policy with a privacy budget: what it lets leave is paid for first, from the site's ledger of that data set."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polyclinic.core.method import Ask, Method
from polyclinic.core.site import Site
from polyclinic.core.stats import Gather, Reply
from polyclinic.engines.describe import JOB
from polyclinic.engines.policy import BadPolicy, Enforced, Privacy
from polyclinic.transforms.budget import Budget
from polyclinic.transforms.ledger import Ledger

DECIMALS = 2


def coarse(reply: Reply, min_cell: int) -> Reply:
    """``reply`` with scores rounded to two decimals and their number of patients to a multiple of ``min_cell``.

    Scores are not paid for from a budget. Rounded, and counted by the schedule, they are no exact oracle.
    """
    score = reply.parts.get("score")
    if not isinstance(score, Gather):
        return reply
    items = {site: {name: _coarse(name, leaf, min_cell) for name, leaf in leaves.items()}
             for site, leaves in score.items.items()}  # fmt: skip
    return Reply({**reply.parts, "score": Gather(items)})


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
    def of(cls, rules: Enforced, privacy: Privacy, ledger: Ledger, site: str, data: str) -> "Paid":
        """With the budget of the policy; the ledger is begun with it, and another ε is noted as a person's decision.

        Raises:
            BadPolicy: Where the ledger counts for another unit or with another δ.
        """
        if not ledger.path.exists() and not ledger.path.with_name(f"{ledger.path.name}.head").exists():
            ledger.begin(site=site, data=data, **privacy.model_dump())
        known = ledger.budget()
        if (known["unit"], known["delta"]) != (privacy.unit, privacy.delta):
            raise BadPolicy(f"privacy: {ledger.path.name} counts for every {known['unit']} with delta = "
                            f"{known['delta']:g}, and a ledger cannot be recounted: set both back")  # fmt: skip
        if known["epsilon"] != privacy.epsilon:
            ledger.raise_budget(privacy.epsilon, "policy.toml says so")
        return cls(rules, Budget(ledger, ("score", "predict", JOB)))

    def admit(self, method: Method[Any], ask: Ask, site: Site) -> None:
        """Asks the rules, and begins to count."""
        self.rules.admit(method, ask, site)
        self.budget.admit(method, ask, site)

    def release(self, method: Method[Any], ask: Ask, reply: Reply, site: Site) -> None:
        """Asks the rules, and pays."""
        self.rules.release(method, ask, reply, site)
        self.budget.release(method, ask, reply, site)
