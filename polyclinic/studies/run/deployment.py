"""A study between hospitals: conversion of a study file to run requests, and of their results to a run folder.

The study file is the same as on one machine. Methods that only one machine can run are omitted with a note. The shape
of an example comes from the sites (``engines.site_description``). The run folder has the format of a
run on one machine; for a site that keeps its predictions, the records contain its scores.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from polyclinic.core import atomic, extensions
from polyclinic.core import serialization as states
from polyclinic.core.audit_log import Journal, verify
from polyclinic.engines.flare.protocol.data_restrictions import FROM_STUDY
from polyclinic.engines.plan import Plan
from polyclinic.engines.site_description import shape_of
from polyclinic.errors import ConfigError
from polyclinic.evaluation.records.method_runs import PLAN, arm_name
from polyclinic.learning.networks.model_tree import parameter_count
from polyclinic.learning.tasks.survival import outputs_for
from polyclinic.methods import registry
from polyclinic.studies.config.study_config import Study
from polyclinic.studies.records.run_description import declared, environment, method_facts, metric_facts, start_facts
from polyclinic.studies.run.run_directory import write_tensors

WHERE = ("use", "path", "kind", "sites", "external", "min_patients", "max_patients", "annotations", "public")
ONE_MACHINE = {
    "folds": "cross-validates",
    "search": "searches for settings",
    "machines": "simulates machines",
    "attack": "simulates an attack",
}
MEASURES = "case-statistics"
UNTRAINED = (MEASURES, "duplicate-search")
"""The methods that train no model, so that there is nothing to score."""
NO_MODEL: dict[str, Any] = {
    "kind": "classification",
    "network": "mlp",
    "network_options": {},
    "task": {},
    "inputs": [1],
    "outputs": 1,
}
SUMS = ("bytes_up", "bytes_down", "seconds")


class NotElsewhere(ConfigError):
    """A study that cannot run between hospitals. The message gives the reason and the correction."""


def method_runs(
    study: Study, sites: Sequence[str], shape: Mapping[str, Any] | None = None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the method runs of ``study`` over the admitted ``sites``, and notes on what is omitted.

    Args:
        shape: ``inputs`` and ``outputs`` if they are known; otherwise the sites are asked.

    Raises:
        NotElsewhere: If no method remains, or the study needs a feature of a single machine.
    """
    for key, what in ONE_MACHINE.items():
        if getattr(study, key, None) is not None:
            raise NotElsewhere(f"the study {what} ({key}), which it can on one machine only: take [{key}] out")
    if study.evaluation.patience is not None:
        raise NotElsewhere("the study ends baselines early (evaluation.patience), which it can on one machine only")
    own = [
        study.task.network,
        study.task.loss or "",
        *study.evaluation.own_metrics,
        *study.own_augmentations,
        study.training.loop or "",
    ]
    if here := [name for name in own if name.startswith(extensions.LOCAL)]:
        raise NotElsewhere(
            f"{here[0]} is known to the program that runs the study only: publish it as a package, which every site "
            "installs and allows (polyclinic new --plugin)"
        )
    if study.data.public:
        raise NotElsewhere("the study gives the server public images (data.public), which it can on one machine only")
    if away := [name for name in study.data.external if name not in sites]:
        raise NotElsewhere(f"the external site {away[0]} is not admitted; there are {', '.join(sites) or 'none yet'}")
    trainers = [name for name in sites if name not in study.data.external]
    if not trainers:
        raise NotElsewhere("no site can train: every admitted site is external, or none is admitted yet")
    found, notes = list[dict[str, Any]](), list[str]()
    for method in study.methods:
        entry = registry.entry(method.name)
        if entry.pooled:
            notes.append(
                f"{method.called} is left out: it needs all data in one place, and here they stay at the sites"
            )
            continue
        for seed in study.seeds:
            plan = {
                "kind": study.task.kind,
                "network": study.task.network,
                "method": method.name,
                "rounds": study.rounds,
                "seed": seed,
                "task": study.task_options,
                "network_options": study.task.options,
                "sites": trainers,
                "training": study.training_of(method),
                "options": method.options,
                "uplink": [dict(item) for item in method.uplink],
                **({"downlink": [dict(item) for item in method.downlink]} if method.downlink else {}),
                **({"tuning": study.task.tuning} if study.task.tuning else {}),
                **(shape or {}),
            }
            if study.task.kind == "survival":
                plan["outputs"] = outputs_for(study.task_options)
            if study.task.regions is not None:
                plan["outputs"] = len(study.task.regions)
            if method.name == MEASURES:  # no model is trained, so that the sites need not be asked for a shape
                plan |= NO_MODEL
            external = [name for name in study.data.external if entry.newcomers]
            found.append({"label": method.called, "seed": seed, "plan": _plain(plan), "external": external})
    if not found:
        raise NotElsewhere("no method is left: " + "; ".join(notes))
    if kept := sorted(_own(study).keys() - set(FROM_STUDY)):
        notes.append(f"[data] {', '.join(kept)}: not sent; each hospital says this of its own data, in its data.toml")
    return found, notes


