"""Sections on test results: methods side by side, every site, and whether federating was worth it."""

from collections.abc import Iterator
from typing import Any

from markupsafe import Markup

from polyclinic.studies import figures
from polyclinic.studies.compare import BETTER, WORSE, Difference
from polyclinic.studies.evaluation import MethodResult, training_sites
from polyclinic.studies.intervals import Estimate
from polyclinic.studies.report.blocks import Cell, Column, Folded, Picture, Section, Table, Text
from polyclinic.studies.report.page import Source
from polyclinic.studies.report.words import (
    NONE,
    count,
    digits_of,
    interval,
    listed,
    many,
    number,
    p_value,
    with_interval,
)  # fmt: skip


def cell(e: Estimate | Difference | None, digits: int, signed: bool = False) -> Cell:
    """A value with its interval, as a cell."""
    if e is None:
        return Cell(NONE)
    if e.value is None:
        return Cell("none", None)
    return Cell(with_interval(e, digits, signed), e.value)


def methods_section(page: Source) -> Section:
    """All methods next to each other, with the difference from one of them."""
    result, d = page.result, page.digits
    if not result.methods:
        return Section("methods", "Methods side by side", [Text("No method has test predictions yet.")])
    rows = [_method_row(page, m) for m in result.methods]
    against = f"Against {page.title(result.reference)}" if result.reference else "Difference"
    columns = [
        Column("method", "Method", False),
        Column("mean", f"Mean over sites ({page.level} CI)"),
        Column("pooled", "Pooled"),
        Column("worst", "Worst site", False),
        Column("spread", "SD over sites"),
        Column("external", "External"),
        Column("difference", f"{against} ({page.level} CI)"),
        Column("p", "p (Holm)"),
        Column("verdict", "Verdict", False),
    ]
    if any(m.external for m in result.methods) is False:
        columns = [c for c in columns if c.key != "external"]
    if len(result.methods) < 2:
        columns = [c for c in columns if c.key not in ("difference", "p", "verdict")]
    seeds = any(m.seed_sd is not None for m in result.methods)
    if seeds:
        columns.insert(5, Column("seeds", "SD over seeds"))
    chosen = {i: "chosen" for i, m in enumerate(result.methods) if m.label == result.headline}
    blocks: list[Any] = [_methods_picture(page)]
    blocks.append(Table("methods", f"{page.label} on test patients.", columns, rows, _methods_note(page), chosen))
    blocks += _ranking_blocks(page)
    return Section("methods", "Methods side by side", blocks)


def _method_row(page: Source, m: MethodResult) -> dict[str, Cell | str]:
    d, name = page.digits, page.result.metric.name
    diff = page.result.comparisons.get(m.label)
    row: dict[str, Cell | str] = {
        "method": page.title(m.label),
        "mean": cell(m.macro, d),
        "pooled": cell(m.pooled.get(name), d),
        "worst": f"{m.worst[0]} {number(m.worst[1], d)}" if m.worst else NONE,
        "spread": Cell(number(m.spread, d), m.spread),
        "seeds": Cell(number(m.seed_sd, d), m.seed_sd),
        "external": cell(m.external.get(name), d),
        "difference": cell(diff, d, signed=True) if diff else "reference" if m.label == page.result.reference else NONE,
        "p": Cell(p_value(diff.adjusted), diff.adjusted) if diff else NONE,
        "verdict": diff.verdict() if diff else NONE,
    }
    return row


