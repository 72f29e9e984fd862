"""Reporting checklists: an item is ticked only if something in the run folder supports it.

The items are TOML files in ``checklists``, each with a short name in our own words and, at most, the name of a fact
that would support it. A fact is established from the run, never from the product's feature list. Items without a fact
are left to the authors, and an item that this run could have supported but does not is called open.
"""

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from polyclinic.errors import ConfigError
from polyclinic.evaluation.records.run_reader import Run, external_sites
from polyclinic.evaluation.run_evaluation import Evaluation
from polyclinic.studies.records.saliency_maps import read_explanation

ALL = ("federated_healthcare", "claim_2024", "tripod_ai", "future_ai")
STATUS = {"shown": "✓ shown", "open": "open", "person": "for the authors"}
Journal = tuple[int, str, str]


@dataclass(frozen=True)
class Item:
    """Row of a checklist. ``fact`` names what would support it; empty if only the authors can answer."""

    id: str
    text: str
    fact: str = ""


@dataclass(frozen=True)
class Checklist:
    """A checklist: its name, title, source and items in order."""

    name: str
    title: str
    source: str
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Answer:
    """Answer of a run to an item. ``evidence`` names the artifact, and the section of the page that shows it."""

    item: Item
    status: Literal["shown", "open", "person"]
    evidence: str = ""


@cache
def load(name: str) -> Checklist:
    """Read a checklist.

    Raises:
        ConfigError: If there is none of that name, or it names an unknown fact.
    """
    file = Path(__file__).parent / "checklists" / f"{name}.toml"
    if not file.is_file():
        raise ConfigError(f"no checklist called {name!r}; there are {', '.join(ALL)}")
    data = tomllib.loads(file.read_text(encoding="utf-8"))
    items = tuple(Item(str(i["id"]), i["text"], i.get("fact", "")) for i in data["item"])
    if unknown := sorted({i.fact for i in items if i.fact} - FACTS.keys()):
        raise ConfigError(f"{file}: unknown facts {unknown}; facts are {', '.join(sorted(FACTS))}")
    return Checklist(name, data["title"], data["source"], items)


def fill(checklist: Checklist, run: Run, result: Evaluation, journal: Journal = (0, "", "")) -> list[Answer]:
    """Answer every item from the contents of the run."""
    answers = []
    for item in checklist.items:
        if not item.fact:
            answers.append(Answer(item, "person"))
            continue
        evidence = FACTS[item.fact](run, result, journal)
        answers.append(Answer(item, "shown", evidence) if evidence else Answer(item, "open"))
    return answers


def _natural(run: Run, result: Evaluation, journal: Journal) -> str:
    data = run.info.data
    return "" if data.simulated or not data.sites_are else f"Data card: sites are {data.sites_are}"


def _deployed(run: Run, result: Evaluation, journal: Journal) -> str:
    kind = str(run.info.engine.get("kind", ""))
    return f"Reproduce this study: engine {kind}" if kind not in ("", "in_process", "workers") else ""


def _external(run: Run, result: Evaluation, journal: Journal) -> str:
    tested = [s for s in external_sites(run) if any(s in m.sites for m in result.methods)]
    return f"Results at every site: {', '.join(tested)}" if tested else ""


def _preprocessing(run: Run, result: Evaluation, journal: Journal) -> str:
    return f"Data card: fingerprint {run.info.data.fingerprint[:12]}" if run.info.data.fingerprint else ""


def _partial(run: Run, result: Evaluation, journal: Journal) -> str:
    training = {s.name for s in run.info.sites if s.role == "training"}
    some = [r for r in run.rounds if r.lost or (r.asked and set(r.asked) < training)]
    return f"Communication: {len(some)} rounds without some site, time at each site" if some else ""


def _open_format(run: Run, result: Evaluation, journal: Journal) -> str:
    return "Run folder: study.toml, records.jsonl, safetensors" if run.study and run.arms else ""


