"""The section on hospitals that send scores instead of predictions for single patients."""

from collections import defaultdict

from polyclinic.report.context import ReportContext
from polyclinic.report.formatting import NONE, number
from polyclinic.report.page_blocks import Cell, Row, Section, Table, Text, numbers, words


def kept_section(page: ReportContext) -> Section | None:
    """Return the scores of sites that sent no predictions; None without such sites."""
    run, metric = page.run, page.result.metric.name
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    cases: dict[str, int] = {}
    for line in run.lines:
        if line.kind != "test" or line.site in run.arms.get((line.method, line.seed), {}):
            continue
        if (value := line.metrics.get(metric)) is not None:
            found[line.site, line.method].append(value)
            cases[line.site] = max(line.n, cases.get(line.site, 0))
    if not found:
        return None
    labels = [m.label for m in run.info.methods if any(label == m.label for _, label in found)]
    rows: list[Row] = []
    for site in sorted(cases):
        row: dict[str, Cell | str] = {"site": site, "cases": Cell(str(cases[site]), cases[site])}
        for i, label in enumerate(labels):
            values = found.get((site, label), [])
            mean = sum(values) / len(values) if values else None
            row[f"m{i}"] = NONE if mean is None else Cell(number(mean, page.digits), mean)
        rows.append(row)
    columns = words(site="Site") + numbers(cases="Test cases")
    columns += numbers(**{f"m{i}": page.title(label) for i, label in enumerate(labels)})
    text = Text(
        "By their policies, these hospitals do not send predictions for single patients; they computed these scores "
        "locally. The tables, intervals and comparisons above do not include them."
    )
    caption = f"{page.label} on test data, computed by these sites over images; mean over seeds."
    return Section(
        "kept", "Sites without predictions for single patients", [text, Table("kept", caption, columns, rows)]
    )
