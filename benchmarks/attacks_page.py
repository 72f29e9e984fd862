"""The attack study as Markdown, from its records."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Records = Mapping[tuple[str, int, str, str, int], Mapping[str, Any]]

HEAD = """# Attacks: what robust rules withstand, and what they cost

Written by `python benchmarks/attacks.py`; every number was measured, the script says how. Ten sites, of which some
attack in every round. **AUC lost** is in hundredths, beside the mean of ten honest sites under the same split; averaged
over the splits. The attackers of ALIE and IPM know every honest update, those of the collusion each other and the usual
length. Rules that ask for a share of corrupt sites were told 30 %, Bulyan 10 %, which is the most that ten sites allow
it. FLTrust trusts an honest site. *Bounded* means that updates are first scaled down to the median length.
"""


NAMED = """Whom the alarms name, out of ten sites: attackers found of all attackers, and honest sites named wrongly a
run. All rules and numbers of attackers together; runs that broke down left out.
"""

COST = """Without an attack: what a rule costs beside the mean, in hundredths of AUC for everyone and in points of
accuracy at the hospital that differs most (a positive number is a loss).
"""


def page(records: Records, rules: Sequence[str], attacks: Sequence[str], settings: Sequence[str]) -> str:
    """Tables of what was lost, who was named and what it cost."""
    text = [HEAD, ADVICE]
    for where in settings:
        seeds = sorted({key[1] for key in records if key[0] == where})
        text.append(f"## {where[0].upper()}{where[1:]}\n")
        honest = [records[where, seed, "mean", "", 0] for seed in seeds]
        auc, minority = (np.mean([row[k] for row in honest]) for k in ("auc", "minority"))
        says = (
            f"{len(seeds)} splits. The mean of ten honest sites: AUC {auc:.3f}, accuracy {100 * minority:.0f} % at the "
        )
        text.append(f"{says}hospital that differs most.\n")
        for f in sorted({key[4] for key in records} - {0}):
            shown = [a for a in attacks if any((where, s, rules[0], a, f) in records for s in seeds)]
            text.append(f"AUC lost with {f} of 10 attacking:\n")
            text.append(table(records, where, rules, shown, f, seeds))
        text.append(NAMED)
        text.append(named(records, where, attacks))
        text.append(COST)
        text.append(cost(records, where, rules, seeds))
    return "\n".join(text)


def table(
    records: Records, where: str, rules: Sequence[str], attacks: Sequence[str], f: int, seeds: Sequence[int]
) -> str:
    """Rules by attacks. The worst of a row is in bold."""
    rows = [f"| rule | {' | '.join(attacks)} |", "|---" * (len(attacks) + 1) + "|"]
    for rule in rules:
        lost = []
        for attack in attacks:
            gaps = [records[where, s, "mean", "", 0]["auc"] - records[where, s, rule, attack, f]["auc"] for s in seeds]
            lost.append(100 * float(np.mean(gaps)))
        cells = [f"**{x:.1f}**" if x == max(lost) else f"{x:.1f}" for x in lost]
        rows.append(f"| {rule} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def named(records: Records, where: str, attacks: Sequence[str]) -> str:
    """Attacks by whom the alarms name."""
    rows = ["| attack | attackers found | honest sites named a run |", "|---|---|---|"]
    for attack in ("", *attacks):
        found = [(key[4], row) for key, row in records.items() if key[0] == where and key[3] == attack]
        whole = [(f, row) for f, row in found if row["caught"] is not None]
        wronged = np.mean([row["wronged"] for _, row in whole])
        share = f"{100 * sum(row['caught'] for _, row in whole) / sum(f for f, _ in whole):.0f} %" if attack else ""
        rows.append(f"| {attack or 'none'} | {share} | {wronged:.1f} |")
    return "\n".join(rows) + "\n"


def cost(records: Records, where: str, rules: Sequence[str], seeds: Sequence[int]) -> str:
    """What each rule costs when nobody attacks."""
    rows = ["| rule | AUC lost | accuracy lost at the hospital that differs most | its sites among those named |",
            "|---|---|---|---|"]  # fmt: skip
    for rule in rules:
        pairs = [(records[where, s, "mean", "", 0], records[where, s, rule, "", 0]) for s in seeds]
        auc = 100 * np.mean([a["auc"] - b["auc"] for a, b in pairs])
        minority = 100 * np.mean([a["minority"] - b["minority"] for a, b in pairs])
        weak = sum(b["weak_wronged"] for _, b in pairs)
        rows.append(f"| {rule} | {auc:.1f} | {minority:.1f} | {weak} of {sum(b['wronged'] for _, b in pairs)} |")
    return "\n".join(rows) + "\n"


ADVICE = ""