def _privacy(run: Run, result: Evaluation, journal: Journal) -> str:
    spent = [p for p in run.privacy if p.epsilon is not None and p.delta is not None]
    return "Privacy: ε, δ and unit" if spent else ""


def _privacy_curve(run: Run, result: Evaluation, journal: Journal) -> str:
    spent = [max((p.epsilon or 0.0 for p in run.spent(m.label)), default=0.0) for m in run.info.methods]
    levels = {round(e, 6) for e in spent if e}
    return f"Privacy: {len(levels)} values of ε" if len(levels) > 1 else ""


def _bytes(run: Run, result: Evaluation, journal: Journal) -> str:
    return "Communication: bytes, rounds, time" if any(r.bytes_up or r.bytes_down for r in run.rounds) else ""


def _baselines(run: Run, result: Evaluation, journal: Journal) -> str:
    labels = [m.label for m in result.methods]
    enough = {"local", "pooled"} <= set(labels) and sum(not m.baseline for m in result.methods) > 1
    return f"Comparison of methods: {', '.join(labels)}" if enough else ""


def _per_site(run: Run, result: Evaluation, journal: Journal) -> str:
    several = any(len(m.sites) > 1 and m.worst is not None for m in result.methods)
    return (
        "Results at every site; worst site; difference from local training"
        if several and any(m.gains for m in result.methods)
        else ""
    )


def _repeats(run: Run, result: Evaluation, journal: Journal) -> str:
    enough = any(len(m.seeds) > 1 for m in result.methods) and result.comparisons
    return f"Comparison of methods: {len(run.info.seeds)} seeds, paired intervals" if enough else ""


def _intervals(run: Run, result: Evaluation, journal: Journal) -> str:
    return (
        "Results at every site: intervals over patients" if any(m.macro.low is not None for m in result.methods) else ""
    )


def _tests(run: Run, result: Evaluation, journal: Journal) -> str:
    return "Comparison of methods: paired, Holm-corrected" if result.comparisons else ""


def _calibration(run: Run, result: Evaluation, journal: Journal) -> str:
    found = run.info.task == "classification" and result.headline is not None
    return "Calibration: reliability, slope, decision curve" if found else ""


def _patients_apart(run: Run, result: Evaluation, journal: Journal) -> str:
    return "Data card: no patient in two splits (checked)" if "patients_apart" in run.info.data.checks else ""


def _sealed(run: Run, result: Evaluation, journal: Journal) -> str:
    once = run.opened and all(k == 1 for k in run.opened.values()) and run.arms.keys() <= run.opened.keys()
    return "Reproduce this study: test set opened once for each model" if once else ""


def _selection(run: Run, result: Evaluation, journal: Journal) -> str:
    chosen = any(m.validation is not None for m in result.methods)
    return "Learning curves: models chosen on validation" if chosen else ""


def _labels(run: Run, result: Evaluation, journal: Journal) -> str:
    return "Data card: classes at each site" if all(s.classes for s in run.info.sites) else ""


def _robust(run: Run, result: Evaluation, journal: Journal) -> str:
    return f"Communication: {len(run.quarantined)} replies refused, with the site" if run.quarantined else ""


def _personal(run: Run, result: Evaluation, journal: Journal) -> str:
    personal = any(m.name in PERSONAL for m in run.info.methods)
    return (
        "Results at every site: personalized methods and an external site"
        if personal and _external(run, result, journal)
        else ""
    )


def _audit(run: Run, result: Evaluation, journal: Journal) -> str:
    entries, head, broken = journal
    return f"Reproduce this study: journal of {entries} entries, head {head[:12]}" if entries and not broken else ""


def _reproducible(run: Run, result: Evaluation, journal: Journal) -> str:
    enough = run.study and run.info.seeds and run.info.environment and run.digests
    return "Reproduce this study: study, seeds, versions, hashes" if enough else ""


def _software(run: Run, result: Evaluation, journal: Journal) -> str:
    known = [k for k in ("polyclinic", "torch", "python") if k in run.info.environment]
    return f"Reproduce this study: versions of {', '.join(known)}" if len(known) == 3 else ""


