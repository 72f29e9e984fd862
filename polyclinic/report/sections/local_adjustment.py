"""Tables on what a site can do with its own validation patients: recalibrate the model, and form prediction sets."""

from collections.abc import Iterator
from typing import Any

from polyclinic.evaluation.prediction_sets import prediction_sets
from polyclinic.evaluation.recalibration import FEWEST, METRICS, TESTED, recalibration
from polyclinic.evaluation.run_evaluation import MethodResult
from polyclinic.report.context import ReportContext
from polyclinic.report.formatting import NONE, amount, cell, listed, outcome, whole, with_interval
from polyclinic.report.page_blocks import Folded, Row, Table, Text, numbers, words


def recalibration_blocks(page: ReportContext, first: MethodResult) -> Iterator[Any]:
    """Yield the results before and after each site's own intercept; nothing without validation predictions."""
    o = page.result.options
    found = recalibration(page.run, first.label, o.level, page.result.unit, o.min_cell)
    if found is None:
        return
    rows: list[Row] = []
    for site in found.before:
        row: Row = {"site": site, "patients": whole(page.result.patients[site])}
        for k in METRICS:
            both = {f"{k}_before": cell(found.before[site][k], 3), f"{k}_after": cell(found.after[site][k], 3)}
            row = {**row, **both}
        rows.append(row)
    columns = words(site="Site") + numbers(patients="Patients")
    for k in METRICS:
        label = page.metrics[k].label
        columns += numbers(**{f"{k}_before": f"{label}, before", f"{k}_after": f"{label}, after"})
    note = (
        f"One intercept for each site and seed, fitted on the site’s own validation patients (at least {FEWEST}); the "
        "AUC within a site does not change. A difference between sites that this removes is one of prevalence and "
        "threshold, not of what the model has learned."
    )
    if found.without:
        few = [f"{site} ({n})" for site, n in found.without.items()]
        note += f" Too few validation patients at {listed(few)}."
    yield Table("recalibration", "Recalibration at every site.", columns, rows, note)
    parts = [
        f"{page.metrics[k].label} {with_interval(d, 3, signed=True)}, {outcome(d)}"
        for k, d in found.differences.items()
        if k in TESTED
    ]
    yield Text(f"After minus before, mean over these sites, + is better, Holm-corrected: {'; '.join(parts)}.")


def prediction_sets_blocks(page: ReportContext, first: MethodResult) -> Iterator[Folded]:
    """Yield the coverage of conformal prediction sets at every site; nothing without validation predictions."""
    result = page.result
    sites = [s for s in first.sites if result.patients[s] >= result.options.min_cell]
    found = prediction_sets(page.run, first.label, sites, result.unit, level=result.options.level, shared=result.shared)
    if found is None:
        return
    rows: list[Row] = []
    for site, sets in found.common.items():
        own = found.own.get(site)
        row: Row = {"site": site, "common": cell(sets.coverage, 3), "size": amount(sets.size, 2)}
        row = {**row, "single": amount(sets.single, 2)}
        rows.append(
            {
                **row,
                "own": cell(own.coverage, 3) if own else NONE,
                "own_size": amount(own.size, 2) if own else NONE,
                "own_single": amount(own.single, 2) if own else NONE,
            }
        )
    ci = f"({page.level}\u00a0CI)"
    columns = words(site="Site")
    columns += numbers(common=f"Coverage, common threshold {ci}", size="Classes in a set", single="Sets of one class")
    columns += numbers(own=f"Coverage, own threshold {ci}", own_size="Classes in a set", own_single="Sets of one class")
    note = (
        f"Each set contains the patient’s class with a stated probability of {100 * found.stated:.0f} % (split "
        "conformal prediction, score 1 − p). The common threshold is from the validation patients of all training "
        "sites, and its coverage is stated for their mixture; a site’s own threshold needs "
        f"{found.needed} validation patients."
    )
    caption = "Conformal prediction sets at every site."
    yield Folded("Prediction sets", [Table("prediction_sets", caption, columns, rows, note)])
