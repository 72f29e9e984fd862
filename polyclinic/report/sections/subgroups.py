"""The section on patient subgroups: sex, age, scanner, if the data include them."""

from typing import Any

from polyclinic.evaluation.subgroup_results import FEWEST, Attribute, Group, by_group
from polyclinic.report import figures
from polyclinic.report.context import ReportContext
from polyclinic.report.formatting import NONE, cell, listed, outcome, p_value, whole, with_interval
from polyclinic.report.page_blocks import Cell, Picture, Row, Section, Table, Text, numbers, words


def subgroups_section(page: ReportContext) -> Section | None:
    """Return the main method's results in every subgroup; None if the data have no such columns."""
    first, o, d = page.first, page.result.options, page.digits
    if first is None:
        return None
    found = by_group(page.run, first.label, o.level, o.min_cell)
    if not found:
        return None
    rows: list[Row] = []
    points = []
    for attribute in found:
        if attribute.why:
            rows.append({"what": attribute.name, "group": attribute.why, "value": NONE})
        for group in attribute.groups:
            e = group.estimate
            hidden = e.value is None and not group.patients
            value = Cell(e.why, None) if e.value is None else cell(e, d)
            patients = Cell(f"below {max(o.min_cell, FEWEST)}", None) if hidden else whole(group.patients)
            row: Row = {"what": attribute.name, "group": group.name, "patients": patients, "value": value}
            rows.append({**row, **_compared(group, attribute, d)})
            if e.value is not None:
                points.append(figures.Point.of(f"{attribute.name}: {group.name}", e, with_interval(e, d)))
    heading = f"{page.label} ({page.level}\u00a0CI)"
    blocks: list[Any] = []
    if points:
        alt = f"{page.label} of {page.title(first.label)} by group: " + "; ".join(f"{p.name} {p.text}" for p in points)
        line = first.macro.value
        drawn = figures.points("groups", alt, points, heading, line)
        text = f"{page.title(first.label)}, all test patients of the training sites."
        text += " The dotted line is the mean over the training sites." if line is not None else ""
        blocks.append(Picture(drawn, text))
    columns = words(what="Attribute", group="Group") + numbers(patients="Patients", value=heading)
    columns += numbers(difference=f"Difference ({page.level}\u00a0CI)", adjusted="p after Holm")
    columns += words(result="Compared with the largest group")
    note = (
        f"Groups of fewer than {max(o.min_cell, FEWEST)} patients are not shown, nor values from which they could "
        "be derived. Values and differences are means of those within sites; + is better. Intervals are for these "
        "models. That no difference is shown does not mean that there is none: see the interval."
    )
    left = {f"{a.name}: {g.name}": g.estimate.without for a in found for g in a.groups if g.estimate.without}
    if left:
        note += f" Sites without an interval are left out: {'; '.join(f'{k}, {listed(v)}' for k, v in left.items())}."
    blocks.append(Table("groups", f"{page.label} by group of patients.", columns, rows, note))
    if any(s.role == "external" for s in page.run.info.sites):
        blocks.append(Text("These groups do not include patients of external sites.", "note"))
    return Section("groups", "Patient subgroups", blocks)


def _compared(group: Group, attribute: Attribute, d: int) -> Row:
    """Return the cells of a group's difference from the reference."""
    if group.name == attribute.reference:
        return {"result": "reference"}
    if group.difference is None:
        return {"result": NONE}
    diff = group.difference
    adjusted = Cell(p_value(diff.adjusted), diff.adjusted)
    return {"difference": cell(diff, d, signed=True), "adjusted": adjusted, "result": outcome(diff)}