def _methods_picture(page: Source) -> Picture:
    result, d = page.result, page.digits
    rows = [
        figures.Point.of(page.title(m.label), m.macro, with_interval(m.macro, d), "baseline" if m.baseline else "plain")
        for m in result.methods
    ]
    best = max if page.higher else min
    values = [m.macro.value for m in result.methods if m.macro.value is not None]
    alt = f"Mean {page.label} over training sites for each method, with {page.level} intervals."
    if values:
        top = next(m for m in result.methods if m.macro.value == best(values))
        alt += (
            f" The best value is {number(top.macro.value, d)} for {page.title(top.label)}. All values are in the table."
        )
    text = Markup(
        "Mean {} over the training sites. Squares are federated methods, hollow circles baselines. "
        "Overlapping intervals do not settle a comparison; the table's paired differences do."
    ).format(page.label)
    if result.headline and result.chosen_by:
        text += Markup(" The rest of this page speaks of <strong>{}</strong>: {}.").format(
            page.title(result.headline), result.chosen_by
        )
    return Picture(figures.points("methods", alt, rows, f"{page.label}, mean over sites ({page.level} CI)"), text)


def _methods_note(page: Source) -> str:
    result = page.result
    seeds = sorted({s for m in result.methods for s in m.seeds})
    note = (
        f"Intervals: {_how(page)}. A value over several seeds is their mean. “Pooled” takes all training sites' test "
        "patients together."
    )
    if result.reference and len(result.methods) > 1:
        also = " and seeds" if len(seeds) > 1 else ""
        note += (
            f" Differences are paired (same resampled patients{also}), signed so that + is better, with p corrected "
            f"by Holm for {many(len(result.comparisons), 'comparison')}; “{'no difference shown'}” unless the interval "
            "leaves out 0 and the corrected p is below 0.05."
        )
    return note


def _how(page: Source) -> str:
    o = page.result.options
    return (
        f"bootstrap over patients within each site, {count(o.draws)} draws, seed {o.seed}; AUC of two classes by DeLong"
        if page.result.metric.name == "auc"
        else f"bootstrap over patients within each site, {count(o.draws)} draws, seed {o.seed}"
    )


def _ranking_blocks(page: Source) -> Iterator[Any]:
    ranking = page.result.ranking
    if ranking is None or ranking.blocks < 4:
        return
    titles = {m: page.title(m) for m in ranking.methods}
    alt = "Mean ranks over sites: " + ", ".join(
        f"{titles[m]} {r:.2f}" for m, r in zip(ranking.methods, ranking.ranks, strict=True)
    )
    told = "are told apart" if ranking.p < 0.05 else "are not told apart"
    text = (
        f"Mean ranks over {ranking.blocks} sites. A bar joins methods whose ranks differ by less than Nemenyi's critical "
        f"difference of {ranking.critical:.2f}. Friedman's test: p = {p_value(ranking.p)}; as a group the methods {told}."
    )
    rows: list[dict[str, Cell | str]] = [
        {"method": titles[m], "rank": Cell(f"{r:.2f}", r)} for m, r in zip(ranking.methods, ranking.ranks, strict=True)
    ]
    columns = [Column("method", "Method", False), Column("rank", "Mean rank")]
    picture = Picture(figures.ranks_plot("ranks", alt, ranking, titles), text)
    yield Folded("Ranks over sites (critical difference)", [picture, Table("ranks", "Mean ranks.", columns, rows)])


