"""Sections on test results: comparison of methods, and results at every site."""

from collections.abc import Iterator
from typing import Any, Literal

from markupsafe import Markup

from polyclinic.evaluation.run_evaluation import MethodResult
from polyclinic.methods.catalog import METHODS, canonical
from polyclinic.report import figures
from polyclinic.report.context import ReportContext
from polyclinic.report.formatting import (
    NONE,
    amount,
    cell,
    digits_of,
    interval,
    listed,
    many,
    number,
    outcome,
    p_value,
    whole,
    with_interval,
)
from polyclinic.report.page_blocks import Cell, Folded, Picture, Row, Section, Table, Text, numbers, words
from polyclinic.statistics.paired_tests import FEWEST, Difference

SHOWN = {  # of a task's metrics, those in the table of sites
    "classification": (
        *("quadratic_kappa", "grade_error"),
        *("auc", "balanced_accuracy", "sensitivity", "specificity", "brier"),
    ),
    "multilabel": ("auc", "average_precision", "f1", "calibration_error"),
}

_CONSTANT = {
    "classification": "the class frequencies of the site’s training data",
    "multilabel": "the label frequencies of the site’s training data",
    "regression": "the median of the site’s validation patients",
    "survival": "the Kaplan-Meier curve of the site’s validation patients",
    "segmentation": "an empty mask",
}


def methods_section(page: ReportContext) -> Section:
    """Return the results of all methods, and the difference of each from a reference."""
    title, result = "Comparison of methods", page.result
    if not result.methods:
        return Section("methods", title, [Text("No method has test predictions yet.")])
    blocks: list[Any] = [methods_picture(page), *declared_table(page), _levels(page)]
    if result.comparisons and result.reference:
        blocks.append(_differences(page, result.reference))
    return Section("methods", title, [*blocks, *_ranking(page)])


def methods_picture(page: ReportContext, brief: bool = False) -> Picture:
    """Return the means of all methods over the training sites."""
    result, d = page.result, page.digits
    rows = [
        figures.Point.of(page.title(m.label), m.macro, with_interval(m.macro, d), "baseline" if m.baseline else "plain")
        for m in result.methods
    ]
    alt = f"Mean {page.label} over training sites for each method, with {page.level} intervals: "
    alt += "; ".join(f"{r.name} {r.text}" for r in rows)
    text = Markup(
        "Mean {} over the training sites. Squares are federated methods, hollow circles baselines. "
        "Compare methods by the paired differences below, not by whether intervals overlap."
    ).format(page.label)
    if result.headline and result.chosen_by and not brief:
        text += Markup(" The following sections report <strong>{}</strong>: {}.").format(
            page.title(result.headline), result.chosen_by
        )
    return Picture(figures.points("methods", alt, rows, f"{page.label}, mean over sites ({page.level}\u00a0CI)"), text)


def _levels(page: ReportContext) -> Table:
    result, d, name = page.result, page.digits, page.result.metric.name
    rows: list[Row] = [
        {
            "method": page.title(m.label),
            "mean": cell(m.macro, d),
            "spread": amount(m.spread, d),
            "seeds": amount(m.seed_sd, d),
            "worst": _lowest(m, d),
            "external": cell(m.external.get(name), d),
        }
        for m in (*result.methods, *([result.constant] if result.constant else []), *result.linear)
    ]
    columns = words(method="Method") + numbers(
        mean=f"Mean over sites ({page.level}\u00a0CI)", spread="SD between sites (τ)"
    )
    if any(m.seed_sd is not None for m in result.methods):
        columns += numbers(seeds="SD over seeds")
    columns += numbers(worst=f"Worst site, shrunken ({page.level}\u00a0CI)")
    if any(m.external for m in result.methods):
        columns += numbers(external="External")
    ways = dict.fromkeys(m.macro.how for m in result.methods if m.macro.how)
    note = f"Intervals: {'; '.join(ways) or 'none'}"
    note += (
        ". Values are means over seeds and sites; no patient of one site is compared with one of another. τ is the "
        "standard deviation between sites without sampling variation (random effects). The worst of several observed "
        "values is too low by selection; the shrunken value (empirical Bayes) corrects for that."
    )
    if (least := result.options.min_cell) > 0:
        note += f" Sites with fewer than {least} test patients are left out of means, which would reveal their values."
    without = {page.title(m.label): m.macro.without for m in result.methods if m.macro.without}
    if without:
        left = "; ".join(f"{m}: {listed(s)}" for m, s in without.items())
        note += f" Sites without a value are left out of means: {left}."
    if result.constant:
        note += f" “{page.title(result.constant.label)}” predicts {_CONSTANT[page.run.info.task]} for every patient."
    note += _about_linear(page)
    if any(m.external for m in result.methods):
        note += f" At an external site a method predicts with: {'; '.join(_by_method(page, 'unseen'))}."
    note += f" Fidelity to the methods' papers: {'; '.join(_by_method(page, 'fidelity'))}."
    chosen = {i: "chosen" for i, m in enumerate(result.methods) if m.label == result.headline}
    return Table("methods", f"{page.label} on test patients.", columns, rows, note, chosen)


