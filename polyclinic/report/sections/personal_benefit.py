"""The section on the benefit of federated over local training, by site."""

from collections.abc import Iterator
from typing import Any

from markupsafe import Markup

from polyclinic.evaluation.run_evaluation import MethodResult
from polyclinic.report import figures
from polyclinic.report.context import ReportContext
from polyclinic.report.formatting import amount, cell, listed, number, outcome, p_value, with_interval
from polyclinic.report.page_blocks import Cell, Folded, Picture, Row, Section, Table, Text, numbers, words
from polyclinic.statistics.paired_tests import BETTER, WORSE

TITLE = "Benefit over local training"


def gains_section(page: ReportContext) -> Section:
    """Return each site's difference from local training, with the sites of negative transfer."""
    first, d = page.first, page.digits
    if first is None or not first.gains:
        text = "This section needs the baseline `local` (each site trains alone) and a federated method."
        return Section("worth", TITLE, [Text(text)])
    points = []
    for site, g in first.gains.items():
        kind = {WORSE: "bad", BETTER: "plain"}.get(g.verdict(), "undecided")
        points.append(figures.Point.of(site, g, with_interval(g, d, signed=True), kind))
    text = Markup(
        "{} minus local training at each site, on the same patients; + is better. Filled markers are significant "
        "differences, hollow ones are not significant. {}"
    ).format(page.title(first.label), _losers(first))
    alt = f"Difference in {page.label} from local training at each site: " + "; ".join(
        f"{p.name} {p.text}" for p in points
    )
    label = f"Difference in {page.label} ({page.level}\u00a0CI)"
    picture = Picture(figures.points("gains", alt, points, label, 0.0, zero=True), text)
    return Section("worth", TITLE, [picture, _table(page, first), *_upper_bound(page, first), *_others(page)])


def _losers(m: MethodResult) -> Markup:
    losers = [s for s, g in m.gains.items() if g.value is not None and g.value < 0]
    if not losers:
        return Markup("No site is below local training.")
    sure = [s for s in losers if m.gains[s].verdict() == WORSE]
    said = Markup("<strong>{} {} below local training</strong>").format(
        listed(losers), "is" if len(losers) == 1 else "are"
    )
    return said + (Markup("; significant for {}.").format(listed(sure)) if sure else Markup("; not significant."))


def _table(page: ReportContext, first: MethodResult) -> Table:
    d, name = page.digits, page.result.metric.name
    rows: list[Row] = []
    for site, g in first.gains.items():
        rows.append(
            {
                "site": site,
                "alone": amount(page.result.of("local").sites[site][name].value, d),
                "federated": amount(first.sites[site][name].value, d),
                "gain": cell(g, d, signed=True),
                "p": Cell(p_value(g.p), g.p),
                "verdict": outcome(g),
            }
        )
    marks = {i: "warn" for i, g in enumerate(first.gains.values()) if g.value is not None and g.value < 0}
    columns = words(site="Site") + numbers(alone="Local", federated=page.title(first.label))
    columns += numbers(gain=f"Difference ({page.level}\u00a0CI)", p="p") + words(verdict="Result")
    note = "p is not corrected for the number of sites: each row is a separate question."
    note += " Intervals include the variance between seeds." if len(first.seeds) > 1 else ""
    return Table("gains", "Difference from local training.", columns, rows, note, marks)


def _upper_bound(page: ReportContext, first: MethodResult) -> Iterator[Text]:
    """Describe the gain relative to that of pooled training."""
    if not {"local", "pooled"} <= {m.label for m in page.result.methods}:
        return
    alone, pooled, here = page.result.of("local").macro.value, page.result.of("pooled").macro.value, first.macro.value
    if alone is None or pooled is None or here is None:
        return
    d, sign = page.digits, 1 if page.higher else -1
    text = (
        f"Mean over sites: local {number(alone, d)}, {page.title(first.label)} {number(here, d)}, "
        f"all data in one place (Pooled) {number(pooled, d)}."
    )
    if sign * (pooled - alone) > 0.5 * 10**-d:
        share = (here - alone) / (pooled - alone)
        if share >= 1:
            text += " The mean with federated training is not below that with pooled training; equality was not tested."
        elif share > 0:
            text += f" It achieves {100 * share:.0f} % of the difference between local and pooled training."
    yield Text(text)


def _others(page: ReportContext) -> Iterator[Any]:
    """Return the differences of every other method."""
    others = [m for m in page.result.methods if m.gains and m.label != page.result.headline]
    if not others:
        return
    sites = list(dict.fromkeys(s for m in others for s in m.gains))
    rows: list[Row] = [
        {"method": page.title(m.label), **{s: cell(m.gains.get(s), page.digits, signed=True) for s in sites}}
        for m in others
    ]
    columns = words(method="Method") + numbers(**{s: s for s in sites})
    caption = f"Difference in {page.label} from local training ({page.level}\u00a0CI)."
    yield Folded("Differences of the other methods", [Table("gains_others", caption, columns, rows)])
