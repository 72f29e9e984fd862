"""A policy with a privacy budget: what it lets leave is paid for first, from the site's ledger of that data set."""

from dataclasses import dataclass
from typing import Any

from polyclinic.core.method import Ask, Method
from polyclinic.core.site import Site
from polyclinic.core.stats import Reply
from polyclinic.engines.describe import JOB, Describe
from polyclinic.engines.policy import BadPolicy, Enforced, Privacy
from polyclinic.transforms.budget import Budget
from polyclinic.transforms.ledger import Ledger


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
        return cls(rules, Budget(ledger))

    def admit(self, method: Method[Any], ask: Ask, site: Site) -> None:
        """Asks the rules, and begins to count."""
        self.rules.admit(method, ask, site)
        if not _surveys(method, ask):
            self.budget.admit(method, ask, site)

    def release(self, method: Method[Any], ask: Ask, reply: Reply, site: Site) -> None:
        """Asks the rules, and pays."""
        self.rules.release(method, ask, reply, site)
        if not _surveys(method, ask):
            self.budget.release(method, ask, reply, site)


def _surveys(method: Method[Any], ask: Ask) -> bool:
    """Whether this is the survey, by who answers: any method could answer a job of that name with anything."""
    return isinstance(method, Describe) and ask.job == JOB
