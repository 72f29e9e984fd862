"""The attack study as Markdown, from its records."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

Records = Mapping[tuple[str, int, str, str, int], Mapping[str, Any]]

LIMITS = """**Limits.** The attackers are drawn once per split, of which there are two and one: no difference between two rules has an
interval, and none is tested. The deviation of a cell over splits is {:.1f} at the median; differences of one hundredth mean nothing.
The strength of every attack is fixed (four or ten times the update, IPM with 0.5): an attacker who adapts to the rule was not
tried, so these are the losses under eight fixed attacks and not what a rule withstands. AUC is that of all sites' patients
together, which the name of the hospital alone raises to 0.72 on heart disease: compare the losses, not the levels.
"""
HEAD = """# Attacks: what robust rules withstood of eight fixed attacks

Written by `python benchmarks/attacks.py`; every number was measured as the script describes, part of them with PyTorch 2.11
and the others with 2.13. There are ten sites, of which some
attack in every round. **AUC lost** is in hundredths, compared with the mean of ten honest sites under the same split, and averaged
over the splits. The attackers of ALIE and IPM know every honest update; those of the collusion know each other and the usual
norm. Rules that need a share of corrupt sites use 30 %, Bulyan 10 %, which is the largest share that ten sites allow.
FLTrust trusts an honest site. *Bounded* means that updates are first scaled down to the median norm.

Study files do the same with `[attack]`: `polyclinic panel run examples/attacks-heart.toml`, and `attacks-xrays.toml`, run
eleven aggregation rules in eighteen cases, with random draws of their own (some ten minutes on two cores; the X-rays took forty
on one shared core), and write tables with intervals. Their results agree with this page. The mean AUC over sites, from two seeds,
without an attack and under the worst attack by three of ten sites:

| rule | heart disease, 4 hospitals in 10 sites | chest X-rays, 10 simulated sites |
|---|---|---|
| mean | 0.83, 0.31 (replacement) | 0.90, 0.50 (sign flip) |
| mean, bounded | 0.83, 0.81 (replacement) | 0.89, 0.75 (sign flip) |
| krum | 0.84, 0.79 (IPM) | 0.87, 0.60 (IPM) |
| multi-krum | 0.84, 0.82 (IPM) | 0.89, 0.81 (IPM) |
| bulyan | 0.82, 0.80 (IPM) | 0.90, 0.77 (IPM) |
| median | 0.81, 0.81 (replacement) | 0.90, 0.82 (sign flip) |
| trimmed-mean | 0.82, 0.82 (replacement) | 0.90, 0.81 (replacement) |
| geometric-median | 0.83, 0.83 (ALIE) | 0.90, 0.78 (IPM) |
| centered-clipping | 0.83, 0.82 (sign flip) | 0.90, 0.70 (norm 10⁶) |
| fltrust | 0.85, 0.84 (sign flip) | 0.80, 0.77 (sign flip) |
| dos | 0.85, 0.77 (collusion) | 0.88, 0.77 (collusion) |

