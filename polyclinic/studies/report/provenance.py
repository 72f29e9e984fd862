"""Sections on where it all came from: the data, a paragraph for a paper, the checklists, and how to do it again."""

import json
from typing import Any

from markupsafe import Markup

from polyclinic.studies.checklists import ALL, STATUS, fill, load
from polyclinic.studies.evaluation import external_sites, training_sites
from polyclinic.studies.report.blocks import Cell, Code, Column, Folded, Section, Table, Text
from polyclinic.studies.report.page import Source
from polyclinic.studies.report.words import NONE, count, listed, many

ROLES = ("train", "val", "test")


def data_section(page: Source) -> Section:
    """The data card."""
    data, info = page.run.info.data, page.run.info
    facts = [
        ("Data", data.title), ("Sites are", data.sites_are), ("Licence", data.licence), ("Source", data.url),
        ("Cite", data.citation), ("Fingerprint", data.fingerprint),
        ("Split into sites", data.simulated or "as the data came; not simulated"),
    ]  # fmt: skip
    rows: list[dict[str, Cell | str]] = [{"what": k, "value": v} for k, v in facts if v]
    blocks: list[Any] = [Table("data", "Data card.", [Column("what", "", False), Column("value", "", False)], rows)]
    blocks += [Text(note) for note in data.notes]
    named = [c for c in ROLES if any(c in s.patients for s in info.sites)]
    columns = [Column("site", "Site", False), Column("role", "Role", False)]
    columns += [Column(f"patients_{r}", f"Patients, {r}") for r in named]
    images = any(s.examples.get(r, 0) != s.patients.get(r, 0) for s in info.sites for r in named)
    columns += [Column(f"examples_{r}", f"Examples, {r}") for r in named if images]
    columns += [Column(f"classes_{r}", f"Classes, {r}") for r in named if any(s.classes.get(r) for s in info.sites)]
    table: list[dict[str, Cell | str]] = []
    for s in info.sites:
        row: dict[str, Cell | str] = {"site": s.name, "role": s.role}
        for r in named:
            row[f"patients_{r}"] = Cell(count(s.patients.get(r, 0)), s.patients.get(r, 0))
            row[f"examples_{r}"] = Cell(count(s.examples.get(r, 0)), s.examples.get(r, 0))
            row[f"classes_{r}"] = " / ".join(map(str, s.classes.get(r, ()))) or NONE
        table.append(row)
    note = (
        f"Classes in the order {' / '.join(info.classes)}." if any(c.key.startswith("classes") for c in columns) else ""
    )
    blocks.append(Table("data_sites", "Patients and examples at each site.", columns, table, note))
    return Section("data", "Data card", blocks)


def methods_paragraph(page: Source) -> str:
    """What was done, in sentences for a paper; every number is from the run."""
    run, info, result = page.run, page.run.info, page.result
    training, external = training_sites(run), external_sites(run)
    patients = {r: sum(s.patients.get(r, 0) for s in info.sites if s.role == "training") for r in ROLES}
    said = [
        f"We trained a model of {count(info.parameters)} parameters for {info.task} on {info.data.title or 'the data described above'} "
        f"({many(len(training), 'training site')}; {count(patients['train'])} training, {count(patients['val'])} validation and "
        f"{count(patients['test'])} test patients)."
    ]
    if info.data.simulated:
        said.append(f"The split into sites is simulated: {info.data.simulated}")
    if external:
        tested = sum(s.patients.get("test", 0) for s in info.sites if s.role == "external")
        said.append(
            f"{listed(external)} ({many(tested, 'patient')}) took no part in training and served as external test."
        )
    methods = [page.title(m.label) + (f" [{m.citation}]" if m.citation else "") for m in info.methods]
    said.append(
        f"We compared {listed(methods)}, each for up to {many(info.rounds, 'round')} and {many(len(info.seeds), 'random seed')}. "
        "Models were selected on validation patients; the test patients were kept sealed until the end."
    )
    o, metric = result.options, result.metric
    unit = "patient, averaging images of one patient with the same label" if o.unit == "patient" else "image"
    exact = "DeLong's method for single AUCs and " if metric.name == "auc" and len(info.classes) == 2 else ""
    said.append(
        f"The primary metric was {metric.label}, computed per {unit}, as the mean over training sites. {page.level} confidence intervals "
        f"are by {exact}the bootstrap over patients within sites ({count(o.draws)} draws); methods were compared by paired bootstrap"
        f"{' over patients and seeds' if len(info.seeds) > 1 else ''} against {page.title(result.reference or '')} with Holm's correction."
    )
    for p in {r.method: r for r in run.privacy if r.epsilon is not None}.values():
        said.append(
            f"{page.title(p.method)} satisfied ({p.epsilon:.3g}, {p.delta if p.delta is not None else 0:g})-differential privacy"
            f"{' per ' + p.unit if p.unit else ''}."
        )
    version = info.environment.get("polyclinic", "")
    said.append(
        f"Experiments were run with Polyclinic {version} (study {info.name}, hash {info.hash}).".replace("  ", " ")
    )
    return " ".join(said)


