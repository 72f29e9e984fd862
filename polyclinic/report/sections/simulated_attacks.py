"""The section on a simulated attack: the attackers, and the sites that each method flagged."""

from polyclinic.report.context import ReportContext
from polyclinic.report.formatting import NONE, cell, listed, many
from polyclinic.report.page_blocks import Cell, Row, Section, Table, Text, numbers, words


def hostile_section(page: ReportContext) -> Section | None:
    """Return the section; None without a simulated attack."""
    attack = page.run.info.attack
    if not attack:
        return None
    options = "".join(f", {key} = {value}" for key, value in attack.get("options", {}).items())
    who = "; ".join(f"{listed(names)} (seed {seed})" for seed, names in attack["by"].items())
    text = (
        f"Simulated attack: {attack['name']}{options}, from round {attack.get('begins', 0) + 1} on, by {who}. Test "
        f"data of "
        "all sites, including attackers, are unmodified: only training data and updates of attackers are."
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
    columns = words(method="Method") + numbers(
        value=page.label, caught="Attackers flagged", wronged="Honest sites flagged"
    )
    columns += words(who="Flagged honest sites")
    note = (
        "A site is flagged if one of its replies was refused, or if a robust rule raised an alarm about it; counted "
        "over "
        f"{many(page.run.repeats, 'run')} per method. A method without a robust rule flags only replies that cannot be "
        "aggregated. A flagged site is not necessarily excluded."
    )
    return Section("attack", "Simulated attack", [Text(text), Table("attack", "Flagged sites.", columns, rows, note)])
