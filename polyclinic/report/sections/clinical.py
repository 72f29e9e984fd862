"""The section that depends on the task: calibration and clinical use, agreement, survival curves, or masks."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from polyclinic.evaluation import calibration as cal
from polyclinic.evaluation.net_benefit import NetBenefit, decision_curve
from polyclinic.evaluation.operating_points import OperatingPoint, operating_point
from polyclinic.evaluation.records.predictions import Cases, as_cases
from polyclinic.evaluation.records.run_reader import external_sites, training_sites
from polyclinic.evaluation.run_evaluation import MethodResult
from polyclinic.report import figures
from polyclinic.report.context import ReportContext
from polyclinic.report.formatting import amount, cell, digits_of, listed, number, whole, with_interval
from polyclinic.report.page_blocks import Cell, Folded, Pair, Picture, Row, Section, Table, Text, numbers, words
from polyclinic.report.sections.local_adjustment import prediction_sets_blocks, recalibration_blocks
from polyclinic.report.sections.survival import survival_section
from polyclinic.statistics.undefined import Undefined

TRAINING, EXTERNAL = "Training sites", "External"
SPACES = {
    "": "",
    "native": "Predictions were brought back to the original grid of each file and compared with its mask there.",
    "grid": (
        "Masks were compared on the network’s grid, after resampling and cropping. On the original images, if "
        "these are finer, the values can be lower."
    ),
}


def task_section(page: ReportContext) -> Section | None:
    """Return the section: calibration, agreement for regression, survival curves, or masks."""
    first, task = page.first, page.run.info.task
    if first is None:
        return None
    if task in ("classification", "multilabel"):
        return _calibration(page, first)
    if task == "survival":
        return survival_section(page, first)
    return _agreement(page, first) if task == "regression" else _values(page, first)


def _cases(page: ReportContext, first: MethodResult, sites: Sequence[str]) -> Cases | None:
    """Return the main method's cases over ``sites``, of all seeds."""
    arms, unit = page.run.arms, page.result.unit
    found = [
        as_cases(arms[first.label, seed][s], unit, page.run.info.task == "regression")
        for seed in first.seeds
        for s in sites
        if s in arms.get((first.label, seed), {})
    ]
    if not found:
        return None
    patient, score, target = (np.concatenate([getattr(c, k) for c in found]) for k in ("patient", "score", "target"))
    return Cases(patient, score, target, {}, sum(c.images for c in found))


def _groups(page: ReportContext, first: MethodResult) -> dict[str, Cases]:
    places = {TRAINING: training_sites(page.run), EXTERNAL: external_sites(page.run)}
    return {name: c for name, sites in places.items() if (c := _cases(page, first, sites)) is not None}


def _calibration(page: ReportContext, first: MethodResult) -> Section:
    groups = _groups(page, first)
    bins = {name: cal.reliability(c.score, c.target) for name, c in groups.items()}
    alt = "Observed frequency against predicted probability in ten bins; all points are in the table."
    text = (
        "Below the diagonal the probabilities are too high, above it too low. Larger markers represent more cases, of "
        "all sites and seeds together; the tables show single sites."
    )
    pictures = [Picture(figures.reliability_plot("reliability", alt, bins), text)]
    blocks: list[Any] = [_summary(page, first)]
    binary = next(iter(groups.values())).score.shape[1] == 2 and page.run.info.task == "classification"
    if binary:
        shown = [s for s in first.sites if page.result.patients[s] >= page.result.options.min_cell]
        away = [s for s in external_sites(page.run) if s in shown]
        sites = away or [s for s in training_sites(page.run) if s in shown]
        curve = decision_curve(page.data, first.label, sites)
        place = "external sites" if away else "training sites"
        alt = f"Decision curve: net benefit over threshold probabilities, mean over {place}; values in the table."
        text = (
            f"Decision curve, mean over the {place}, with the {page.level} interval of the model’s: acting on the "
            "model has a net benefit where its line is above both others. Which thresholds matter is a clinical "
            "question; at the prevalence of other patients the curve is another."
        )
        pictures.append(Picture(figures.decision_plot("decision", alt, curve), text))
        blocks += [_by_site(page, first), *recalibration_blocks(page, first)]
        blocks += [*_operating(page, first), _curve_table(page, curve, place)]
        blocks.append(_gains_by_site(page, first))
    blocks += prediction_sets_blocks(page, first)
    title = "Calibration and clinical use" if binary else "Calibration"
    return Section("calibration", title, [Pair(pictures), *blocks, _bins_table(bins)])