def paragraph_section(page: Source) -> Section:
    """The methods paragraph and its references."""
    cited = [m.citation for m in page.run.info.methods if m.citation]
    cited += [page.run.info.data.citation] if page.run.info.data.citation else []
    cited += [
        "DeLong, DeLong, Clarke-Pearson, Comparing the areas under two or more correlated receiver operating characteristic "
        "curves, Biometrics 1988",
        "Efron, Tibshirani, An Introduction to the Bootstrap, Chapman & Hall 1993",
        "Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 1979",
    ]
    items = Markup("").join(Markup("<li>{}</li>").format(c) for c in dict.fromkeys(cited))
    return Section(
        "paragraph", "Methods paragraph, ready to paste",
        [Text(methods_paragraph(page), "paste"), Text(Markup("<ol class='refs'>{}</ol>").format(items), "raw")],
    )  # fmt: skip


def checklist_section(page: Source) -> Section:
    """The checklists; an item is ticked only where an artefact of this run supports it."""
    blocks: list[Any] = [
        Text(
            "Ticked items are supported by this run, in the place named. Everything else is for a person to answer; the "
            "originals have the authoritative wording."
        )
    ]
    for name in ALL:
        checklist = load(name)
        answers = fill(checklist, page.run, page.result, page.journal)
        done = sum(a.status == "shown" for a in answers)
        rows: list[dict[str, Cell | str]] = [
            {
                "id": a.item.id,
                "item": a.item.text,
                "status": Cell(STATUS[a.status], a.status),
                "evidence": a.evidence or NONE,
            }
            for a in answers
        ]
        columns = [
            Column("id", "No.", False), Column("item", "Item", False), Column("status", "This run", False),
            Column("evidence", "Where", False),
        ]  # fmt: skip
        marks = {i: "done" for i, a in enumerate(answers) if a.status == "shown"}
        table = Table(f"checklist_{name}", checklist.source, columns, rows, "", marks)
        blocks.append(Folded(f"{checklist.title}: {done} of {len(answers)} items supported by this run", [table]))
    return Section("checklists", "Checklists", blocks)


def reproduce_section(page: Source) -> Section:
    """Study file, hashes, versions, seeds, and the command."""
    run, info = page.run, page.run.info
    facts: list[tuple[str, Any]] = [
        ("Run", f"{info.name}-{info.hash}"), ("Created", info.created), ("Seeds", ", ".join(map(str, info.seeds))),
        ("Rounds", info.rounds), ("Parameters", count(info.parameters)),
        ("Engine", ", ".join(f"{k} {v}" for k, v in info.engine.items())),
        *((k.capitalize(), v) for k, v in info.environment.items()),
    ]  # fmt: skip
    entries, head, broken = page.journal
    if entries or broken:
        facts.append(
            (
                "Journal",
                f"does not hold: {broken}"
                if broken
                else f"{many(entries, 'entry', 'entries')}, chain holds, head {head}",
            )
        )
    opened = run.opened
    if opened:
        once = all(k == 1 for k in opened.values())
        facts.append(("Test set", "opened once for each arm" if once else "opened more than once: see above"))
    if run.unread:
        facts.append(("Records not used here", ", ".join(f"{n} of kind {k}" for k, n in run.unread.items())))
    rows: list[dict[str, Cell | str]] = [
        {"what": k, "value": v if isinstance(v, str) else json.dumps(v)} for k, v in facts if v not in ("", None)
    ]
    columns = [Column("what", "", False), Column("value", "", False)]
    hashes: list[dict[str, Cell | str]] = [{"what": k, "value": v} for k, v in run.digests.items()]
    blocks: list[Any] = [
        Text(
            Markup(
                "To run it again: save the study below as <code>study.toml</code> and call <code>polyclinic run study.toml</code>."
            )
        ),
        Table("environment", "Run and environment.", columns, rows),
        Code("study.toml", run.study or "not in the run folder"),
        Folded(
            "SHA-256 of the files",
            [
                Table(
                    "hashes",
                    "Files of the run folder.",
                    [Column("what", "File", False), Column("value", "SHA-256", False)],
                    hashes,
                )
            ],
        ),
    ]
    return Section("reproduce", "Do it again", blocks)