def _about_linear(page: ReportContext) -> str:
    """Return what the linear baselines are, or why there are none."""
    if page.result.linear:
        names = listed([f"“{page.title(m.label)}”" for m in page.result.linear])
        return (
            f" {names}: a linear model with an L2 penalty, fitted to convergence to each site’s training patients or "
            "to those of all sites, with the penalty that has the lowest loss on the validation patients."
        )
    if len(page.run.info.inputs) > 1:
        return " A linear baseline does not apply to images."
    return " This run has no linear baseline, which simulated runs of tables have." if page.run.info.inputs else ""


def declared_table(page: ReportContext, brief: bool = False) -> Iterator[Table]:
    """Yield the comparisons that the study declared before the run; in brief, without the explanation."""
    result, d = page.result, page.digits
    if not result.declared:
        return
    rows: list[Row] = [
        {
            "method": page.title(c.method),
            "reference": page.title(c.reference),
            "question": c.difference.question,
            "margin": amount(c.difference.margin, d),
            "difference": cell(c.difference, d, signed=True),
            "p": Cell(p_value(c.difference.p), c.difference.p),
            "adjusted": Cell(p_value(c.difference.adjusted), c.difference.adjusted),
            "verdict": outcome(c.difference),
        }
        for c in result.declared
    ]
    columns = words(method="Method", reference="Compared with", question="Question") + numbers(margin="Margin")
    columns += numbers(difference=f"Difference ({page.level}\u00a0CI)", p="p", adjusted="p after Holm")
    columns += words(verdict="Result")
    note = (
        f"{page.label}, mean over sites, paired by patient; + is better. Margins are part of the study’s hash. A "
        "difference is tested two-sided at 5 %; non-inferiority and equivalence by one-sided tests at 2.5 %, so that "
        f"their p is compared with 0.025. Holm’s correction is for {many(len(rows), 'declared comparison')}."
    )
    left = [f"{page.title(c.method)}: {listed(c.without)}" for c in result.declared if c.without]
    note += f" Sites at which one of two was not tested are left out: {'; '.join(left)}." if left else ""
    if page.result.options.level != 0.95:
        note += " Tests use these levels whatever the level of the intervals."
    yield Table(
        "declared", "Comparisons that the study file declared before the run.", columns, rows, "" if brief else note
    )


def _lowest(m: MethodResult, d: int) -> Cell | str:
    """Return the site with the worst shrunken value, or without one the worst value."""
    if m.lowest is not None:
        site, e = m.lowest
        return Cell(f"{with_interval(e, d)} {site}", e.value)
    return Cell(f"{number(m.worst[1], d)} {m.worst[0]}, not shrunken", m.worst[1]) if m.worst else NONE


def _by_method(page: ReportContext, field: Literal["unseen", "fidelity"]) -> Iterator[str]:
    """Yield the values of a field of the table of methods, each with the methods that have it."""
    users: dict[str, list[str]] = {}
    for m in page.run.info.methods:
        if entry := METHODS.get(canonical(m.name)):
            users.setdefault(entry.unseen if field == "unseen" else entry.fidelity, []).append(page.title(m.label))
    for value, labels in users.items():
        yield f"{value} ({', '.join(labels)})"


