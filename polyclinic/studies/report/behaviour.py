"""Sections on how the chosen method behaves: learning curves, and then what its kind of task asks for."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from polyclinic.studies import calibration as cal
from polyclinic.studies import figures
from polyclinic.studies.costs import learning_curve
from polyclinic.studies.evaluation import external_sites, training_sites
from polyclinic.studies.metrics import Undefined
from polyclinic.studies.predictions import Cases, as_cases
from polyclinic.studies.report.blocks import Cell, Column, Folded, Pair, Picture, Section, Table, Text
from polyclinic.studies.report.page import Source
from polyclinic.studies.report.quality import cell
from polyclinic.studies.report.words import NONE, count, many, number, with_interval


def curves_section(page: Source) -> Section | None:
    """Validation over rounds."""
    metric, d = page.result.metric, page.digits
    lines = {m.label: learning_curve(page.run, m.label, metric.name) for m in page.run.info.methods}
    lines = {k: c for k, c in lines.items() if c.rounds}
    if not lines:
        return None
    shown = {page.title(k): (c.rounds, c.values) for k, c in lines.items()}
    pick = np.argmax if page.higher else np.argmin
    rows: list[dict[str, Cell | str]] = []
    for k, c in lines.items():
        best, cost = int(pick(c.values)), page.costs.get(k)
        reached = cost.reached if cost else None
        rows.append(
            {
                "method": page.title(k), "last": Cell(number(c.values[-1], d), c.values[-1]),
                "best": Cell(number(c.values[best], d), c.values[best]),
                "round": Cell(str(c.rounds[best]), c.rounds[best]),
                "reached": Cell(NONE if reached is None else str(reached), reached),
            }
        )  # fmt: skip
    columns = [
        Column("method", "Method", False), Column("best", "Best"), Column("round", "at round"),
        Column("last", "Last round"), Column("reached", "Target reached at round"),
    ]  # fmt: skip
    note = "Mean over seeds and training sites, on validation patients; test patients were not looked at."
    if page.target is not None:
        note += f" Target: {number(page.target.value, d)}, {page.target.meaning}."
    alt = (
        f"Validation {page.label} over rounds, one line for each of {many(len(lines), 'method')}; values in the table."
    )
    picture = Picture(
        figures.curves("curves", alt, shown, f"Validation {page.label}"),
        "How fast each method learns, on validation patients.",
    )
    return Section(
        "curves",
        "Learning curves",
        [picture, Table("curves", f"Validation {page.label}.", columns, rows, note), *_by_site(page)],
    )


def _by_site(page: Source) -> Iterator[Folded]:
    if page.first is None:
        return
    lines = {
        s: learning_curve(page.run, page.first.label, page.result.metric.name, s) for s in training_sites(page.run)
    }
    shown = {s: (c.rounds, c.values) for s, c in lines.items() if c.rounds}
    if not 1 < len(shown) <= 12:
        return
    title, d = page.title(page.first.label), page.digits
    alt = f"Validation {page.label} of {title} over rounds, one line for each site; first and last values in the table."
    picture = Picture(
        figures.curves("curves-sites", alt, shown, f"Validation {page.label}"),
        f"{title} at each training site, mean over seeds.",
    )
    rows: list[dict[str, Cell | str]] = [
        {"site": s, "first": Cell(number(y[0], d), y[0]), "last": Cell(number(y[-1], d), y[-1])}
        for s, (_, y) in shown.items()
    ]
    columns = [Column("site", "Site", False), Column("first", "First round"), Column("last", "Last round")]
    yield Folded(
        "Each site's curve", [picture, Table("curves_sites", f"Validation {page.label} of {title}.", columns, rows)]
    )


def task_section(page: Source) -> Section | None:
    """Calibration and use for classification; agreement for regression; masks for segmentation."""
    if page.first is None:
        return None
    task = page.run.info.task
    if task in ("classification", "multilabel"):
        return _calibration(page)
    if task == "regression":
        return _agreement(page)
    return _masks(page)


def _cases(page: Source, sites: list[str], validation: bool = False) -> Cases | None:
    """The chosen method's cases over ``sites``, seeds one after the other."""
    first = page.first
    assert first is not None
    arms = page.run.validation if validation else page.run.arms
    options, regression = page.result.options, page.run.info.task == "regression"
    found = [
        as_cases(arms[first.label, seed][s], options.unit, regression)
        for seed in first.seeds
        if (first.label, seed) in arms
        for s in sites
        if s in arms[first.label, seed]
    ]
    if not found:
        return None
    joined = [np.concatenate([getattr(c, k) for c in found]) for k in ("patient", "score", "target")]
    return Cases(joined[0], joined[1], joined[2], {}, sum(c.images for c in found))