IDEAL = {"observed_to_expected": " (1 is ideal)", "calibration_slope": " (1 is ideal)"}
IDEAL["calibration_intercept"] = " (0 is ideal)"


def _summary(page: ReportContext, first: MethodResult) -> Table:
    names = ("calibration_error", "brier", *IDEAL)
    rows: list[Row] = [
        {
            "metric": page.metrics[k].label + IDEAL.get(k, ""),
            "training": cell(first.means.get(k), 3),
            "external": cell(first.external.get(k), 3),
        }
        for k in names
        if k in first.means or k in first.external
    ]
    columns = words(metric="Measure") + numbers(training=f"{TRAINING} ({page.level}\u00a0CI)")
    columns += numbers(external=f"{EXTERNAL} ({page.level}\u00a0CI)") if first.external else []
    note = {
        "multilabel": "Over all labels. ",
        "classification": "" if "calibration_slope" in first.means else "Of the most likely class. ",
    }[page.run.info.task]
    note += (
        "Means over sites. Calibration error: ten bins of equal width, root mean square, without the bias that "
        "sampling adds; it has no interval. A slope below 1 means that predictions are too extreme, above 1 not "
        "extreme enough."
    )
    for k in names:
        parts = [e.without for e in (first.means.get(k), first.external.get(k)) if e is not None and e.without]
        if parts:
            left = dict.fromkeys(s for part in parts for s in part)
            note += f" {page.metrics[k].label}: without {listed(list(left))}, where it is undefined."
    return Table("calibration", f"{page.title(first.label)}, test patients.", columns, rows, note)


def _by_site(page: ReportContext, first: MethodResult) -> Table:
    """Return calibration at every site, with intervals: a mean hides sites that err in opposite directions."""
    rows: list[Row] = [
        {"site": s, "patients": whole(page.result.patients[s]), **{k: cell(found.get(k), 2) for k in IDEAL}}
        for s, found in first.sites.items()
    ]
    columns = words(site="Site") + numbers(patients="Patients")
    columns += numbers(**{k: page.metrics[k].label + ideal for k, ideal in IDEAL.items()})
    marks = {i: "external" for i, s in enumerate(first.sites) if s in external_sites(page.run)}
    note = (
        f"{page.level} intervals. “none”: the patients do not determine it, for example because a threshold separates "
        "the classes. Below 1, observed/expected means that probabilities are too high."
    )
    return Table("calibration_by_site", "Calibration at every site.", columns, rows, note, marks)


def _bins_table(bins: Mapping[str, Sequence[cal.Bin]]) -> Folded:
    rows: list[Row] = [
        {
            "group": name,
            "range": f"{b.low:.1f}–{b.high:.1f}",
            "predicted": amount(b.predicted),
            "observed": amount(b.observed),
            "n": whole(b.n),
        }
        for name, found in bins.items()
        for b in found
    ]
    columns = words(group="Patients", range="Bin")
    columns += numbers(predicted="Mean predicted", observed="Observed frequency", n="Cases, all seeds")
    return Folded("Points of the reliability plot", [Table("reliability", "Reliability.", columns, rows)])