def _differences(page: ReportContext, reference: str) -> Table:
    result, d = page.result, page.digits
    rows: list[Row] = [
        {
            "method": page.title(label),
            "difference": cell(diff, d, signed=True),
            "p": Cell(p_value(diff.p), diff.p),
            "adjusted": Cell(p_value(diff.adjusted), diff.adjusted),
            "splits": _p(result.over_splits.get(label)),
            "sites": _p(result.over_sites.get(label)),
            "verdict": outcome(diff),
        }
        for label, diff in result.comparisons.items()
    ]
    against = page.title(reference)
    columns = words(method="Method") + numbers(difference=f"Difference from {against} ({page.level}\u00a0CI)", p="p")
    columns += numbers(adjusted="p after Holm")
    columns += numbers(splits="p over splits") if result.over_splits else []
    columns += numbers(sites="p over sites") if result.over_sites else []
    columns += words(verdict="Result")
    seeds = ", plus the variance between seeds" if any(len(m.seeds) > 1 for m in result.methods) else ""
    also = "These comparisons were not declared before the run: they describe, and the declared ones decide. "
    note = (
        f"{also if result.declared else ''}Mean over sites, paired by patient{seeds}; + is better. "
        f"Holm’s correction for {many(len(rows), 'comparison')}. A difference is significant if the interval "
        f"excludes 0 "
        f"and the corrected p is below 0.05. It is not tested if fewer than {FEWEST} patients have different results."
    )
    if result.over_splits:
        note += " Over splits: Nadeau and Bengio’s corrected t, one split per seed, not corrected for multiplicity."
    if result.over_sites:
        note += " Over sites: Wilcoxon’s signed ranks, not corrected for multiplicity."
    return Table("differences", f"{page.label}, each method against {against}.", columns, rows, note)


def _p(d: Difference | None) -> Cell:
    return Cell(p_value(d.p), d.p) if d else Cell(NONE)


def _ranking(page: ReportContext) -> Iterator[Any]:
    ranking = page.result.ranking
    if ranking is None or ranking.blocks < 4:
        return
    titles = {m: page.title(m) for m in ranking.methods}
    pairs = list(zip(ranking.methods, ranking.ranks, strict=True))
    alt = "Mean ranks over sites: " + ", ".join(f"{titles[m]} {r:.2f}" for m, r in pairs)
    differ = "differ significantly" if ranking.p < 0.05 else "do not differ significantly"
    text = (
        f"Mean ranks over {ranking.blocks} sites. A bar joins methods whose ranks differ by less than Nemenyi’s "
        f"critical difference of {ranking.critical:.2f}. As a group the methods {differ} (Friedman’s test, "
        f"p = {p_value(ranking.p)})."
    )
    rows: list[Row] = [{"method": titles[m], "rank": amount(r, 2)} for m, r in pairs]
    table = Table("ranks", "Mean ranks, 1 is best.", words(method="Method") + numbers(rank="Mean rank"), rows)
    yield Folded(
        "Ranks over sites (critical difference)",
        [Picture(figures.ranks_plot("ranks", alt, ranking, titles), text), table],
    )


def sites_section(page: ReportContext) -> Section | None:
    """Return the results of the main method at every site, and of all methods."""
    first = page.first
    if first is None:
        return None
    blocks = [sites_picture(page, first), _sites_table(page, first), *_classes_table(page, first), *_matrix(page)]
    return Section("sites", "Results at every site", blocks)


def sites_picture(page: ReportContext, first: MethodResult, brief: bool = False) -> Picture:
    """Return the main method's results at every site."""
    result, d = page.result, page.digits
    name, order = result.metric.name, [s for s in page.run.info.sites if s.name in first.sites]
    points = []
    for s in order:
        e = first.sites[s.name][name]
        text = with_interval(e, d) if e.value is not None else "no value"
        points.append(figures.Point.of(s.name, e, text, "external" if s.role == "external" else "plain"))
    line = first.macro.value
    alt = f"{page.label} of {page.title(first.label)} at each site with {page.level} intervals: "
    alt += "; ".join(f"{p.name} {p.text}" for p in points)
    text = Markup("{} on each site’s own held-out patients.").format(page.title(first.label))
    if line is not None:
        text += Markup(" The dotted line is the mean over the training sites ({}).").format(number(line, d))
    if any(p.kind == "external" for p in points):
        text += Markup(" Diamonds are sites that did not take part in training.")
    if first.random is not None and not brief:
        e = first.random.estimate
        text += Markup(" Random-effects mean over sites: {} ({}); I² = {:.0f} %.").format(
            number(e.value, d), interval(e.low, e.high, d), 100 * first.random.i2
        )
        if first.random.prediction is not None:
            text += Markup(" A new site is expected between {} ({} prediction interval).").format(
                interval(*first.random.prediction, d), page.level
            )
    return Picture(figures.points("sites", alt, points, f"{page.label} ({page.level}\u00a0CI)", line), text)