def sites_section(page: Source) -> Section | None:
    """The chosen method at every site, and all methods at every site."""
    first, result, d = page.first, page.result, page.digits
    if first is None:
        return None
    name, rows, marks, points = result.metric.name, [], {}, []
    others = [k for k in _secondary(page) if k != name]
    for i, site in enumerate(s.name for s in page.run.info.sites if s.name in first.sites):
        info, estimates = page.site(site), first.sites[site]
        external = info.role == "external"
        row: dict[str, Cell | str] = {
            "site": site,
            "role": "external (never trained on)" if external else "training",
            "patients": Cell(count(result.patients[site]), result.patients[site]),
            "images": Cell(count(result.images[site]), result.images[site]),
            name: cell(estimates[name], d),
        }
        for k in others:
            row[k] = Cell(number(estimates[k].value, _digits(page, k)), estimates[k].value)
        rows.append(row)
        if external:
            marks[i] = "external"
        text = with_interval(estimates[name], d) if estimates[name].value is not None else "no value"
        points.append(figures.Point.of(site, estimates[name], text, "external" if external else "plain"))
    table = _table(page)
    columns = [
        Column("site", "Site", False), Column("role", "Role", False), Column("patients", "Patients"),
        Column("images", "Images"), Column(name, f"{page.label} ({page.level} CI)"),
        *(Column(k, table[k]) for k in others),
    ]  # fmt: skip
    if all(result.images[s] == result.patients[s] for s in result.patients):
        columns = [c for c in columns if c.key != "images"]
    pooled = first.pooled.get(name)
    line = pooled.value if pooled else None
    alt = f"{page.label} of {page.title(first.label)} at each site with {page.level} intervals: " + "; ".join(
        f"{p.name} {p.text}" for p in points
    )
    text = Markup("{} on each site's own held-out patients; the dotted line is all training sites pooled ({}).").format(
        page.title(first.label), number(line, d)
    )
    if any(p.kind == "external" for p in points):
        text += Markup(" Diamonds are sites that took no part in training.")
    if first.random is not None:
        e = first.random.estimate
        text += Markup(" Seen as a sample of sites, the mean is {} ({}); I² = {:.0f} %.").format(
            number(e.value, d), interval(e.low, e.high, d), 100 * first.random.i2
        )
    picture = Picture(figures.points("sites", alt, points, f"{page.label} ({page.level} CI)", line), text)
    why = [f"{s}: {e[name].why}" for s, e in first.sites.items() if e[name].why]
    note = f"Intervals: {_ways(first, name)}." + (f" Without a value or interval: {'; '.join(why)}." if why else "")
    note += _unit_note(page)
    blocks = [picture, Table("sites", f"{page.title(first.label)}, on test patients.", columns, rows, note, marks)]
    return Section("sites", "Every site, on its own held-out patients", [*blocks, *_matrix(page)])


def _matrix(page: Source) -> Iterator[Folded]:
    result, d, name = page.result, page.digits, page.result.metric.name
    if len(result.methods) < 2:
        return
    sites = [s.name for s in page.run.info.sites if any(s.name in m.sites for m in result.methods)]
    rows: list[dict[str, Cell | str]] = []
    for m in result.methods:
        cells = {s: cell(m.sites[s][name] if s in m.sites else None, d) for s in sites}
        rows.append({"method": page.title(m.label), **cells})
    columns = [Column("method", "Method", False), *(Column(s, s) for s in sites)]
    caption = f"{page.label} ({page.level} CI) of every method at every site."
    yield Folded("Every method at every site", [Table("methods_by_site", caption, columns, rows)])


def gains_section(page: Source) -> Section:
    """Each site's gain over training alone; sites that lose are named."""
    first, d, title = page.first, page.digits, "Was federating worth it?"
    if first is None or not first.gains:
        text = (
            "This needs the baseline Single (each site trains alone) beside a federated method; the run has not both."
        )
        return Section("worth", title, [Text(text)])
    points, rows, marks = [], [], {}
    for i, (site, g) in enumerate(first.gains.items()):
        verdict = g.verdict()
        kind = "bad" if verdict == WORSE else "plain" if verdict == BETTER else "undecided"
        points.append(figures.Point.of(site, g, with_interval(g, d, signed=True), kind))
        alone = page.result.of("single").sites[site][page.result.metric.name].value
        here = first.sites[site][page.result.metric.name].value
        rows.append(
            {"site": site, "alone": Cell(number(alone, d), alone), "federated": Cell(number(here, d), here),
             "gain": cell(g, d, signed=True), "p": Cell(p_value(g.p), g.p), "verdict": verdict}
        )  # fmt: skip
        if g.value is not None and g.value < 0:
            marks[i] = "warn"
    losers = [s for s, g in first.gains.items() if g.value is not None and g.value < 0]
    if losers:
        sure = [s for s in losers if first.gains[s].verdict() == WORSE]
        said = Markup("<strong>{} below training alone</strong>").format(
            f"{listed(losers)} {'is' if len(losers) == 1 else 'are'}"
        )
        said += Markup(": shown for {}.").format(listed(sure)) if sure else Markup(", though no interval leaves out 0.")
    else:
        said = Markup("No site is below training alone.")
    text = Markup(
        "{} minus training alone at each site, on the same patients; + is better. Filled marks are differences whose "
        "interval leaves out 0, hollow marks are not shown to differ. {}"
    ).format(page.title(first.label), said)
    alt = f"Gain in {page.label} over training alone at each site: " + "; ".join(f"{p.name} {p.text}" for p in points)
    picture = Picture(
        figures.points("gains", alt, points, f"Gain in {page.label} ({page.level} CI)", 0.0, zero=True), text
    )
    columns = [
        Column("site", "Site", False), Column("alone", "Alone"), Column("federated", page.title(first.label)),
        Column("gain", f"Gain ({page.level} CI)"), Column("p", "p"), Column("verdict", "Verdict", False),
    ]  # fmt: skip
    note = "p is not corrected for the number of sites: each site asks about itself."
    blocks: list[Any] = [picture, Table("gains", "Gain over training alone.", columns, rows, note, marks)]
    blocks += _upper_bound(page)
    return Section("worth", title, blocks)