def _operating(page: ReportContext, first: MethodResult) -> Iterator[Any]:
    result, rows, drops = page.result, list[Row](), list[str]()
    places = {TRAINING: training_sites(page.run), EXTERNAL: [s for s in external_sites(page.run) if s in first.sites]}
    for wanted in (0.9, 0.95):
        found = {}
        for place, sites in places.items():
            if not sites:
                continue
            try:
                point = operating_point(
                    page.run, first.label, sites, result.unit, wanted, result.options.level, result.shared
                )
            except Undefined as reason:
                yield Text(f"No operating point is shown: {reason}.", "note")
                return
            found[place] = point
            low, high = min(point.thresholds), max(point.thresholds)
            threshold = Cell(number(low) if low == high else f"{number(low)} to {number(high)}", low)
            row: Row = {"wanted": f"{100 * wanted:.0f} %", "where": place.lower(), "threshold": threshold}
            rows.append({**row, **{k: cell(getattr(point, k), 3) for k in ("sensitivity", "specificity")}})
        if len(found) == 2:
            drops.append(f"{100 * wanted:.0f} %: {_drop(found[TRAINING], found[EXTERNAL])}")
    columns = words(wanted="Target sensitivity", where="Patients")
    columns += numbers(
        threshold="Threshold",
        sensitivity=f"Sensitivity ({page.level}\u00a0CI)",
        specificity=f"Specificity ({page.level}\u00a0CI)",
    )
    note = (
        "Each seed’s threshold was chosen on that seed’s validation patients of the training sites and applied to its "
        "test patients; values are means over seeds. Intervals (Clopper-Pearson) are for these thresholds."
    )
    yield Table("operating_points", "Operating points at a fixed sensitivity.", columns, rows, note)
    if drops:
        yield Text(f"External minus training sites at the same thresholds. Target sensitivity {'; '.join(drops)}.")


def _drop(training: OperatingPoint, external: OperatingPoint) -> str:
    """Describe the change of both rates from training to external sites."""
    parts = []
    for name in ("sensitivity", "specificity"):
        inside, outside = getattr(training, name).value, getattr(external, name).value
        if inside is not None and outside is not None:
            parts.append(f"{name} {number(outside - inside, 3, signed=True)}")
    return ", ".join(parts) or "not determined"


def _curve_table(page: ReportContext, curve: Sequence[NetBenefit], place: str) -> Folded:
    rows: list[Row] = [
        {"t": amount(p.threshold, 2), "model": cell(p.model, 3), "all": amount(p.treat_all.value)}
        | {"gain": cell(p.gain, 3, signed=True)}
        for p in curve
    ]
    ci = f"({page.level}\u00a0CI)"
    columns = numbers(t="Threshold", model=f"Model {ci}", all="Treat all", gain=f"Model minus the better default {ci}")
    note = (
        "The better default is treating all or treating none, at each site. Intervals are pointwise: they do not cover "
        "the whole curve at once."
    )
    caption = f"Net benefit for each patient, mean over the {place}; treating none gives 0."
    return Folded("Values of the decision curve", [Table("decision_curve", caption, columns, rows, note)])


def _gains_by_site(page: ReportContext, first: MethodResult) -> Folded:
    shown = (0.1, 0.2, 0.3, 0.5)
    rows: list[Row] = []
    for site in first.sites:
        if page.result.patients[site] >= page.result.options.min_cell:
            curve = decision_curve(page.data, first.label, [site], shown)
            rows.append({"site": site, **{f"t{p.threshold}": cell(p.gain, 3, True) for p in curve}})
    columns = words(site="Site") + numbers(**{f"t{t}": f"At threshold {t}" for t in shown})
    caption = f"Net benefit of the model minus the better of treating all and none, by site ({page.level}\u00a0CI)."
    return Folded("Net benefit at every site", [Table("net_benefit_by_site", caption, columns, rows)])


