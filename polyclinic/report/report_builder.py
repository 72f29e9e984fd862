"""Builds ``report/`` from a run folder: the page, its numbers as JSON, its tables as CSV, and the model card."""

import gc
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from polyclinic.core import atomic
from polyclinic.errors import RunError
from polyclinic.evaluation.records.run_reader import read_run
from polyclinic.evaluation.run_evaluation import Options, evaluate
from polyclinic.report.context import ReportContext
from polyclinic.report.methods_paragraph import paragraph_section
from polyclinic.report.model_card import model_card
from polyclinic.report.page_blocks import Pair, Section, Text, tables_of
from polyclinic.report.sections.clinical import task_section
from polyclinic.report.sections.communication import leaving_section
from polyclinic.report.sections.discrimination import discrimination_section
from polyclinic.report.sections.explained import explained_section
from polyclinic.report.sections.highlights import findings, in_short
from polyclinic.report.sections.learning_curves import curves_section
from polyclinic.report.sections.personal_benefit import gains_section
from polyclinic.report.sections.pictured_cases import cases_section
from polyclinic.report.sections.privacy_section import privacy_section
from polyclinic.report.sections.provenance import checklist_section, data_section, reproduce_section
from polyclinic.report.sections.simulated_attacks import hostile_section
from polyclinic.report.sections.sites_without_predictions import kept_section
from polyclinic.report.sections.subgroups import subgroups_section
from polyclinic.report.sections.test_results import (
    declared_table,
    methods_picture,
    methods_section,
    sites_picture,
    sites_section,
)

HERE = Path(__file__).parent


class ReportNotWritten(RunError):
    """A report whose files cannot be written. The message gives the reason and what to do."""


def build_report(run_dir: str | Path, out: str | Path | None = None, options: Options = Options()) -> Path:
    """Write the report of a run, finished or not.

    Args:
        run_dir: The run folder.
        out: The folder to write; ``report`` within the run folder by default.
        options: Options of the evaluation.

    Returns:
        The path of ``report.html``. The same folder holds ``summary.html`` (one printed page), ``report.json``,
        ``model_card.md`` and ``tables/*.csv``. The same run gives the same bytes.

    Raises:
        NotARun: If the folder is not a run or contains damaged files; then nothing is written.
        ReportNotWritten: If the files cannot be written, for example because the disk is full; an earlier report is
            then unchanged.
        ConfigError: If a figure contains images and matplotlib is not installed.
    """
    with _garbage_kept():
        run = read_run(run_dir)
        page = ReportContext(run, evaluate(run, options))
        sections = sections_of(page)
        files = {
            "report.html": render(page, sections),
            "summary.html": render(page, [brief_section(page)], brief=True),
            "report.json": as_json(page),
            "model_card.md": model_card(page),
            **{f"tables/{t.name}.csv": t.csv() for s in sections for t in tables_of(s.blocks)},
        }
    folder = Path(out) if out is not None else run.path / "report"
    try:
        atomic.write_all(folder, files)
    except OSError as error:
        raise ReportNotWritten(
            f"{folder}: the report was not written: {error.strerror}. The results of the run are saved. Correct this, "
            f"for example free some disk space, and write the report with: polyclinic report {run.path}"
        ) from error
    return folder / "report.html"


@contextmanager
def _garbage_kept() -> Iterator[None]:
    """Collect no cyclic garbage within the context: the results of a thousand sites live until its end."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def sections_of(page: ReportContext) -> list[Section]:
    """Return the numbered sections of the page in order, without empty ones."""
    found = [
        methods_section(page),
        sites_section(page),
        kept_section(page),
        gains_section(page),
        curves_section(page),
        discrimination_section(page),
        task_section(page),
        cases_section(page),
        subgroups_section(page),
        explained_section(page),
        hostile_section(page),
        leaving_section(page),
        privacy_section(page),
        data_section(page),
        paragraph_section(page),
        checklist_section(page),
        reproduce_section(page),
    ]
    return [s for s in found if s is not None]


def brief_section(page: ReportContext) -> Section:
    """Return the results of the summary, which fit on a printed page: methods, sites and declared comparisons."""
    if page.first is None:
        return Section("results", "Results", [Text("No method has test predictions yet.")])
    pictures = [methods_picture(page, brief=True), sites_picture(page, page.first, brief=True)]
    return Section("results", "Results", [Pair(pictures), *declared_table(page, brief=True)])


def render(page: ReportContext, sections: list[Section], brief: bool = False) -> str:
    """Return the page as HTML, with its style; ``brief`` for the summary, with the five gravest findings."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    env = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = env.get_template("page.html")
    style = Markup((HERE / "style.css").read_text(encoding="utf-8"))
    return template.render(
        page=page,
        info=page.run.info,
        sections=sections,
        in_short=in_short(page),
        findings=findings(page)[: 5 if brief else None],
        style=style,
        brief=brief,
    )


def as_json(page: ReportContext) -> str:
    """Return the content of the page as JSON with sorted keys, one line for each part."""
    evaluation = {f.name: getattr(page.result, f.name) for f in fields(page.result)}
    value = {
        "run": page.run.info.model_dump(),
        "evaluation": evaluation | {"metric": page.result.metric.name},
        "verdicts": {
            "comparisons": {k: d.verdict() for k, d in page.result.comparisons.items()},
            "declared": [c.difference.verdict() for c in page.result.declared],
            "gains": {m.label: {s: g.verdict() for s, g in m.gains.items()} for m in page.result.methods},
        },
        "costs": page.costs,
        "findings": findings(page),
        "missing": page.run.missing,
        "sha256": page.run.digests,
    }
    # Python's encoder is many times slower with indentation.
    parts = [f'"{k}": {json.dumps(_plain(v), sort_keys=True, ensure_ascii=False)}' for k, v in sorted(value.items())]
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return round(value, 10) if value == value and abs(value) != float("inf") else None
    return value.item() if hasattr(value, "item") else value
