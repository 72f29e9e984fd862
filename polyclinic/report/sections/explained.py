"""The section on attribution maps, and their agreement between sites."""

from typing import Any

import numpy as np
from markupsafe import Markup

from polyclinic.report import saliency_figures
from polyclinic.report.context import ReportContext
from polyclinic.report.formatting import amount, many, number, whole
from polyclinic.report.page_blocks import Folded, Picture, Row, Section, Table, numbers, words
from polyclinic.studies.records.saliency_maps import Explanation, read_explanation

TOP = 10


def explained_section(page: ReportContext) -> Section | None:
    """Return maps or features and their agreement between sites; None without results of ``polyclinic explain``."""
    first = page.first
    found = read_explanation(page.run, first.label) if first is not None else None
    if first is None or found is None:
        return None
    what = "feature" if found.names or next(iter(found.maps.values())).ndim == 1 else "place"
    rows: list[Row] = [
        {
            "site": site,
            "patients": whole(found.patients[site]),
            "others": amount(found.agreement(site), 2),
            "untrained": amount(found.unlearned(site), 2),
        }
        for site in found.maps
    ]
    columns = words(site="Site") + numbers(patients="Validation patients")
    columns += numbers(others="With the other sites", untrained="With the untrained model")
    note = (
        f"Spearman’s rank correlation over every {what}; 1 is full agreement. If the last column is as high, the "
        f"agreement "
        "is a property of the data and not of what the model learned."
    )
    text = Markup(
        "Mean share of {} at each {}: integrated gradients, over at least ten validation patients of a site, computed "
        "at the site; only the mean left it. {} An attribution shows which inputs the model uses. It is not evidence "
        "of a causal relation."
    ).format(_target(page), what, _agreement(found))
    table = Table("agreement_of_sites", "Agreement of attribution maps between sites.", columns, rows, note)
    return Section("explained", "Attribution maps", [*_picture(found, text), table, *_features(found)])


def _target(page: ReportContext) -> str:
    classes = page.run.info.classes
    if page.run.info.task == "classification" and len(classes) == 2:
        return f"the attribution of “{classes[1]}”"
    return "the attribution of the output"


def _agreement(found: Explanation) -> str:
    known = [r for site in found.maps if (r := found.agreement(site)) is not None]
    if not known:
        return "One site has a map; agreement needs two."
    least = min(known)
    return f"Agreement over {many(len(known), 'site')}: at least {number(least, 2)}."


def _picture(found: Explanation, text: Markup) -> list[Any]:
    alt = "Agreement of each site with the others: "
    alt += "; ".join(f"{s} {number(found.agreement(s), 2)}" for s in found.maps)
    one = next(iter(found.maps.values()))
    if one.ndim == 1:
        names = list(found.names) or [f"feature {i + 1}" for i in range(len(one))]
        order = np.argsort(-np.mean(list(found.maps.values()), axis=0), kind="stable")[:TOP]
        shares = {site: [float(m[i]) for i in order] for site, m in found.maps.items()}
        return [Picture(saliency_figures.features("explained", alt, [names[i] for i in order], shares), text)]
    flat = {site: m.mean(axis=tuple(range(m.ndim - 2))) for site, m in found.maps.items()}
    more = " Volumes are averaged along their first axis." if one.ndim == 3 else ""
    return [Picture(saliency_figures.maps("explained", alt, flat), text + more)]


def _features(found: Explanation) -> list[Any]:
    one = next(iter(found.maps.values()))
    if one.ndim != 1:
        return []
    names = list(found.names) or [f"feature {i + 1}" for i in range(len(one))]
    mean = np.mean(list(found.maps.values()), axis=0)
    rows: list[Row] = [
        {"name": names[i], "mean": amount(float(mean[i])), **{s: amount(float(m[i])) for s, m in found.maps.items()}}
        for i in np.argsort(-mean, kind="stable")
    ]
    columns = words(name="Feature") + numbers(mean="Mean over sites", **{s: s for s in found.maps})
    return [Folded("All features", [Table("features", "Share of the attribution.", columns, rows)])]
