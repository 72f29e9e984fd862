"""The section on survival: observed curves of sites and of predicted risk groups, and calibration at the horizon.

Curves are evaluated at the times of the study, not of patients, and only where enough patients are still observed,
so that no step shows a single patient.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from polyclinic.evaluation.records.predictions import Cases
from polyclinic.evaluation.records.run_reader import external_sites, training_sites
from polyclinic.evaluation.run_evaluation import MethodResult
from polyclinic.evaluation.survival_metrics import order_of, predicts_probabilities, times_of
from polyclinic.report import figures
from polyclinic.report.context import ReportContext
from polyclinic.report.formatting import NONE, amount, cell, interval, listed, number, whole
from polyclinic.report.page_blocks import Cell, Pair, Picture, Row, Section, Table, Text, numbers, words
from polyclinic.statistics.survival import at_risk, curve_limits
from polyclinic.statistics.undefined import Array

FEWEST = 10
"""The fewest patients of a curve, and the fewest who are still observed at a time at which it is shown."""
THIRDS = ("lowest risk", "middle", "highest risk")


def survival_section(page: ReportContext, first: MethodResult) -> Section | None:
    """Return the section of the main method, on the test patients of its first seed."""
    cases = page.data.cases[first.label, first.seeds[0]]
    fewest = max(page.result.options.min_cell, FEWEST)
    shown = {s: c for s, c in cases.items() if len(c.target) >= fewest and s in first.sites}
    hidden = [s for s in cases if s not in shown]
    if not shown:
        text = f"No site has {fewest} test patients, so no curve is shown."
        return Section("survival", "Survival", [Text(text)])
    times = times_of(next(iter(shown.values())).target)
    blocks: list[Any] = [Pair(list(_pictures(page, first, shown, times, fewest)))]
    if hidden:
        blocks.append(Text(f"Not shown, with fewer than {fewest} test patients: {listed(hidden)}.", "note"))
    return Section(
        "survival", "Survival", [*blocks, _risk_table(page, first, shown, fewest), _by_site(page, first, shown)]
    )


def _observed(cases: Sequence[Cases], times: Array, fewest: int, level: float) -> tuple[Array, Array, Array]:
    """Return the curve of all ``cases`` and its limits, NaN at times that fewer than ``fewest`` patients reach."""
    target = np.concatenate([c.target for c in cases])
    known = at_risk(target[:, 0], times) >= fewest
    value, low, high = (np.where(known, v, np.nan) for v in curve_limits(target[:, 0], target[:, 1], times, level))
    return value, low, high


def _pictures(
    page: ReportContext, first: MethodResult, shown: Mapping[str, Cases], times: Array, fewest: int
) -> Iterator[Picture]:
    level = page.result.options.level
    away = external_sites(page.run)
    sites = {s: _observed([c], times, fewest, level)[0] for s, c in shown.items()}
    curves = {s: [figures.Curve(v, dashed=s in away)] for s, v in sites.items()}
    alt = "Observed survival at each site: " + _said(sites, times)
    text = "Observed survival of each site’s test patients (Kaplan-Meier)"
    text += "; dashed lines are sites that did not take part in training." if away else "."
    axis = "Time, in the unit of the data"
    yield Picture(figures.survival_plot("survival_sites", alt, times, curves, axis), text)
    groups = _thirds([c for s, c in shown.items() if s in training_sites(page.run)] or list(shown.values()))
    drawn: dict[str, list[figures.Curve]] = {}
    for name, c in groups.items():
        value, low, high = _observed([c], times, fewest, level)
        drawn[name] = [figures.Curve(value, low, high)]
        if predicts_probabilities(c.score, c.target):
            drawn[name].append(figures.Curve(c.score.mean(0), dashed=True))
    alt = "Observed survival by predicted risk: " + _said({k: v[0].values for k, v in drawn.items()}, times)
    text = (
        f"Test patients of the training sites in thirds of the risk that {page.title(first.label)} predicts: observed "
        f"survival (Kaplan-Meier) with {page.level} intervals"
    )
    text += ", and the mean predicted survival (dashed)." if any(len(v) > 1 for v in drawn.values()) else "."
    yield Picture(figures.survival_plot("survival_groups", alt, times, drawn, axis), text)


def _said(curves: Mapping[str, Array], times: Array) -> str:
    """Describe the last known value of each curve."""
    parts = []
    for name, values in curves.items():
        known = np.flatnonzero(np.isfinite(values))
        last = f"{number(float(values[known[-1]]), 2)} at {times[known[-1]]:g}" if len(known) else "not shown"
        parts.append(f"{name} {last}")
    return "; ".join(parts)


def _thirds(cases: Sequence[Cases]) -> dict[str, Cases]:
    """Return the patients of ``cases`` in thirds of their predicted risk."""
    score, target, patient = (np.concatenate([getattr(c, k) for c in cases]) for k in ("score", "target", "patient"))
    parts = np.array_split(np.argsort(-order_of(score, target), kind="stable"), len(THIRDS))
    return {
        name: Cases(patient[i], score[i], target[i], {}, len(i))
        for name, i in zip(THIRDS, parts, strict=True)
        if len(i)
    }


def _risk_table(page: ReportContext, first: MethodResult, shown: Mapping[str, Cases], fewest: int) -> Table:
    """Return predicted and observed survival of the risk groups at the horizon."""
    groups = _thirds([c for s, c in shown.items() if s in training_sites(page.run)] or list(shown.values()))
    rows: list[Row] = []
    horizon = times_of(next(iter(groups.values())).target)[-1:]
    for name, c in groups.items():
        value, low, high = (float(v[0]) for v in _observed([c], horizon, fewest, page.result.options.level))
        observed = Cell(f"{number(value, 2)} ({interval(low, high, 2)})", value) if np.isfinite(low) else Cell(NONE)
        predicted = float(c.score[:, -1].mean()) if predicts_probabilities(c.score, c.target) else None
        row: Row = {"group": name, "patients": whole(len(c.target)), "events": whole(int(c.target[:, 1].sum()))}
        rows.append({**row, "predicted": amount(predicted, 2), "observed": observed})
    columns = words(group="Third") + numbers(patients="Patients", events="Events", predicted="Predicted survival")
    columns += numbers(observed=f"Observed ({page.level}\u00a0CI)")
    note = (
        f"At the horizon, {horizon[0]:g}, on the test patients of the training sites, first seed. Observed: "
        f"Kaplan-Meier with Greenwood’s variance, if {fewest} patients are still observed then. The thirds are of "
        "these patients, and describe them."
    )
    return Table("survival_groups", "Survival by predicted risk.", columns, rows, note)


def _by_site(page: ReportContext, first: MethodResult, shown: Mapping[str, Cases]) -> Table:
    """Return events, and calibration at the horizon, of every site."""
    metrics = [m for m in page.metrics.values() if any(first.sites[s][m.name].value is not None for s in shown)]
    rows: list[Row] = []
    for site, c in shown.items():
        row: Row = {"site": site, "patients": whole(len(c.target)), "events": whole(int(c.target[:, 1].sum()))}
        found = {m.name: cell(page.data.estimate(first.label, [site], m, True), 2) for m in metrics}
        rows.append({**row, **found})
    ideal = {"observed_to_expected": " (1 is ideal)"}
    columns = words(site="Site") + numbers(patients="Patients", events="Events")
    columns += numbers(**{m.name: f"{m.label}{ideal.get(m.name, '')} ({page.level}\u00a0CI)" for m in metrics})
    note = (
        "Harrell’s C compares all comparable pairs; Uno’s C those with an event before the horizon, weighted by the "
        "inverse probability of censoring. The integrated Brier score is the mean over time up to the horizon."
    )
    if not any(m.name == "ibs" for m in metrics):
        note += " This model ranks patients and predicts no probabilities, so it has no Brier score and no calibration."
    marks = {i: "external" for i, s in enumerate(shown) if s in external_sites(page.run)}
    return Table("survival_sites", f"{page.title(first.label)} at every site, all seeds.", columns, rows, note, marks)