def _upper_bound(page: Source) -> Iterator[Text]:
    first = page.first
    shown = {m.label for m in page.result.methods}
    if first is None or not {"single", "mix"} <= shown:
        return
    alone, pooled, here = page.result.of("single").macro.value, page.result.of("mix").macro.value, first.macro.value
    if alone is None or pooled is None or here is None:
        return
    d = page.digits
    text = (
        f"Mean over sites: alone {number(alone, d)}, {page.title(first.label)} {number(here, d)}, "
        f"all data in one place (Mix) {number(pooled, d)}."
    )
    if (pooled - alone) * (1 if page.higher else -1) > 0.5 * 10**-d:
        share = (here - alone) / (pooled - alone)
        text += f" Of the distance from alone to Mix, {100 * share:.0f} % is covered without moving data."
    yield Text(text)


def _secondary(page: Source) -> list[str]:
    wanted = {
        "classification": ["auc", "balanced_accuracy", "sensitivity", "specificity", "brier", "ece"],
        "multilabel": ["auc", "average_precision", "f1", "ece"],
    }
    return [k for k in _table(page) if k in wanted.get(page.run.info.task, list(_table(page))) and _has(page, k)]


def _has(page: Source, name: str) -> bool:
    return page.first is not None and any(e[name].value is not None for e in page.first.sites.values())


def _table(page: Source) -> dict[str, str]:
    from polyclinic.studies.metrics import metrics_for

    metrics = metrics_for(page.run.info.task, len(page.run.info.classes) or 2)
    return {k: f"{m.label} ({m.unit})" if m.unit else m.label for k, m in metrics.items()}


def _digits(page: Source, name: str) -> int:
    from polyclinic.studies.metrics import metrics_for

    return digits_of(metrics_for(page.run.info.task, len(page.run.info.classes) or 2)[name])


def _ways(m: MethodResult, name: str) -> str:
    return "; ".join(dict.fromkeys(e[name].how for e in m.sites.values() if e[name].how)) or "none"


def _unit_note(page: Source) -> str:
    result = page.result
    if result.options.unit == "image":
        return " Each image is a case; patients are resampled whole."
    if all(result.images[s] == result.patients[s] for s in result.patients):
        return " One image a patient."
    note = " The unit is the patient: images of one patient with the same label are averaged into one case."
    more = {s: c for s, c in result.cases.items() if c > result.patients[s]}
    if more:
        note += f" Patients with images of different labels give one case for each label ({count(sum(result.cases.values()))}"
        note += f" cases from {count(sum(result.patients.values()))} patients); intervals resample whole patients."
    return note


def own_sites(page: Source) -> list[str]:
    """Training sites with results of the chosen method."""
    return [s for s in training_sites(page.run) if page.first and s in page.first.sites]