The X-ray sites have about 15 test patients each, so an interval is 12 points wide there. FLTrust trusts a site whose test
patients are all ill or all healthy. Without an attack, alarms name 4 of 20 honest sites of the hospitals, and 1 of
20 of the others.
"""


NAMED = """Sites that the alarms name, out of ten: the share of attackers that are found, and honest sites that are wrongly named per
run. All rules and numbers of attackers together, without runs that broke down.
"""

COST = """Without an attack: the cost of a rule compared with the mean, in hundredths of AUC for all sites and in points of
accuracy at the hospital that differs most (a positive number is a loss).
"""


def page(records: Records, rules: Sequence[str], attacks: Sequence[str], settings: Sequence[str]) -> str:
    """Return the page: tables of the loss, the named sites and the cost."""
    text = [
        HEAD,
        LIMITS.format(spread(records)),
    ]
    text += ["## Summary\n", summary(records, rules, settings), ADVICE]
    for where in settings:
        seeds = sorted({key[1] for key in records if key[0] == where})
        text.append(f"## {where[0].upper()}{where[1:]}\n")
        honest = [records[where, seed, "mean", "", 0] for seed in seeds]
        auc, minority = (np.mean([row[k] for row in honest]) for k in ("auc", "minority"))
        says = f"{len(seeds)} {'split' if len(seeds) == 1 else 'splits'}. The mean of ten honest sites: AUC {auc:.3f}, accuracy {100 * minority:.0f} % at the "
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


def whole(records: Records, wanted: Collection[tuple[str, int, str, str, int]]) -> Records:
    """Return the records of the splits for which all ``wanted`` cases are present."""
    partial = {(where, seed) for where, seed, *rest in wanted if (where, seed, *rest) not in records}
    return {case: records[case] for case in wanted if case[:2] not in partial}


def spread(records: Records) -> float:
    """Return the median over cells of the deviation over splits, in hundredths."""
    cells: dict[tuple[str, str, str, int], list[float]] = {}
    for (where, seed, rule, attack, f), row in records.items():
        if attack:
            gap = 100 * (records[where, seed, "mean", "", 0]["auc"] - row["auc"])
            cells.setdefault((where, rule, attack, f), []).append(gap)
    return float(np.median([np.std(gaps, ddof=1) for gaps in cells.values() if len(gaps) > 1] or [0.0]))


def summary(records: Records, rules: Sequence[str], settings: Sequence[str]) -> str:
    """A table of each rule's worst attack by number of attackers, over both federations, and its cost without an attack."""
    counts = sorted({key[4] for key in records} - {0})
    heads = [f"worst loss, {f} of 10" for f in counts]
    rows = [
        f"| rule | {' | '.join(heads)} | loss without attack, heart and X-rays | "
        "accuracy lost at the hospital that differs most, likewise |",
        "|---" * (len(counts) + 3) + "|",
    ]
    for rule in rules:
        cells = []
        for f in counts:
            found: dict[tuple[str, str], list[float]] = {}
            for (where, seed, name, attack, count), row in records.items():
                if (name, count) == (rule, f):
                    gap = 100 * (records[where, seed, "mean", "", 0]["auc"] - row["auc"])
                    found.setdefault((where, attack), []).append(gap)
            worst = max(found, key=lambda key: float(np.mean(found[key])))
            cells.append(f"{np.mean(found[worst]):.1f} ({worst[1]})")
        for key in ("auc", "minority"):
            lost = []
            for where in settings:
                seeds = sorted({k[1] for k in records if k[0] == where})
                pairs = [(records[where, s, "mean", "", 0][key], records[where, s, rule, "", 0][key]) for s in seeds]
                lost.append(f"{100 * np.mean([a - b for a, b in pairs]):.1f}")
            cells.append(" and ".join(lost))
        rows.append(f"| {rule} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


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
    """A table of attacks, with the sites that the alarms name."""
    rows = ["| attack | attackers found | honest sites named a run |", "|---|---|---|"]
    for attack in ("", *attacks):
        found = [(key[4], row) for key, row in records.items() if key[0] == where and key[3] == attack]
        whole = [(f, row) for f, row in found if row["caught"] is not None]
        wronged = np.mean([row["wronged"] for _, row in whole])
        share = f"{100 * sum(row['caught'] for _, row in whole) / sum(f for f, _ in whole):.0f} %" if attack else ""
        rows.append(f"| {attack or 'none'} | {share} | {wronged:.1f} |")
    return "\n".join(rows) + "\n"


def cost(records: Records, where: str, rules: Sequence[str], seeds: Sequence[int]) -> str:
    """A table of the cost of each rule without an attack."""
    rows = [
        "| rule | AUC lost | accuracy lost at the hospital that differs most | its sites among those named |",
        "|---|---|---|---|",
    ]
    for rule in rules:
        pairs = [(records[where, s, "mean", "", 0], records[where, s, rule, "", 0]) for s in seeds]
        auc = 100 * np.mean([a["auc"] - b["auc"] for a, b in pairs])
        minority = 100 * np.mean([a["minority"] - b["minority"] for a, b in pairs])
        weak = sum(b["weak_wronged"] for _, b in pairs)
        rows.append(f"| {rule} | {auc:.1f} | {minority:.1f} | {weak} of {sum(b['wronged'] for _, b in pairs)} |")
    return "\n".join(rows) + "\n"


ADVICE = """Recommendations for a federation of about ten hospitals:

1. **Let a person decide.** Without any attack the alarms still name honest sites, and every site that they named belongs
   to the hospital that differs most (the last tables). ALIE, IPM and a collusion of usual norm are never named. An
   alarm is therefore a reason to ask and not to exclude, and the absence of an alarm proves nothing. `polyclinic outliers RUN` shows
   every site.
2. **Do not use the plain mean.** One site of ten destroys it. Values that are not finite are refused before any rule and change
   no bit of the aggregate of the others; their cost is the loss of that site's patients.
3. **Robust means are close to one another.** The geometric median, centered clipping, the coordinate median, the
   trimmed mean and the mean bounded at the median norm lost at most two hundredths of AUC to one attacker and five to nine to three;
   two splits do not rank them. (The geometric median lost twelve to IPM in the study file's X-rays, the coordinate median
   eight to sign flips.) An earlier version of this page recommended the geometric median for differences of a hundredth; that
   recommendation is withdrawn.
4. **Krum, multi-Krum and Bulyan** withstand updates that are far away, but not IPM, whose updates are close. Multi-Krum and Bulyan first
   exclude the honest hospital that differs: it loses 18 points of accuracy, and up to 57 on the X-rays, at a threshold of one
   half that its own prevalence does not fit. How much of that an intercept of its own would restore was not measured.
5. **DOS needs its bound**, without which one huge update determines the model, **and does not withstand colluders**, whose
   equal updates look like the most usual ones. **FLTrust** loses least to three attackers, and most without an attack. It is
   favored: the trusted site is honest by construction, and never the one that differs.
6. No rule finds label flips reliably (a quarter of them are found). Examine validation results by site, not only updates.

The accuracy at the X-ray sites that differ is that of one split and a threshold of one half; interpret only large
differences.
"""
