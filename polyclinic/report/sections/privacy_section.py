"""The section on privacy: the budget spent, its cost in quality, and methods without noise."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from polyclinic.evaluation.records.record_schema import Privacy, arm_names, rounded_up
from polyclinic.report import figures
from polyclinic.report.context import ReportContext
from polyclinic.report.formatting import NONE, listed, many
from polyclinic.report.page_blocks import Folded, Picture, Row, Section, Table, Text, numbers, words
from polyclinic.report.svg_plot import INK, Plot, Ticks

ACCOUNTS = {"pld": "tight", "rdp": "Rényi bound"}


def privacy_section(page: ReportContext) -> Section:
    """Return the section: the budget spent by method and site, methods without noise, and audits."""
    federated = [m.label for m in page.run.info.methods if not m.baseline]
    spent = {label: page.run.spent(label) for label in federated}
    blocks: list[Any] = []
    if rows := [row for label, records in spent.items() for row in _privacy_rows(page, label, records)]:
        columns = words(method="Method", site="Site") + numbers(epsilon="ε", delta="δ")
        columns += words(unit="Unit of privacy") + numbers(round="After round") + words(how="Accounting")
        note = (
            "An observer of the messages can change the odds that one unit took part by a factor of at most exp(ε), "
            "except "
            "with probability δ; smaller is more private. Values at the end of training, the largest over seeds, "
            "rounded "
            "up. Each method and seed is accounted for separately: an observer of several learns more. "
            + " ".join(dict.fromkeys(p.meaning for records in spent.values() for p in records))
        )
        blocks.append(Table("privacy", "Differential privacy spent.", columns, rows, note))
        blocks += _by_round(page)
        blocks += _against_epsilon(page, spent)
    if bare := [page.title(k) for k, v in spent.items() if not v]:
        text = Markup(
            "<strong>No noise was added with {}.</strong> There is no formal limit on what the updates reveal about a "
            "patient: weights and gradients can reveal whether a patient was in the training data, and under some "
            "conditions the training images themselves."
        )
        blocks.append(Text(text.format(listed(bare, "or"))))
    blocks += _audits(page, federated)
    if not federated:
        blocks.append(Text("The study has no federated method, so no data left a site."))
    return Section("privacy", "Privacy", blocks)


def _audits(page: ReportContext, federated: Sequence[str]) -> list[Any]:
    """Return the results of every audit of the run's models, and a list of the methods that were not audited."""
    blocks, audited = list[Any](), set[str]()
    files = [page.run.path / "arms" / name / "audit.json" for *_, name in arm_names(page.run.info)]
    if files := [file for file in files if file.is_file()]:
        from polyclinic.report.sections.audit_findings import audit_blocks  # loads PyTorch

        blocks, audited = audit_blocks(page, files)
    if missing := [page.title(label) for label in federated if label not in audited]:
        text = Markup("<strong>Not attacked:</strong> {}. <code>polyclinic audit</code> attacks a model of this run.")
        blocks.append(Text(text.format(listed(missing))))
    return blocks


