"""Privacy budget and spending of each site of a method run."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from polyclinic.privacy.accounting import epsilon, epsilon_rdp
from polyclinic.privacy.guarantee import guarantee
from polyclinic.privacy.ledger import Ledger
from polyclinic.studies.config.schema import PrivacySpec


def opened(folder: Path, sites: Iterable[str], data: str, budget: PrivacySpec) -> dict[str, Ledger]:
    """Open the ledger of each site in ``folder``, and create those that do not exist."""
    folder.mkdir(exist_ok=True)
    ledgers = {site: Ledger(folder / f"{site}.jsonl") for site in sites}
    for site, ledger in ledgers.items():
        if not ledger.path.exists():
            ledger.begin(site=site, data=data, **budget.model_dump())
    return ledgers


def spent(ledgers: Mapping[str, Ledger], last: bool) -> dict[str, dict[str, Any]]:
    """Return ε of each site so far: the fast Rényi bound after a round, the tight bound at the end.

    The Rényi bound can exceed the budget, although the ledger never allows spending more; then ε is the budget. Each
    entry also contains δ, the protected unit, the assumptions, and the head of the ledger, by which a later removal of
    entries is detected.
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
