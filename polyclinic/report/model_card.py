"""The model card: a README for recipients of the model, with front matter for model hubs.

The headings are those of Mitchell et al., "Model Cards for Model Reporting", FAT* 2019,
https://arxiv.org/abs/1810.03993. Entries that only the authors know are left open and marked.
"""

import json

from polyclinic.report.context import ReportContext
from polyclinic.report.formatting import cell, count, interval, number
from polyclinic.report.methods_paragraph import methods_paragraph
from polyclinic.report.sections.highlights import findings, in_short

OPEN = "*To be completed by the authors.*"


def model_card(page: ReportContext) -> str:
    """Return the card of the main method's model, as Markdown."""
    info, first = page.run.info, page.first
    title = info.title or info.name
    lines = [
        *_front_matter(page),
        f"# {title}",
        "",
        *(str(s.striptags()) for s in in_short(page)),
        "",
        "## Model",
        "",
        f"- Task: {info.task}" + (f" of {', '.join(info.classes)}" if info.classes else ""),
        f"- Parameters: {count(info.parameters)}",
        f"- Training: {page.title(first.label) if first else 'not finished'}, {info.rounds} rounds at most",
        f"- Study: {info.name}, hash {info.hash}",
        *_start(page),
        "",
        "## Intended use and out-of-scope uses",
        "",
        OPEN,
        "",
        "This model was trained and evaluated with Polyclinic for research. It is not a medical device.",
        "",
        "## Data",
        "",
        f"{info.data.title or 'Not stated'}. License of the data: {info.data.license or 'not stated'}.",
        *([info.data.citation] if info.data.citation else []),
    ]
    if info.data.simulated:
        lines += ["", f"**Simulated split.** {info.data.simulated}"]
    lines += ["", *_sites(page), "", "## Warnings and limitations", ""]
    lines += [f"- {f.text}" for f in findings(page)] or ["- None were found."]
    lines += ["", "## Privacy", "", *_privacy(page), "", "## Training and evaluation", "", *_made(page)]
    lines += ["", "## Ethical considerations, caveats and recommendations", "", OPEN, "", "## Files", ""]
    lines += [f"- `{name}`: sha256 `{digest}`" for name, digest in page.run.digests.items()]
    return "\n".join(lines) + "\n"


def _front_matter(page: ReportContext) -> list[str]:
    info = page.run.info
    tags = ["federated-learning", "medical-imaging", info.task]
    return [  # no license: the authors choose that of the model
        "---",
        f"library_name: {json.dumps('polyclinic')}",
        f"tags: {json.dumps(tags)}",
        f"metrics: {json.dumps([page.result.metric.name])}",
        "---",
        "",
    ]


def _start(page: ReportContext) -> list[str]:
    start = page.run.info.start
    if start is None:
        return []
    terms = "" if start.redistribute else "; it forbids to pass the weights on, also as part of this model"
    return [
        f"- Start weights: {start.name}, license {start.license}{terms}; source: {start.source or 'not stated'}; "
        f"sha256 `{start.sha256}`",
        f"- Start weights were trained on: {start.trained_on or 'not stated'}. Test images among them would make the "
        "results too good",
        f"- Trained in this study: {', '.join(start.train)}, {count(start.trained)} of {count(start.numbers)} numbers",
    ]


def _sites(page: ReportContext) -> list[str]:
    first, name, d = page.first, page.result.metric.name, page.digits
    heading = f"{page.label} ({page.level}\u00a0CI)"
    lines = [f"| Site | Role | Training patients | Test patients | {heading} |", "|---|---|---:|---:|---:|"]
    for s in page.run.info.sites:
        found = first.sites.get(s.name, {}).get(name) if first else None
        trained, tested = (count(s.patients.get(r, 0)) for r in ("train", "test"))
        lines.append(f"| {s.name} | {s.role} | {trained} | {tested} | {cell(found, d).text} |")
    if first is not None and first.macro.value is not None:
        mean = first.macro
        lines += ["", f"Mean over training sites: {number(mean.value, d)} ({interval(mean.low, mean.high, d)})."]
    return lines


def _privacy(page: ReportContext) -> list[str]:
    mine = [p for p in (page.run.spent(page.first.label) if page.first else ()) if p.epsilon is not None]
    if not mine:
        return [
            "No noise was added in training, so there is no formal limit on what this model reveals about a patient."
        ]
    most = max(mine, key=lambda p: p.epsilon or 0)
    return [most.stated]


def _made(page: ReportContext) -> list[str]:
    text, references = methods_paragraph(page)
    return [text, "", *(f"{i}. {r}" for i, r in enumerate(references, 1))]