def _source(run: Run, result: Evaluation, journal: Journal) -> str:
    data = run.info.data
    return "Data card: source, license, citation" if data.title and data.license and (data.citation or data.url) else ""


def _flow(run: Run, result: Evaluation, journal: Journal) -> str:
    return "Data card: patients by site and role" if all(s.patients for s in run.info.sites) else ""


def _model(run: Run, result: Evaluation, journal: Journal) -> str:
    return "Reproduce this study: study.toml, number of parameters" if run.study and run.info.parameters else ""


def _training(run: Run, result: Evaluation, journal: Journal) -> str:
    return "Reproduce this study: study.toml; learning curves" if run.study and run.curves else ""


def _metrics(run: Run, result: Evaluation, journal: Journal) -> str:
    return f"Methods paragraph: {result.metric.label}, unit and intervals" if result.methods else ""


def _internal(run: Run, result: Evaluation, journal: Journal) -> str:
    return "Results at every site: held-out patients" if any(m.means for m in result.methods) else ""


def _between_sites(run: Run, result: Evaluation, journal: Journal) -> str:
    return "Results at every site: spread, I²" if any(m.random is not None for m in result.methods) else ""


def _topology(run: Run, result: Evaluation, journal: Journal) -> str:
    without = [m.label for m in run.info.methods if m.name in SERVERLESS]
    return f"Comparison of methods: {', '.join(without)} without a permanent server" if without else ""


def _contribution(run: Run, result: Evaluation, journal: Journal) -> str:
    named = any(m.name == "fedce" for m in run.info.methods)
    return "Comparison of methods: FedCE weights sites by their contribution" if named else ""


def _subgroups(run: Run, result: Evaluation, journal: Journal) -> str:
    return "Patient subgroups" if (run.path / "groups.json").is_file() and result.headline else ""


def _operating(run: Run, result: Evaluation, journal: Journal) -> str:
    binary = run.info.task == "classification" and len(run.info.classes) == 2
    return "Calibration: operating points" if binary and run.validation and result.headline else ""


def _explained(run: Run, result: Evaluation, journal: Journal) -> str:
    found = read_explanation(run, result.headline) if result.headline else None
    return f"Attribution maps: agreement of {len(found.maps)} sites" if found and len(found.maps) > 1 else ""


SERVERLESS = frozenset({"swarm", "gossip", "cyclic"})
PERSONAL = frozenset(
    {"fedbn", "silobn", "lg_fedavg", "lg-fedavg", "flop", "ditto", "fedper", "fedrep", "apfl", "pfedme", "personal"}
)
FACTS: Mapping[str, Callable[[Run, Evaluation, Journal], str]] = {
    "natural_sites": _natural,
    "deployed": _deployed,
    "external": _external,
    "preprocessing": _preprocessing,
    "partial_participation": _partial,
    "open_format": _open_format,
    "privacy": _privacy,
    "privacy_curve": _privacy_curve,
    "bytes": _bytes,
    "baselines": _baselines,
    "per_site": _per_site,
    "repeats": _repeats,
    "intervals": _intervals,
    "tests": _tests,
    "calibration": _calibration,
    "patients_apart": _patients_apart,
    "sealed": _sealed,
    "selection": _selection,
    "labels": _labels,
    "robust": _robust,
    "personal": _personal,
    "audit_log": _audit,
    "reproducible": _reproducible,
    "software": _software,
    "source": _source,
    "flow": _flow,
    "model": _model,
    "training": _training,
    "metrics": _metrics,
    "internal": _internal,
    "between_sites": _between_sites,
    "topology": _topology,
    "contribution": _contribution,
    "subgroups": _subgroups,
    "operating": _operating,
    "explained": _explained,
}


def counts(answers: Sequence[Answer]) -> dict[str, int]:
    """Return the numbers of items that are shown, open, and left to the authors."""
    return {k: sum(a.status == k for a in answers) for k in STATUS}
