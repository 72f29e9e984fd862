"""Studies of this folder as pages of docs/results: run the study file, resuming what has begun, and read its results."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from polyclinic.evaluation.metric import Metric
from polyclinic.evaluation.own_metrics import metrics_of
from polyclinic.evaluation.records.run_reader import Run, read_run
from polyclinic.evaluation.run_evaluation import Evaluation, evaluate
from polyclinic.evaluation.sample import Sample, sample
from polyclinic.report.formatting import number, p_value, with_interval
from polyclinic.statistics.paired_tests import BETTER, WORSE, Difference
from polyclinic.studies.config.loader import text_of
from polyclinic.studies.config.scenarios import parse_all
from polyclinic.studies.run.scheduler import run

HERE = Path(__file__).parent
LEVEL = 0.95
RESULTS = HERE.parent / "docs" / "results"


@dataclass(frozen=True)
class Results:
    """A finished study and what was computed from it."""

    run: Run
    result: Evaluation
    data: Sample
    metric: Metric


def finished(name: str, out: Path, changes: Mapping[str, Any]) -> Results:
    """Return the results of ``studies/<name>.toml`` with ``changes``, after what is missing has been run in ``out``."""
    file = HERE / "studies" / f"{name}.toml"
    (scenario,) = parse_all(text_of(file), file, changes)
    folder = scenario.folder(out)
    for event in run(scenario.study, scenario.text, folder, resume=True):
        if event.what == "tested":
            print(f"{name}: {event.label} seed {event.seed} fold {event.fold}", flush=True)
    found = read_run(folder)
    return Results(found, evaluate(found), sample(found, LEVEL, "patient"), metrics_of(found.info)[found.info.metric])


def arguments(about: str) -> argparse.Namespace:
    """Return the options that the pages have in common: ``--runs`` and ``--quick``."""
    parser = argparse.ArgumentParser(description=about.split("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the run folders, to go on from")
    parser.add_argument("--quick", action="store_true", help="one seed, two rounds; prints the page, writes nothing")
    torch.set_num_threads(1)
    return parser.parse_args()


def changes_of(given: argparse.Namespace) -> dict[str, Any]:
    """Return what ``--quick`` changes in a study."""
    return {"rounds": 2, "seeds": [0]} if given.quick else {}


def publish(page: str, name: str, given: argparse.Namespace) -> None:
    """Write the page, or print it if ``--quick``."""
    if given.quick:
        print(page)
    else:
        (RESULTS / f"{name}.md").write_text(page, encoding="utf-8")


def row(*cells: str) -> str:
    """Return a row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def shown(d: Difference) -> str:
    """Return a difference with its interval, bold if it is better or worse; or why it is not tested."""
    if d.value is None:
        return d.why or "none"
    if d.low is None:
        return f"{number(d.value, 3, signed=True)} ({d.why})"
    text = with_interval(d, 3, signed=True)
    return f"**{text}**" if d.verdict() in (BETTER, WORSE) else text


def declared_table(found: Results) -> list[str]:
    """Return the comparisons that the study file declares, as a Markdown table."""
    lines = [row("method", "compared with", "difference in AUC (95 % CI)", "p after Holm", "result"), row(*["---"] * 5)]
    for c in found.result.declared:
        d = c.difference
        lines.append(row(c.method, c.reference, with_interval(d, 3, signed=True), p_value(d.adjusted), d.verdict()))
    return lines


def megabytes(found: Results, label: str) -> float:
    """Return what all sites sent and received in one run of a method, mean over its runs, in MB."""
    rounds = [r for r in found.run.rounds if r.method == label]
    moved = sum(sum(r.bytes_up.values()) + sum(r.bytes_down.values()) for r in rounds)
    return moved / 1e6 / max(1, len({(r.seed, r.fold) for r in rounds}))
