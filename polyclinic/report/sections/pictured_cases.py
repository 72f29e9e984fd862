"""The section of pictures: the best, the median and the worst test case of each site."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from polyclinic.report.case_figures import case_picture, color_of
from polyclinic.report.context import ReportContext
from polyclinic.report.formatting import amount, number
from polyclinic.report.page_blocks import Picture, Row, Section, Table, Text, numbers, words
from polyclinic.studies.records.pictured_cases import PicturedCase, read_pictures


def cases_section(page: ReportContext) -> Section | None:
    """Return the pictures; None without results of ``polyclinic pictures``."""
    first = page.first
    found = read_pictures(page.run, first.label) if first is not None else None
    if first is None or found is None:
        return None
    seed, sites = found
    names = _names(page, sites)
    legend = Markup(", ").join(
        Markup('<span style="background:{};padding:0 .4em">&nbsp;</span> {}').format(color_of(i + 1), name)
        for i, name in enumerate(names)
    )
    text = Markup(
        "{}, seed {}: at each site the test case with the highest, the median and the lowest Dice. Solid outlines are "
        "the truth, dashed ones the prediction, on the grid that the network sees: {}. Volumes are shown in three "
        "planes through the center of the foreground."
    ).format(page.title(first.label), seed, legend)
    blocks: list[Any] = [Text(text)]
    for site, cases in sites.items():
        for rank, case in cases.items():
            alt = f"{site}, {rank} case: mean Dice {number(case.mean)}"
            caption = Markup("{}: {} case, mean Dice {}.").format(escape(site), rank, number(case.mean))
            blocks.append(Picture(case_picture(f"case-{site}-{rank}", alt, case), caption))
    rows: list[Row] = [
        {
            "site": site,
            "case": rank,
            "mean": amount(case.mean),
            **{f"class_{k}": amount(_known(value)) for k, value in enumerate(case.dice)},
        }
        for site, cases in sites.items()
        for rank, case in cases.items()
    ]
    columns = words(site="Site", case="Case") + numbers(mean="Mean Dice")
    columns += numbers(**{f"class_{k}": name for k, name in enumerate(names)})
    return Section(
        "pictures", "Pictures of test cases", [*blocks, Table("pictures", "Dice of the cases.", columns, rows)]
    )


def _names(page: ReportContext, sites: Mapping[str, Mapping[str, PicturedCase]]) -> list[str]:
    """Return the names of the foreground classes."""
    many = max(len(case.dice) for cases in sites.values() for case in cases.values())
    classes = list(page.run.info.classes)
    return classes[-many:] if len(classes) >= many else [f"class {k + 1}" for k in range(many)]


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