def how(study: Study) -> dict[str, Any]:
    """Return the settings that the requests of all method runs share."""
    best = {"metric": study.metric, "higher": study.higher_is_better} if study.evaluation.select == "best" else {}
    sent = {key: value for key, value in _own(study).items() if key in FROM_STUDY}
    scored = any(method.name not in UNTRAINED for method in study.methods)
    return {
        "sites_per_round": study.sites_per_round,
        "min_replies": study.min_replies,
        "deadline": study.deadline,
        "best": best if scored else {},
        "score_every": study.evaluation.interval if scored else 0,
        "test": "predict/test" if scored else "",
        "data": _plain(sent),
    }


def _own(study: Study) -> dict[str, Any]:
    """Return the data settings of the study file, except the location of the data on this machine."""
    return study.data.model_dump(mode="json", exclude_unset=True, exclude=set(WHERE))


def collect(
    study: Study,
    text: str,
    title: str,
    runs: Mapping[str, Mapping[str, Any]],
    descriptions: Mapping[str, Any],
    folders: Mapping[str, Path],
    out: Path,
    plan: bytes | None = None,
) -> list[str]:
    """Write the run folder ``out``, and return the method runs that have not finished.

    Args:
        text: The study file, and ``title`` the name under which it ran.
        runs: The method runs by name, with ``label``, ``seed``, ``plan`` and ``external``.
        descriptions: The sites' descriptions of their data.
        folders: The folder at the server of each finished run.
        out: A new folder.
        plan: The plan that the study names, if any.
    """
    names = sorted({site for arm in runs.values() for site in (*arm["plan"]["sites"], *arm["external"])})
    info = _info(study, title, runs, descriptions, names)
    out.mkdir(parents=True, exist_ok=True)
    atomic.write(out / "study.toml", text)
    if plan is not None:
        atomic.write(out / PLAN, plan)
    atomic.write_json(out / "run.json", info)
    journal, lines, missing = Journal(out / "journal.jsonl"), list[str](), list[str]()
    for run, arm in runs.items():
        if run not in folders:
            missing.append(f"{arm['label']} (seed {arm['seed']})")
            continue
        lines += [json.dumps(fact, separators=(",", ":")) for fact in _facts(folders[run] / "records.jsonl")]
        _tensors(folders[run], out / "arms" / arm_name(arm["label"], arm["seed"]), study, arm)
        heads = list(verify(folders[run] / "journal.jsonl"))
        about = {"method": arm["label"], "seed": arm["seed"], "run": run}
        journal.write("collected", {**about, "head": heads[-1]["hash"], "entries": len(heads)})
    atomic.write(out / "records.jsonl", "".join(f"{line}\n" for line in lines))
    journal.close()
    return missing