def _privacy_rows(page: ReportContext, label: str, records: Sequence[Privacy]) -> list[Row]:
    """Return one row per site, or one row for all sites with equal values."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for p in records:
        extra = {k: v for k, v in (p.model_extra or {}).items() if v is not None and k not in ("by", "ledger")}
        by = (p.model_extra or {}).get("by")
        accounting = [ACCOUNTS.get(str(by), str(by))] if by is not None else []
        how = "; ".join([*accounting, *(f"{k} {v}" for k, v in sorted(extra.items()))]) or NONE
        numbers_ = (NONE if p.epsilon is None else rounded_up(p.epsilon), NONE if p.delta is None else f"{p.delta:g}")
        key = (*numbers_, p.unit or NONE, NONE if p.round is None else str(p.round), how)
        rows.setdefault(key, []).append(p.site or "all")
    names = ("epsilon", "delta", "unit", "round", "how")
    return [
        {"method": page.title(label), **dict(zip(names, key, strict=True)), "site": ", ".join(sites)}
        for key, sites in rows.items()
    ]


def _by_round(page: ReportContext) -> list[Folded]:
    """Return the largest ε of all sites and seeds after each round."""
    most: dict[tuple[str, int], float] = {}
    for p in page.run.privacy:
        if p.round is not None and p.epsilon is not None:
            most[p.method, p.round] = max(p.epsilon, most.get((p.method, p.round), 0.0))
    if not most:
        return []
    labels = list(dict.fromkeys(label for label, _ in most))
    rows: list[Row] = [
        {"round": str(at), **{f"epsilon-{m}": rounded_up(most[m, at]) if (m, at) in most else NONE for m in labels}}
        for at in sorted({at for _, at in most})
    ]
    columns = numbers(round="After round", **{f"epsilon-{m}": page.title(m) for m in labels})
    units = sorted({p.unit for p in page.run.privacy if p.unit})
    note = f"For every {' or '.join(units) or 'unit that is not stated'}, as in the table above. "
    note += (
        "The largest over sites and seeds. Between rounds by Rényi’s bound, which is fast and slightly larger; after "
    )
    note += "the last round by tight accounting."
    return [Folded("ε after each round", [Table("privacy-rounds", "ε spent, by round.", columns, rows, note)])]


def _curve(
    alt: str, rows: Sequence[tuple[figures.Point, float]], bare: Mapping[str, float], ylabel: str, unit: str
) -> str:
    """Draw quality with its interval against ε, on a logarithmic scale; dashed lines are training without noise."""
    every = [*bare.values()] + [v for point, _ in rows for v in (point.value, point.low, point.high) if v is not None]
    low, high = min(every), max(every)
    pad = 0.12 * (high - low) or 0.05
    most, least = max(x for _, x in rows), max(min(x for _, x in rows), 1e-3)
    wide = max(most / least, 2.0)
    limits = (math.log10(least / wide**0.1), math.log10(most * wide**0.3))
    plot = Plot("epsilon", alt, (figures.WIDTH, 2.9), (0.16, 0.16, 0.8, 0.8), limits, (low - pad, high + pad))
    for point, epsilon in rows:
        x, value = math.log10(max(epsilon, 1e-3)), point.value or 0.0
        if point.low is not None and point.high is not None:
            plot.line([x, x], [point.low, point.high], figures.TEAL, 1.2)
        plot.markers([x], [value], "s", 6.5, figures.TEAL)
        plot.text(plot.px(x), plot.py(value if point.high is None else point.high) - 4, point.name, 8, "middle")
    for title, value in bare.items():
        plot.reference(INK, 0.9, "--", y=value)
        plot.text(plot.share(0.99), plot.py(value) - 4, title, 8, "end")
    at: list[float] = []
    for x in sorted(x for _, x in rows if x >= least):
        at += [x] if not at or x > 1.15 * at[-1] else []  # so that no two labels meet
    plot.x_axis(
        f"ε for every {unit} (smaller is more private)",
        Ticks([math.log10(x) for x in at], [f"{x:.3g}" for x in at]),
    )
    plot.y_axis(ylabel, most=5)
    return plot.svg()


def _against_epsilon(page: ReportContext, spent: Mapping[str, Sequence[Privacy]]) -> list[Picture]:
    """Return the figure of quality against ε; the same methods without noise are dashed lines."""
    names = {m.label: m.name for m in page.run.info.methods}
    found = {m.label: m.macro for m in page.result.methods if m.macro.value is not None}
    rows, noised = list[tuple[figures.Point, float]](), set[str]()
    for label, records in spent.items():
        known = [p.epsilon for p in records if p.epsilon is not None and math.isfinite(p.epsilon)]
        if known and label in found:
            rows.append((figures.Point.of(page.title(label), found[label], ""), max(known)))
            noised.add(names[label])
    if len(rows) < 2:
        return []
    bare = {
        page.title(label): float(found[label].value or 0.0)
        for label, records in spent.items()
        if not records and label in found and names[label] in noised
    }
    alt = (
        f"Mean {page.label} against the privacy budget for {many(len(rows), 'method')}; the numbers are in the tables."
    )
    unit = " or ".join(sorted({p.unit for records in spent.values() for p in records if p.unit})) or "unit"
    drawn = _curve(alt, rows, bare, f"{page.label}, mean over sites", unit)
    text = f"Cost of privacy: quality against ε for every {unit}. Intervals are over patients."
    return [Picture(drawn, text + (" Dashed: the same method without noise." if bare else ""))]
