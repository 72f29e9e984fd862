"""Sections on provenance: the data, the checklists, and how to reproduce the study."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from polyclinic.report.checklist_evaluation import ALL, STATUS, fill, load
from polyclinic.report.context import ReportContext
from polyclinic.report.formatting import NONE, count, many, whole
from polyclinic.report.page_blocks import Cell, Code, Folded, Row, Section, Table, Text, numbers, words

ROLES = ("train", "val", "test")


def data_section(page: ReportContext) -> Section:
    """Return the data card."""
    data, info = page.run.info.data, page.run.info
    facts = {
        "Data": data.title,
        "Sites are": data.sites_are if data.sites_are != data.simulated else "",
        "License": data.license,
        "Source": data.url,
        "Cite": data.citation,
        "Fingerprint": data.fingerprint,
        "Split into sites": data.simulated or "as in the data; not simulated",
        "Checked": ", ".join(c.replace("_", " ") for c in data.checks),
    }
    rows: list[Row] = [{"what": k, "value": v} for k, v in facts.items() if v]
    blocks: list[Any] = [Table("data", "Description of the data.", words(what="", value=""), rows)]
    blocks += [Text(note) for note in data.notes if note != data.simulated]
    named = [r for r in ROLES if any(s.patients.get(r) for s in info.sites)]
    columns = words(site="Site", role="Role") + numbers(**{f"patients_{r}": f"Patients, {r}" for r in named})
    if any(s.examples.get(r, s.patients.get(r, 0)) != s.patients.get(r, 0) for s in info.sites for r in named):
        columns += numbers(**{f"examples_{r}": f"Examples, {r}" for r in named})
    table: list[Row] = []
    for s in info.sites:
        row: dict[str, Cell | str] = {"site": s.name, "role": s.role}
        row |= {f"patients_{r}": whole(s.patients.get(r, 0)) for r in named}
        row |= {f"examples_{r}": whole(s.examples.get(r, 0)) for r in named}
        table.append(row)
    blocks.append(Table("data_sites", "Patients and examples at each site.", columns, table))
    return Section("data", "Data card", [*blocks, *_classes(page, named), *_start(page)])


def _start(page: ReportContext) -> list[Table]:
    """Return the facts on the start weights."""
    start = page.run.info.start
    if start is None:
        return []
    facts = {
        "Weights": start.name,
        "SHA-256": start.sha256,
        "License": start.license,
        "Source": start.source or "not stated",
        "Trained on": start.trained_on or "not stated: test images of this study may be among them",
        "Cite": start.citation,
        "Loaded": start.account,
        "Adapted": "; ".join(start.adapted),
        "Trained here": f"{', '.join(start.train)}: {count(start.trained)} of {count(start.numbers)} numbers",
        "Redistribution": "" if start.redistribute else "forbidden by the license",
    }
    rows: list[Row] = [{"what": k, "value": v} for k, v in facts.items() if v]
    return [Table("start", "Start weights of the network.", words(what="", value=""), rows)]


def _classes(page: ReportContext, roles: Sequence[str]) -> list[Table]:
    """Return the number of examples of each class, by site."""
    info = page.run.info
    named = [r for r in roles if any(s.classes.get(r) for s in info.sites)]
    if not named:
        return []
    rows: list[Row] = [
        {"site": s.name, **{r: " / ".join(count(n) for n in s.classes.get(r, ())) or NONE for r in named}}
        for s in info.sites
    ]
    names = info.classes or (("censored", "event") if info.task == "survival" else ())
    note = f"In the order {' / '.join(names)}." if names else ""
    columns = words(site="Site") + numbers(**{r: r.capitalize() for r in named})
    return [
        Table(
            "data_classes",
            "Censored examples and events." if info.task == "survival" else "Examples of each class.",
            columns,
            rows,
            note,
        )
    ]


def checklist_section(page: ReportContext) -> Section:
    """Return the checklists. An item is ticked only if an artifact of this run supports it."""
    text = (
        "Ticked items are supported by this run, in the section named. “Open” items could be supported by a run, but "
        "are "
        "not supported by this one. The authors answer all other items. The original checklists have the authoritative "
        "wording."
    )
    blocks: list[Any] = [Text(text)]
    for name in ALL:
        checklist = load(name)
        answers = fill(checklist, page.run, page.result, page.journal)
        rows: list[Row] = [
            {"id": a.item.id, "item": a.item.text, "status": Cell(STATUS[a.status], a.status), "where": a.evidence}
            for a in answers
        ]
        marks = {i: a.status for i, a in enumerate(answers) if a.status != "person"}
        columns = words(id="No.", item="Item", status="This run", where="Evidence")
        done = len([a for a in answers if a.status == "shown"])
        heading = f"{checklist.title}: {done} of {len(answers)} items supported by this run"
        blocks.append(Folded(heading, [Table(f"checklist_{name}", checklist.source, columns, rows, "", marks)]))
    return Section("checklists", "Checklists", blocks)


def reproduce_section(page: ReportContext) -> Section:
    """Return the study file, hashes, versions, seeds, and the command."""
    run, info = page.run, page.run.info
    facts: dict[str, Any] = {
        "Run": f"{info.name}-{page.short}",
        "Study hash": info.hash if info.hash != page.short else "",
        "Created": info.created,
        "Seeds": ", ".join(map(str, info.seeds)),
        "Folds": f"{info.folds}, by {info.folds_by}" if info.folds else "",
        "Rounds": info.rounds,
        "Parameters": count(info.parameters),
        "Engine": ", ".join(f"{k} {v}" for k, v in info.engine.items()),
        **info.environment,
    }
    entries, head, broken = page.journal
    if entries or broken:
        valid = f"{many(entries, 'entry', 'entries')}, hash chain valid, latest hash {head}"
        facts["Journal"] = f"hash chain broken: {broken}" if broken else valid
    if run.opened:
        once = all(k == 1 for k in run.opened.values())
        facts["Test set"] = "opened once for each model" if once else "opened more than once: see the warnings"
    if run.unread:
        facts["Records not used here"] = ", ".join(f"{n} of kind {k}" for k, n in run.unread.items())
    rows: list[Row] = [
        {"what": k, "value": v if isinstance(v, str) else json.dumps(v)}
        for k, v in facts.items()
        if v not in ("", None)
    ]
    hashes: list[Row] = [{"what": k, "value": v} for k, v in run.digests.items()]
    text = Markup(
        "To reproduce this study, save the file below as <code>study.toml</code> and run "
        "<code>polyclinic run study.toml</code>. <code>polyclinic report {}</code> writes this page again."
    ).format(f"runs/{info.name}-{page.short}")
    settings: list[Row] = [
        {"method": page.title(label), "settings": ", ".join(f"{k} = {_setting(v)}" for k, v in table.items())}
        for label, table in info.training.items()
    ]
    caption = "Local training of each method, with the settings of recipes and defaults."
    training = Table("training", caption, words(method="Method", settings="Settings"), settings)
    files = Table("hashes", "Files of the run folder.", words(what="File", value="SHA-256"), hashes)
    return Section(
        "reproduce",
        "Reproduce this study",
        [
            Text(text),
            Table("environment", "Run and environment.", words(what="", value=""), rows),
            *([Folded("Settings of local training", [training])] if settings else []),
            Code("study.toml", run.study or "not in the run folder"),
            *([Code("the plan that it names", run.plan)] if run.plan else []),
            Folded("SHA-256 of the files", [files]),
        ],
    )


def _setting(value: Any) -> str:
    """Return a setting as it would be in a study file."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{k} = {_setting(v)}" for k, v in value.items()) + " }" if value else "{}"
    return json.dumps(value)