def _facts(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a run, with the exchanges of one round combined."""
    parts: dict[str, Any] | None = None
    done = 0
    for line in path.read_text(encoding="utf-8").splitlines():
        fact = json.loads(line)
        if fact["kind"] != "round":
            yield fact
            continue
        parts = fact if parts is None else _together(parts, fact)
        if parts["round"] > done:
            done = parts["round"]
            yield {key: value for key, value in parts.items() if key != "job"}
            parts = None


def _together(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    sums = {key: {s: a[key].get(s, 0) + b[key].get(s, 0) for s in {**a[key], **b[key]}} for key in SUMS}
    asked = sorted({*a["asked"], *b["asked"]})
    return {**b, **sums, "asked": asked, "lost": {**a["lost"], **b["lost"]}, "wall": a["wall"] + b["wall"]}


def _tensors(folder: Path, arm: Path, study: Study, about: Mapping[str, Any]) -> None:
    """Write the model and the predictions that sites sent, as plain safetensors files."""
    arm.mkdir(parents=True)
    model = states.load(folder / "model.safetensors")
    meta = {"study": study.hash, "method": about["label"], "plan": json.dumps(about["plan"], sort_keys=True)}
    write_tensors(arm / "model.safetensors", model, {**meta, "round": str(_tested(folder))})
    for name in ("predictions", "validation"):
        if (folder / f"{name}.safetensors").exists():
            write_tensors(arm / f"{name}.safetensors", states.load(folder / f"{name}.safetensors"))


def _tested(folder: Path) -> int:
    lines = (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()
    return max((fact["round"] for fact in map(json.loads, lines) if fact["kind"] == "test"), default=0)


def _info(
    study: Study,
    title: str,
    runs: Mapping[str, Mapping[str, Any]],
    descriptions: Mapping[str, Any],
    names: Sequence[str],
) -> dict[str, Any]:
    """Return the content of ``run.json``."""
    first = next(iter(runs.values()))
    inputs, outputs, classes = (
        shape_of(descriptions) if descriptions else (first["plan"]["inputs"], first["plan"]["outputs"], [])
    )
    external = {site for arm in runs.values() for site in arm["external"]}
    plan = Plan.from_json(json.dumps({"inputs": inputs, "outputs": outputs, **first["plan"]}))
    task = plan.build_task()
    model = task.model()
    labels = {arm["label"] for arm in runs.values()}
    continuous = study.task.kind in ("regression", "survival", "reconstruction")
    notes = [
        "The data stayed at their hospitals, which ran this study over NVIDIA FLARE.",
        *(
            f"{site} has a group with fewer patients than its policy allows to be counted."
            for site in names
            if None in _numbers(descriptions.get(site, {}))
        ),
    ]
    unnamed = [site for site in names if site in descriptions and not descriptions[site]["classes"]]
    if classes and unnamed:
        notes.append(f"{', '.join(unnamed)} named no classes, so the order of their classes was not checked.")
    return {
        "name": title,
        "title": study.title or study.name,
        "hash": study.hash,
        "task": study.task.kind,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "classes": [] if continuous else classes or [f"class {i}" for i in range(outputs)],
        **({"ordered": True} if study.task.ordered else {}),
        **({"space": study.evaluation.space or "native"} if study.task.kind == "segmentation" else {}),
        "metric": study.metric,
        "higher_is_better": study.higher_is_better,
        **metric_facts(study),
        "data": {"title": f"the data of {len(names)} hospitals", "notes": notes, "sites_are": "hospitals"},
        "sites": [_site(name, name in external, descriptions.get(name, {})) for name in names],
        "methods": [method_facts(method) for method in study.methods if method.called in labels],
        "rounds": study.rounds,
        "seeds": list(study.seeds),
        "engine": {"kind": "flare"},
        **declared(study),
        "environment": environment(),
        "inputs": list(plan.inputs),
        "outputs": plan.outputs,
        "parameters": parameter_count(model),
        **(start_facts(task, model) if study.task.weights is not None else {}),
    }


def _site(name: str, external: bool, descriptions: Mapping[str, Any]) -> dict[str, Any]:
    roles = descriptions.get("roles", {})
    known = {key: {r: has[key] for r, has in roles.items() if has[key] is not None} for key in ("patients", "examples")}
    classes = {r: has["classes"] for r, has in roles.items() if has["classes"] and None not in has["classes"]}
    return {"name": name, "role": "external" if external else "training", **known, "classes": classes}


def _numbers(descriptions: Mapping[str, Any]) -> list[int | None]:
    return [
        n for has in descriptions.get("roles", {}).values() for n in (has["patients"], has["examples"], *has["classes"])
    ]


def _plain(value: Any) -> Any:
    """Return ``value`` as it is after encoding as JSON and decoding."""
    return json.loads(json.dumps(value))
