"""The section of learning curves on validation patients."""

from collections.abc import Iterator

import numpy as np

from polyclinic.evaluation.costs import learning_curve
from polyclinic.evaluation.records.run_reader import training_sites
from polyclinic.report import figures
from polyclinic.report.context import ReportContext
from polyclinic.report.formatting import amount, many, number, whole
from polyclinic.report.page_blocks import Folded, Picture, Row, Section, Table, numbers, words


def curves_section(page: ReportContext) -> Section | None:
    """Return validation results over rounds; None if none were recorded."""
    d, name = page.digits, page.result.metric.name
    lines = {m.label: learning_curve(page.run, m.label, name) for m in page.run.info.methods}
    lines = {k: c for k, c in lines.items() if c.rounds}
    if not lines:
        return None
    pick = np.argmax if page.higher else np.argmin
    rows: list[Row] = []
    for k, c in lines.items():
        best, cost = int(pick(c.values)), page.costs.get(k)
        rows.append(
            {
                "method": page.title(k),
                "best": amount(c.values[best], d),
                "round": whole(c.rounds[best]),
                "last": amount(c.values[-1], d),
                "reached": whole(cost.reached if cost else None),
            }
        )
    columns = words(method="Method") + numbers(best="Best", round="At round", last="Last round")
    columns += numbers(reached="Target reached at round")
    note = "Mean over seeds and training sites."
    if page.target is not None:
        note += f" Target: {number(page.target.value, d)}, {page.target.meaning}."
    alt = (
        f"Validation {page.label} over rounds, one line for each of {many(len(lines), 'method')}; values in the table."
    )
    shown = {page.title(k): (c.rounds, c.values) for k, c in lines.items()}
    text = "Validation results over rounds. Baselines are gray and dashed. No test patients are included."
    first = page.title(page.first.label) if page.first else ""
    behind = [page.title(m.label) for m in page.run.info.methods if m.baseline]
    drawn = figures.curves("curves", alt, shown, f"Validation {page.label}", first, behind)
    picture = Picture(drawn, text)
    table = Table("curves", f"{page.label} on validation patients.", columns, rows, note)
    return Section("curves", "Learning curves", [picture, table, *_by_site(page)])


def _by_site(page: ReportContext) -> Iterator[Folded]:
    if page.first is None:
        return
    label, name, d = page.first.label, page.result.metric.name, page.digits
    recorded = {s.site for s in page.run.curves if s.method == label}
    sites = [s for s in training_sites(page.run) if s in recorded]
    if not 1 < len(sites) <= 12:
        return
    lines = {s: learning_curve(page.run, label, name, s) for s in sites}
    shown = {s: (c.rounds, c.values) for s, c in lines.items() if c.rounds}
    title = page.title(label)
    alt = f"Validation {page.label} of {title} over rounds, one line for each site; first and last values in the table."
    picture = figures.curves("curves-sites", alt, shown, f"Validation {page.label}")
    rows: list[Row] = [{"site": s, "first": amount(y[0], d), "last": amount(y[-1], d)} for s, (_, y) in shown.items()]
    columns = words(site="Site") + numbers(first="First round", last="Last round")
    table = Table("curves_sites", f"Validation {page.label} of {title}.", columns, rows)
    yield Folded(
        "Curves of single sites", [Picture(picture, f"{title} at each training site, mean over seeds."), table]
    )