def _sites_table(page: ReportContext, first: MethodResult) -> Table:
    result, d, name = page.result, page.digits, page.result.metric.name
    task = page.run.info.task
    others = [
        m
        for k, m in page.metrics.items()
        if k != name
        and k in SHOWN.get(task, tuple(page.metrics))
        and any(e[k].value is not None for e in first.sites.values())
    ]
    rows: list[Row] = []
    marks = {}
    for i, s in enumerate(s for s in page.run.info.sites if s.name in first.sites):
        estimates = first.sites[s.name]
        row: Row = {"site": s.name, "role": s.role, "patients": whole(result.patients[s.name])}
        own = {"images": whole(result.images[s.name]), "primary": cell(estimates[name], d)}
        rows.append({**row, **own, **{m.name: amount(estimates[m.name].value, digits_of(m)) for m in others}})
        if s.role == "external":
            marks[i] = "external"
    columns = words(site="Site", role="Role") + numbers(patients="Patients")
    if any(result.images[s] != result.patients[s] for s in result.patients):
        columns += numbers(images="Images")
    columns += numbers(primary=f"{page.label} ({page.level}\u00a0CI)", **{m.name: page.named(m) for m in others})
    ways = dict.fromkeys(e[name].how for e in first.sites.values() if e[name].how)
    why = [f"{s}: {e[name].why}" for s, e in first.sites.items() if e[name].why]
    note = f"Intervals: {'; '.join(ways) or 'none'}."
    note += f" No value or no interval at {'; '.join(why)}." if why else ""
    return Table("sites", f"{page.title(first.label)}, on test patients.", columns, rows, note + _unit(page), marks)


def _classes_table(page: ReportContext, first: MethodResult) -> Iterator[Table]:
    if not first.by_class:
        return
    own = [s.name for s in page.run.info.sites if s.role == "training" and s.name in first.sites]
    rows: list[Row] = [
        {"label": name, "auc": cell(e, 3), "sites": f"{len(own) - len(e.without)} of {len(own)}"}
        for name, e in first.by_class.items()
    ]
    known = [e.value for e in first.by_class.values() if e.value is not None]
    if len(known) == len(first.by_class):
        mean = sum(known) / len(known)
        rows.append({"label": "Mean over these classes", "auc": amount(mean), "sites": NONE})
    columns = words(label="Class") + numbers(auc=f"AUC against the rest ({page.level}\u00a0CI)", sites="Sites")
    note = "For each class, the mean over the training sites whose test patients include and lack it."
    yield Table("classes", f"AUC of every class, {page.title(first.label)}.", columns, rows, note)


def _matrix(page: ReportContext) -> Iterator[Folded]:
    result, d, name = page.result, page.digits, page.result.metric.name
    if len(result.methods) < 2:
        return
    sites = [s.name for s in page.run.info.sites if any(s.name in m.sites for m in result.methods)]
    rows: list[Row] = [
        {"method": page.title(m.label), **{s: cell(m.sites.get(s, {}).get(name), d) for s in sites}}
        for m in result.methods
    ]
    columns = words(method="Method") + numbers(**{s: s for s in sites})
    caption = f"{page.label} ({page.level}\u00a0CI) of every method at every site."
    yield Folded("All methods at all sites", [Table("methods_by_site", caption, columns, rows)])


def _unit(page: ReportContext) -> str:
    """Describe the unit of analysis: patients or images."""
    result = page.result
    if result.options.unit == "image":
        return " Each image is a case; variances are by patient."
    if result.unit == "image":
        return (
            " Each image is a case, because images of one patient have different classes and no rule gives the patient "
            "one; variances are by patient."
        )
    if all(result.images[s] == result.patients[s] for s in result.patients):
        return " One image for each patient."
    text = " The unit is the patient: the scores of a patient’s images are averaged"
    rules = {
        "classification": ", and a patient is positive if any image is",
        "multilabel": ", and a label is positive if it is in any image",
        "regression": ", and so are the true values",
    }
    return text + rules.get(page.run.info.task, "") + "."
