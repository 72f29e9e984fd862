"""What each site of an arm may spend on privacy, and what it has spent."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from polyclinic.studies.parts import PrivacySpec
from polyclinic.transforms.accounting import epsilon_rdp
from polyclinic.transforms.ledger import Ledger


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

    Rényi's may lie beyond the budget, which the ledger never lets the spend do; then the budget is the bound.
    """
    found = {}
    for site, ledger in ledgers.items():
        budget = ledger.budget()
        bound = ledger.spent().epsilon if last else epsilon_rdp(ledger.spends(), budget["delta"])
        facts = {"delta": budget["delta"], "unit": budget["unit"], "by": "pld" if last else "rdp"}
        found[site] = {"epsilon": min(bound, budget["epsilon"]), **facts}
    return found
