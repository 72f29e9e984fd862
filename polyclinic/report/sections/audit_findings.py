"""Results of attacks on the run's models: the lower bound on ε, and membership inference.

Importing this module loads PyTorch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from polyclinic.attacks.separation import RATES, Found, Rate
from polyclinic.evaluation.records.record_schema import rounded_up
from polyclinic.report.context import ReportContext
from polyclinic.report.formatting import NONE, interval, number, p_value
from polyclinic.report.page_blocks import Cell, Row, Table, Text, numbers, words
from polyclinic.studies.audits.audit_file import Audit, NotAnAudit, read_audit


def audit_blocks(page: ReportContext, files: Sequence[Path]) -> tuple[list[Any], set[str]]:
    """Return tables and verdicts of the audits in ``files``, and the labels of the audited methods."""
    found, damaged = list[Audit](), list[str]()
    for file in files:
        try:
            found.append(read_audit(file))
        except NotAnAudit as reason:
            damaged.append(str(reason))
    blocks: list[Any] = [Text(reason) for reason in damaged]
    if found:
        blocks += [*_bounds(page, found), _members(page, found)]
        blocks += [Text(text) for audit in found for text in _verdicts(page, audit)]
    return blocks, {audit.method for audit in found}


def _bounds(page: ReportContext, found: Sequence[Audit]) -> list[Table]:
    """Return the table of lower bounds on ε and claims."""
    rows: list[Row] = []
    for audit in found:
        if (one := audit.privacy) is not None:
            says = {True: "not contradicted", False: "contradicted", None: "inconclusive"}[one.holds]
            rows.append(
                {
                    "method": page.title(audit.method),
                    "site": audit.privacy_site,
                    "seed": str(audit.seed),
                    "claimed": Cell(rounded_up(one.claimed), one.claimed),
                    "bound": Cell(number(one.at_least, 2), one.at_least),
                    "control": Cell(number(one.control, 2), one.control),
                    "delta": f"{one.delta:g}",
                    "unit": one.unit,
                    "rounds": str(one.rounds),
                    "canaries": str(one.canaries),
                    "claim": says,
                }
            )
    if not rows:
        return []
    columns = words(method="Method", site="Site") + numbers(
        seed="Seed", claimed="Claimed ε", bound="ε at least", control="Without noise", delta="δ"
    )
    columns += words(unit="Unit of privacy") + numbers(rounds="Rounds", canaries="Canaries") + words(claim="Claim")
    note = (
        "Training was repeated with canaries, and the server’s view was used to guess which of them were included. The "
        "lower bound holds with 95 % confidence (Steinke, Nasr and Jagielski 2023) and is often far below the true ε. "
        "A bound above the claim refutes the claim; a bound below it does not confirm it. ‘Without noise’ is the same "
        "audit of training without noise: a claim above this value could not have been refuted."
    )
    marks = {i: "warn" for i, row in enumerate(rows) if row["claim"] == "contradicted"}
    return [Table("audit-epsilon", "Claimed ε and audited lower bound.", columns, rows, note, marks)]


def _members(page: ReportContext, found: Sequence[Audit]) -> Table:
    """Return the table of every attack at every site."""
    rows: list[Row] = []
    for audit in found:
        adjusted = audit.membership.verdict.adjusted
        for site, attacks in audit.membership.sites.items():
            for attack, one in attacks.items():
                area, exposed = adjusted[site, attack]
                rows.append(
                    {
                        "method": page.title(audit.method),
                        "site": site,
                        "attack": attack,
                        "seed": str(audit.seed),
                        "auc": Cell(f"{number(one.auc)} ({interval(one.low, one.high)})", one.auc),
                        "p": p_value(area),
                        **{f"tpr{i}": _rate(one.rate(fpr)) for i, fpr in enumerate(RATES)},
                        "exposed": _exposed(one),
                        "p_exposed": p_value(exposed),
                    }
                )
    columns = words(method="Method", site="Site", attack="Attack") + numbers(
        seed="Seed",
        auc="AUC (95 % CI)",
        p="p (AUC)",
        tpr0="TPR at 0.1 % FPR",
        tpr1="TPR at 1 % FPR",
        exposed="Above all others",
        p_exposed="p (above)",
    )
    note = (
        "Training patients against test patients of the same site; an AUC of 0.5 is chance. TPR: the share of training "
        "patients identified at a false-positive rate of 0.1 or 1 %, with a 95 % interval; it needs at least 1,000 or "
        "100 test patients. ‘Above all others’: the number of training patients who score above every test patient (or "
        "all but 0.1 % of them). p-values are adjusted for all tests of one model (Holm)."
    )
    return Table(
        "audit-members",
        "Membership inference: which patients can be identified as training patients.",
        columns,
        rows,
        note,
    )


def _rate(rate: Rate) -> Cell:
    if rate.value is None:
        return Cell(NONE, None)
    return Cell(f"{number(100 * rate.value, 1)} ({interval(100 * rate.low, 100 * rate.high, 1)})", rate.value)


def _exposed(one: Found) -> Cell:
    return Cell(f"{one.exposed} of {one.members}", one.exposed)


def _verdicts(page: ReportContext, audit: Audit) -> list[Markup]:
    """Return the conclusions of one audit, and what it did not cover."""
    title = page.title(audit.method)
    verdicts = [audit.membership.verdict.says, audit.inversion.says, *([audit.privacy.says] if audit.privacy else [])]
    texts = [Markup("<strong>{}, seed {}.</strong> {}").format(title, audit.seed, " ".join(verdicts))]
    if audit.not_done:
        texts.append(Markup("<strong>Not done for {}.</strong> {}").format(title, " ".join(audit.not_done)))
    return texts