def _agreement(page: ReportContext, first: MethodResult) -> Section | None:
    groups = _groups(page, first)
    where, cases = (EXTERNAL, groups[EXTERNAL]) if EXTERNAL in groups else (TRAINING, groups[TRAINING])
    place = "external patient" if where == EXTERNAL else "test patient of the training sites"
    error, mean = (cases.score - cases.target)[:, 0], ((cases.score + cases.target) / 2)[:, 0]
    bias, sd = float(error.mean()), float(error.std(ddof=1)) if len(error) > 1 else 0.0
    limits = (bias - 1.96 * sd, bias, bias + 1.96 * sd)
    names = ("Lower limit of agreement", "Bias", "Upper limit of agreement")
    rows: list[Row] = [{"what": n, "value": amount(v, 2, signed=True)} for n, v in zip(names, limits, strict=True)]
    alt = "Prediction minus truth against their mean: " + "; ".join(
        f"{n} {number(v, 2)}" for n, v in zip(names, limits, strict=True)
    )
    text = f"Each dot is one {place} and seed. 95 % of differences are expected between the dashed lines."
    picture = Picture(figures.agreement_plot("agreement", alt, mean, error, limits, ""), text)
    columns = words(what="Line") + numbers(value="Value")
    table = Table("agreement", "Agreement of prediction and truth (Bland and Altman).", columns, rows)
    return Section("agreement", "Agreement of prediction and truth", [picture, table])


def empty_predictions(page: ReportContext, first: MethodResult, site: str) -> float | None:
    """Return the mean number over seeds of empty predictions for non-empty targets; None if not recorded."""
    arms = [page.run.arms[first.label, s][site] for s in first.seeds]
    counts = [int(a.cases["empty"].astype(bool).sum()) for a in arms if "empty" in a.cases]
    return float(np.mean(counts)) if counts else None


def blank_share(page: ReportContext, first: MethodResult, site: str) -> float | None:
    """Return the share of images and classes with an empty target; None if not recorded."""
    arms = [page.run.arms[first.label, s][site] for s in first.seeds]
    shares = [float(a.cases["blank"].astype(bool).mean()) for a in arms if "blank" in a.cases]
    return float(np.mean(shares)) if shares else None


def _values(page: ReportContext, first: MethodResult) -> Section:
    """Return the section of per-case values, and for segmentation of empty masks."""
    title = page.title(first.label)
    shown = [m for k, m in page.metrics.items() if any(e[k].value is not None for e in first.sites.values())]
    rows: list[Row] = []
    for site, estimates in first.sites.items():
        cells = {m.name: Cell(with_interval(e := estimates[m.name], digits_of(m)), e.value) for m in shown}
        empty = empty_predictions(page, first, site)
        known = {"blank": amount(blank_share(page, first, site), 2)}
        known["empty"] = amount(empty, 0 if empty is None or empty == int(empty) else 1)
        rows.append({"site": site, **cells, **known})
    columns = words(site="Site") + numbers(**{m.name: page.named(m) for m in shown})
    if page.run.info.task != "segmentation":
        return Section("cases", "Image quality", [Table("cases", f"{title}, mean over patients.", columns, rows)])
    note = (
        "An empty prediction for a non-empty target counts as Dice 0, surface Dice 0 and a distance of the image’s "
        "diagonal. A class that neither the prediction nor the target of a case contains is left out of the means, "
        "except in “Dice, both empty = 1”, which counts it as 1. "
        "“Empty predictions” is the number of the first kind, mean over seeds. " + SPACES[page.run.info.space]
    )
    arms = [arm[s] for arm in page.run.arms.values() for s in first.sites if s in arm]
    if any("sliced" in arm.cases for arm in arms):
        note += " The slices of a patient are scored as one volume: Dice and volume error are of all slices together."
    if any("blank" in arm.cases for arm in arms):
        columns += numbers(blank="Share of empty truth")
        note += " “Share of empty truth”: of all pairs of an image and a class, those whose target is empty."
    columns += numbers(empty="Empty predictions")
    return Section(
        "masks",
        "Overlap, distances and empty masks",
        [Table("masks", f"{title}, mean over patients.", columns, rows, note)],
    )