def _calibration(page: Source) -> Section:
    first, own, away = page.first, training_sites(page.run), external_sites(page.run)
    assert first is not None
    groups = {
        name: c
        for name, sites in (("Training sites", own), ("External", away))
        if (c := _cases(page, sites)) is not None
    }
    bins = {name: cal.reliability(c.score, c.target) for name, c in groups.items()}
    rows: list[dict[str, Cell | str]] = [
        {"group": name, "range": f"{b.low:.1f}–{b.high:.1f}", "predicted": Cell(number(b.predicted), b.predicted),
         "observed": Cell(number(b.observed), b.observed), "n": Cell(count(b.n), b.n)}
        for name, found in bins.items() for b in found
    ]  # fmt: skip
    pictures = [
        Picture(
            figures.reliability_plot(
                "reliability",
                "Observed share against predicted probability in ten bins; all points are in the table.",
                bins,
            ),
            "Below the diagonal, probabilities are too high; above it, too low.",
        )
    ]
    table = [k for k in ("ece", "brier", "calibration_slope", "calibration_intercept") if k in first.pooled]
    names = {"ece": "Calibration error (ECE)", "brier": "Brier score", "calibration_slope": "Slope (1 is ideal)",
             "calibration_intercept": "Intercept (0 is ideal)"}  # fmt: skip
    summary: list[dict[str, Cell | str]] = [
        {"metric": names[k], "training": cell(first.pooled[k], 3), "external": cell(first.external.get(k), 3)}
        for k in table
    ]
    columns = [
        Column("metric", "", False),
        Column("training", f"Training sites ({page.level} CI)"),
        Column("external", f"External ({page.level} CI)"),
    ]
    if not first.external:
        columns.pop()
    binary = page.run.info.task == "classification" and len(page.run.info.classes or (0, 0)) == 2
    more: list[Any] = []
    if binary:
        everyone = groups.get("External") or groups["Training sites"]
        where = "external site" if "External" in groups else "training sites"
        curve = cal.decision_curve(everyone.score[:, 1], everyone.target == 1)
        pictures.append(
            Picture(
                figures.decision_plot(
                    "decision",
                    f"Net benefit of acting on the model over threshold probabilities, on the {where}; values in the table.",
                    curve,
                ),
                f"Net benefit on the {where}: acting on the model is worth it where its line lies above both others.",
            )
        )
        more = [*_operating(page, own, away), _curve_table(page, curve, where)]
    fold = Folded(
        "The points of the reliability plot",
        [Table("reliability", "Ten bins of equal width.", [
            Column("group", "Patients", False), Column("range", "Bin", False), Column("predicted", "Mean predicted"),
            Column("observed", "Observed share"), Column("n", "Cases (all seeds)")], rows)],
    )  # fmt: skip
    title = "Calibration and clinical use" if binary else "Calibration"
    note = "" if binary else "Of the likeliest class." if page.run.info.task == "classification" else "Over all labels."
    calibration = Table("calibration", f"{page.title(first.label)}, test patients.", columns, summary, note)
    return Section("calibration", title, [Pair(pictures), calibration, *more, fold])


def _operating(page: Source, own: list[str], away: list[str]) -> Iterator[Any]:
    chosen = _cases(page, own, validation=True)
    if chosen is None:
        yield Text(
            "No operating point is shown: the run kept no validation predictions to choose a threshold on.", "note"
        )
        return
    rows: list[dict[str, Cell | str]] = []
    for wanted in (0.9, 0.95):
        for name, sites in (("training sites", own), ("external", away)):
            cases = _cases(page, sites)
            if cases is None:
                continue
            try:
                point = cal.operating_point(
                    cases.score[:, 1], cases.target == 1, chosen.score[:, 1], chosen.target == 1, wanted
                )
            except Undefined as reason:
                yield Text(f"No operating point for {wanted:.0%} sensitivity: {reason}.", "note")
                continue
            rows.append(
                {
                    "wanted": f"{100 * wanted:.0f} %", "where": name, "threshold": Cell(number(point.threshold), point.threshold),
                    "sensitivity": Cell(number(point.sensitivity), point.sensitivity),
                    "specificity": Cell(number(point.specificity), point.specificity),
                }
            )  # fmt: skip
    columns = [
        Column("wanted", "Sensitivity wanted", False), Column("where", "Patients", False), Column("threshold", "Threshold"),
        Column("sensitivity", "Sensitivity"), Column("specificity", "Specificity"),
    ]  # fmt: skip
    note = "The threshold was chosen on validation patients of the training sites and applied to test patients, all seeds together."
    yield Table("operating_points", "Operating points at a fixed sensitivity.", columns, rows, note)


