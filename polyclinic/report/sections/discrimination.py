"""The section of ROC and precision-recall curves and confusion matrices, for classes and labels."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from polyclinic.evaluation.discrimination_curves import (
    POSITIONS,
    MeanCurve,
    confusion,
    mean_curve,
    precision_curve,
    roc_curve,
)
from polyclinic.evaluation.records.predictions import Cases, as_cases
from polyclinic.evaluation.records.run_reader import external_sites, training_sites
from polyclinic.evaluation.run_evaluation import MethodResult
from polyclinic.report import discrimination_figures as figures
from polyclinic.report.context import ReportContext
from polyclinic.report.formatting import amount, number, whole
from polyclinic.report.page_blocks import Folded, Pair, Picture, Row, Section, Table, numbers, words
from polyclinic.statistics.undefined import Array

MOST_CURVES, MOST_CLASSES = 8, 30
Seeds = Sequence[Cases]


def discrimination_section(page: ReportContext) -> Section | None:
    """Return the section; None for tasks without classes, or without sites that are large enough to be shown."""
    first = page.first
    if first is None or page.run.info.task not in ("classification", "multilabel"):
        return None
    large = [site for site in first.sites if page.result.patients[site] >= page.result.options.min_cell]
    places = {
        "Training sites": [site for site in training_sites(page.run) if site in large],
        "External sites": [site for site in external_sites(page.run) if site in large],
    }
    cases = {place: [_seeds(page, first, site) for site in sites] for place, sites in places.items() if sites}
    if not cases:
        return None
    blocks: list[Any] = list(_curves(page, cases))
    if page.run.info.task == "classification" and len(page.run.info.classes) <= MOST_CLASSES:
        blocks += _matrices(page, cases)
    return Section("discrimination", "Discrimination", blocks) if blocks else None


def _seeds(page: ReportContext, first: MethodResult, site: str) -> Seeds:
    arms = [page.run.arms.get((first.label, seed), {}) for seed in first.seeds]
    return [as_cases(arm[site], page.result.unit) for arm in arms if site in arm]


def _groups(page: ReportContext, cases: Mapping[str, Sequence[Seeds]]) -> dict[str, tuple[Sequence[Seeds], int]]:
    """Return what is drawn: for each title, the cases of each site and the class or label that counts as positive."""
    classes = page.run.info.classes
    if page.run.info.task == "classification" and len(classes) == 2:
        return {place: (sites, 1) for place, sites in cases.items()}
    sites = next(iter(cases.values()))
    return {name: (sites, k) for k, name in enumerate(classes[:MOST_CURVES])}


def _curve(sites: Sequence[Seeds], k: int, of: Any) -> MeanCurve | None:
    return mean_curve([[of(c.score[:, k], _positive(c, k)) for c in seeds] for seeds in sites])


def _positive(cases: Cases, k: int) -> Array:
    return np.asarray(cases.target == k if cases.target.ndim == 1 else cases.target[:, k] == 1)


def _curves(page: ReportContext, cases: Mapping[str, Sequence[Seeds]]) -> Iterator[Any]:
    found = {
        title: (_curve(sites, k, roc_curve), _curve(sites, k, precision_curve), _prevalence(sites, k))
        for title, (sites, k) in _groups(page, cases).items()
    }
    known = {t: (r, p, share) for t, (r, p, share) in found.items() if r is not None and p is not None}
    if not known:
        return
    shown = {
        "roc": {f"{title} ({number(roc.area)})": np.r_[0.0, roc.values] for title, (roc, _, _) in known.items()},
        "precision": {f"{title} ({number(p.area)})": p.values for title, (_, p, _) in known.items()},
    }
    alts = {
        "roc": "ROC curves. AUC: " + "; ".join(f"{title} {number(roc.area)}" for title, (roc, _, _) in known.items()),
        "precision": "Precision-recall curves. Average precision: "
        + "; ".join(f"{title} {number(p.area)}" for title, (_, p, _) in known.items()),
    }
    axes = {"roc": ("1 − specificity", "Sensitivity"), "precision": ("Recall (sensitivity)", "Precision")}
    classes = page.run.info.classes
    whose = f"Each against the rest, at the {next(iter(cases)).lower()}."
    if page.run.info.task == "classification" and len(classes) == 2:
        whose = f"“{classes[1]}” is the positive class."
    texts = {
        "roc": f"ROC curves, with their areas: means over seeds, then over sites. {whose}",
        "precision": "Precision-recall curves, with the average precision. It depends on how frequent the class is: "
        "guessing has a precision of that frequency, which the table states.",
    }
    drawn = {
        name: figures.unit_curves(
            name,
            alts[name],
            np.r_[0.0, POSITIONS] if name == "roc" else POSITIONS,
            shown[name],
            axes[name],
            name == "roc",
        )
        for name in shown
    }
    yield Pair([Picture(drawn[name], texts[name]) for name in shown])
    at = (0.05, 0.1, 0.2, 0.3, 0.5)
    rows: list[Row] = [
        {
            "curve": title,
            "share": amount(share),
            **{f"s{x}": amount(float(np.interp(x, POSITIONS, r.values))) for x in at},
            "sites": whole(r.sites),
        }
        for title, (r, _, share) in known.items()
    ]
    columns = words(curve="Curve") + numbers(share="Frequency")
    columns += numbers(**{f"s{x}": f"Sensitivity at a specificity of {1 - x:.2f}" for x in at}, sites="Sites")
    note = "Sites without both classes are left out. The thresholds of these points differ between sites and seeds."
    yield Folded("Points of the ROC curves", [Table("roc", "Points of the ROC curves.", columns, rows, note)])


def _prevalence(sites: Sequence[Seeds], k: int) -> float:
    return float(np.mean([np.mean([_positive(c, k).mean() for c in seeds]) for seeds in sites if seeds]))


def _matrices(page: ReportContext, cases: Mapping[str, Sequence[Seeds]]) -> Iterator[Any]:
    """Yield the confusion matrix of each group of sites, with the share of each true class."""
    classes, pictures, tables = page.run.info.classes, list[Picture](), list[Table]()
    for place, sites in cases.items():
        count = partial(confusion, classes=len(classes))
        every = [count(c.score.argmax(1), c.target) for seeds in sites for c in seeds]
        total = np.sum(every, axis=0)
        with np.errstate(invalid="ignore"):
            shares = total / total.sum(1, keepdims=True)
        key = place.split()[0].lower()
        alt = f"Confusion matrix, {place.lower()}. Correct: " + "; ".join(
            f"{name} {number(_known(shares[i, i]), 2)}" for i, name in enumerate(classes)
        )
        text = f"{place}: of each true class, the percentage that has the highest probability in each class."
        pictures.append(Picture(figures.confusion_plot(f"confusion-{key}", alt, classes, shares), text))
        rows: list[Row] = [
            {
                "class": name,
                "cases": whole(int(total[i].sum())),
                **{f"as_{k}": amount(_known(shares[i, k])) for k in range(len(classes))},
            }
            for i, name in enumerate(classes)
        ]
        columns = words(**{"class": "True class"}) + numbers(cases="Cases, all seeds")
        columns += numbers(**{f"as_{k}": f"Predicted {name}" for k, name in enumerate(classes)})
        tables.append(Table(f"confusion_{key}", f"Confusion matrix, {place.lower()}.", columns, rows))
    yield Pair(pictures)
    yield Folded("Values of the confusion matrices", tables)


def _known(share: float) -> float | None:
    return float(share) if share == share else None
