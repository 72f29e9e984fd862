"""What each site of an arm may spend on privacy, and what it has spent."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from polyclinic.privacy.accounting import epsilon, epsilon_rdp
from polyclinic.privacy.guarantee import guarantee
from polyclinic.privacy.ledger import Ledger
from polyclinic.studies.config.schema import PrivacySpec


def opened(folder: Path, sites: Iterable[str], data: str, budget: PrivacySpec) -> dict[str, Ledger]:
    """A ledger for each site in ``folder``; one that is there goes on."""
    folder.mkdir(exist_ok=True)
    ledgers = {site: Ledger(folder / f"{site}.jsonl") for site in sites}
    for site, ledger in ledgers.items():
        if not ledger.path.exists():
            ledger.begin(site=site, data=data, **budget.model_dump())
    return ledgers


def spent(ledgers: Mapping[str, Ledger], last: bool) -> dict[str, dict[str, Any]]:
    """ε of each site so far, as it is written down: Rényi's quick bound after a round, the sharp one at the end.

    Rényi's may lie beyond the budget, which the ledger never lets the spend do; then the budget is the bound. Beside ε
    stand δ, whom it protects, what is assumed, and the ledger's head, which proves later that nothing was taken away.
    """
    found = {}
    for site, ledger in ledgers.items():
        budget = ledger.budget()
        spends, delta, unit = ledger.spends(), budget["delta"], budget["unit"]
        bound = epsilon(spends, delta, unit) if last else epsilon_rdp(spends, delta, unit)
        whom = guarantee(spends, unit)
        facts = {"delta": delta, "by": "pld" if last else "rdp", "ledger": ledger.head()}
        found[site] = {"epsilon": min(bound, budget["epsilon"]), **facts, **whom.facts(), "protects": whom.short}
    return found