def _curve_table(page: Source, curve: list[cal.NetBenefit], where: str) -> Folded:
    rows: list[dict[str, Cell | str]] = [
        {
            "t": Cell(f"{p.threshold:.2f}", p.threshold),
            "model": Cell(number(p.model), p.model),
            "all": Cell(number(p.everybody), p.everybody),
        }
        for p in curve
    ]
    columns = [Column("t", "Threshold"), Column("model", "Act on the model"), Column("all", "Act on everybody")]
    return Folded(
        "The numbers of the decision curve", [Table("decision_curve", f"Net benefit on the {where}.", columns, rows)]
    )


def _agreement(page: Source) -> Section | None:
    first, away = page.first, external_sites(page.run)
    cases = _cases(page, away) or _cases(page, training_sites(page.run))
    if first is None or cases is None:
        return None
    where = "external site" if _cases(page, away) else "training sites"
    error, mean = (cases.score - cases.target)[:, 0], ((cases.score + cases.target) / 2)[:, 0]
    bias, sd = float(error.mean()), float(error.std(ddof=1)) if len(error) > 1 else 0.0
    limits = (bias - 1.96 * sd, bias, bias + 1.96 * sd)
    names = ("Lower limit of agreement", "Bias", "Upper limit of agreement")
    rows: list[dict[str, Cell | str]] = [
        {"what": n, "value": Cell(number(v, 2, signed=True), v)} for n, v in zip(names, limits, strict=True)
    ]
    alt = f"Prediction minus truth against their mean on the {where}; bias {bias:.2f}, limits {limits[0]:.2f} and {limits[2]:.2f}."
    text = (
        f"Each dot is a patient of the {where} (all seeds). 95 % of differences are expected between the dashed lines."
    )
    picture = Picture(figures.agreement_plot("agreement", alt, mean, error, limits, ""), text)
    table = Table(
        "agreement", "Agreement after Bland and Altman.", [Column("what", "", False), Column("value", "Value")], rows
    )
    return Section("agreement", "Agreement of prediction and truth", [picture, table])


def _masks(page: Source) -> Section | None:
    first = page.first
    if first is None:
        return None
    rows: list[dict[str, Cell | str]] = []
    for site, estimates in first.sites.items():
        arms = [page.run.arms[first.label, s][site] for s in first.seeds]
        empty = [int(a.cases["empty"].astype(bool).sum()) for a in arms if "empty" in a.cases]
        n = float(np.mean(empty)) if empty else None
        row: dict[str, Cell | str] = {
            "site": site,
            "empty": Cell(NONE if n is None else f"{n:g}" if n == int(n) else f"{n:.1f}", n),
        }
        row |= {
            k: Cell(with_interval(e, 1 if k == "hd95" else 3), e.value)
            for k, e in estimates.items()
            if e.value is not None
        }
        rows.append(row)
    from polyclinic.studies.metrics import metrics_for

    metrics = [m for k, m in metrics_for(page.run.info.task).items() if any(k in r for r in rows)]
    columns = [
        Column("site", "Site", False),
        *(Column(m.name, f"{m.label} ({m.unit})" if m.unit else m.label) for m in metrics),
    ]
    if page.run.info.task != "segmentation":
        return Section(
            "cases", "Image quality", [Table("cases", f"{page.title(first.label)}, mean per patient.", columns, rows)]
        )
    columns.append(Column("empty", "Empty predictions"))
    note = (
        "A prediction that is empty though there is a target counts as Dice 0, surface Dice 0 and a distance of the image's "
        "diagonal; one that is empty as it should be, as Dice 1 and a distance of 0. None is left out of a mean. “Empty "
        "predictions” counts the first kind, as the mean over seeds."
    )
    table = Table("masks", f"{page.title(first.label)}, mean per patient.", columns, rows, note)
    return Section("masks", "Overlap, distances and empty masks", [table])
