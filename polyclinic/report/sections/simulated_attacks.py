"""The section on a simulated attack: who attacked, and whom each method's alarms named."""

from polyclinic.report.context import ReportContext
from polyclinic.report.formatting import NONE, cell, listed, many
from polyclinic.report.page_blocks import Cell, Row, Section, Table, Text, numbers, words


def hostile_section(page: ReportContext) -> Section | None:
    """None where nobody attacked."""
    attack = page.run.info.attack
    if not attack:
        return None
    options = "".join(f", {key} = {value}" for key, value in attack.get("options", {}).items())
    who = "; ".join(f"{listed(names)} (seed {seed})" for seed, names in attack["by"].items())
    text = (
        f"Simulated: {attack['name']}{options}, from round {attack.get('begins', 0) + 1} on, by {who}. "
        "Test patients are everybody’s, and honest: an attacker lies in what it trains on and sends."
    )
    rows: list[Row] = []
    for m in page.result.methods:
        mine = [s for s in page.run.standings if s.method == m.label]
        hostile, honest = [s for s in mine if s.hostile], [s for s in mine if not s.hostile]
        named = sorted({s.site for s in honest if s.named})
        caught = sum(s.named for s in hostile)
        rows.append(
            {
                "method": page.title(m.label),
                "value": cell(m.macro, page.digits),
                "caught": Cell(f"{caught} of {len(hostile)}" if mine else NONE, caught if mine else None),
                "wronged": Cell(f"{sum(s.named for s in honest)} of {len(honest)}" if mine else NONE, len(named)),
                "who": listed(named) or NONE,
            }
        )
    columns = words(method="Method") + numbers(value=page.label, caught="Attackers named", wronged="Honest sites named")
    columns += words(who="Which honest sites")
    note = (
        "A site is named where a reply of it was refused, or where an alarm of a robust rule asks a person to look at "
        f"it; over {many(page.run.repeats, 'arm')} a method. A method without such a rule names only what it cannot "
        "add up. Naming is not excluding."
    )
    return Section("attack", "Hostile sites", [Text(text), Table("attack", "Who was named.", columns, rows, note)])
