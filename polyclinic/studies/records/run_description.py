"""Description of a run in its folder: data, sites, methods and environment. Checks that roles share no patients."""

import dataclasses
import platform
import time
from collections.abc import Sequence
from importlib import metadata
from typing import Any, Literal

import torch
from torch import nn

from polyclinic import __version__
from polyclinic.data.examples import DataError
from polyclinic.data.federation import Federated, SiteSummary
from polyclinic.evaluation.records.record_schema import OwnMetricInfo
from polyclinic.learning.networks.model_tree import frozen, parameter_count
from polyclinic.learning.tasks.own_metrics import own_metric
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.weights import store
from polyclinic.methods import registry
from polyclinic.studies.config import simulation_schema
from polyclinic.studies.config.schema import MethodSpec
from polyclinic.studies.config.study_config import Study


def _lacking(data: Federated) -> list[str]:
    """Return sentences on sites without labels, with one class only, or without an event."""
    notes = []
    for row in data.rows:
        for role, found in row.roles.items():
            present = sum(count > 0 for count in found.classes)
            if not found.examples:
                notes.append(f"{row.name} has no labels to learn from: methods that need some do not train there.")
            elif found.classes and present < 2 and data.info.task == "classification":
                notes.append(f"{row.name} has one class only in its {role} data: no AUC can be given there.")
            elif data.info.task == "survival" and found.classes and not found.classes[1]:
                notes.append(f"{row.name} has no event in its {role} data: no C-index can be given there.")
    return notes


def _nearly_equal(data: Federated) -> dict[str, int]:
    """Return the number of test examples at each site that nearly equal a training or validation example."""
    found: dict[str, set[str]] = {}
    for pair in data.nearly_equal:
        roles = {role for _, role in pair.places}
        for name, (site, role) in zip(pair.ids, pair.places, strict=True):
            if role == "test" and roles - {"test", "public"}:
                found.setdefault(site, set()).add(name)
    return {site: len(names) for site, names in sorted(found.items())}


def simulated(study: Study) -> Sequence[str]:
    """Return the sentences on what ``study`` simulates; they accompany every result."""
    return tuple(simulation_schema.told(study)) if study.simulates else ()


def described(data: Federated) -> tuple[str, ...]:
    """Return the sentences on the data that accompany every result."""
    badge = (data.simulated,) if data.simulated else ()
    return (*badge, *data.notes, *_lacking(data))


def _sites_are(study: Study, data: Federated) -> str:
    if data.simulated:
        return data.simulated
    named = study.data.sites
    return "those of the data" if named == "natural" else f"by {named}"


def _site(row: SiteSummary) -> dict[str, Any]:
    """Describe one site."""
    return {
        "name": row.name,
        "role": "external" if row.external else "training",
        "patients": {role: found.patients for role, found in row.roles.items()},
        "examples": {role: found.examples for role, found in row.roles.items()},
        "classes": {role: list(found.classes) for role, found in row.roles.items() if found.classes},
    }


def _site_of_folds(row: SiteSummary, splits: Sequence[Federated], folds: Any) -> dict[str, Any]:
    """Describe one site of a cross-validation: all tested patients, the largest training and validation sets."""
    if row.external and folds != "sites":
        return _site(row)
    every = [found for data in splits for found in data.rows if found.name == row.name]
    tested = [f.roles["test"] for f in every if "test" in f.roles]
    roles = {
        role: max((f.roles[role] for f in every if role in f.roles), key=lambda r: r.examples)
        for role in dict.fromkeys(role for f in every for role in f.roles)
    }
    if tested:
        classes = tuple(sum(counts) for counts in zip(*(r.classes for r in tested), strict=True))
        patients, examples = sum(r.patients for r in tested), sum(r.examples for r in tested)
        roles["test"] = dataclasses.replace(tested[0], patients=patients, examples=examples, classes=classes)
    return _site(dataclasses.replace(row, external=False, roles=roles))


def method_facts(method: MethodSpec) -> dict[str, Any]:
    """Return the entries of a report on one method of a study."""
    entry = registry.entry(method.name)
    through = [item["name"] for item in method.uplink]
    received = [item["name"] for item in method.downlink]
    options = {
        **method.options,
        **({"uplink": through} if through else {}),
        **({"downlink": received} if received else {}),
    }
    known = {"name": entry.name, "title": entry.summary, "citation": entry.paper, "leaves": entry.leaves}
    return {"label": method.called, **known, "options": options}


def start_facts(task: Task, model: nn.Module) -> dict[str, Any]:
    """Return the entry ``start`` of ``run.json``, on the start weights of the task's network.

    Args:
        task: The task.
        model: A model that it built.
    """
    network: Any = task.network
    account = network.account()
    item, constant = store.find(network.start.sha256), frozen(model)
    sizes = {name: leaf.numel() for name, leaf in model.state_dict().items() if leaf.is_floating_point()}
    card = {key: getattr(item.card, key) for key in ("license", "source", "trained_on", "citation", "redistribute")}
    return {
        "start": {
            "name": item.card.name,
            "sha256": item.sha256,
            **card,
            "account": account.summary,
            "adapted": [f"{name}: {how}" for name, how in account.adapted.items()],
            "train": list(network.train),
            "trained": sum(size for name, size in sizes.items() if name not in constant),
            "numbers": sum(sizes.values()),
        }
    }


def information(
    study: Study, splits: Sequence[Federated], patients_known: bool, task: Task, model: nn.Module
) -> dict[str, Any]:
    """Return the content of ``run.json``.

    Args:
        study: The study.
        splits: The splits of the first seed, one for each fold.
        patients_known: What ``patients_apart`` returned for the first of them.
        task: The task of every method.
        model: A model that it built.
    """
    data = splits[0]
    by = "sites" if study.folds == "sites" else "patients"
    folded = {} if study.folds is None else {"folds": len(splits), "folds_by": by}
    return {
        "name": study.name,
        "title": study.title or study.name,
        "hash": study.hash,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "task": study.task.kind,
        "classes": list(data.info.classes),
        **({"ordered": True} if study.task.ordered else {}),
        **({"space": space_of(study, data)} if study.task.kind == "segmentation" else {}),
        "metric": study.metric,
        "higher_is_better": study.higher_is_better,
        **metric_facts(study),
        "data": {
            "title": data.info.title,
            "license": data.info.license,
            "citation": data.info.citation,
            "url": data.info.url,
            "notes": [*simulated(study), *data.notes, *_lacking(data)],
            "simulated": data.simulated,
            "fingerprint": data.fingerprint,
            "sites_are": _sites_are(study, data),
            "checks": ["patients_apart"] if patients_known else [],
            **({"near_duplicates": near} if data.nearly_equal and (near := _nearly_equal(data)) else {}),
        },
        "sites": [_site(row) if study.folds is None else _site_of_folds(row, splits, study.folds) for row in data.rows],
        "methods": [method_facts(method) for method in study.methods],
        "rounds": study.rounds,
        "seeds": list(study.seeds),
        **folded,
        **(simulation_schema.facts(study, data.training) if study.simulates else {}),
        **declared(study),
        "engine": study.engine.model_dump(),
        "environment": environment(),
        "parameters": parameter_count(model),
        "inputs": list(data.shape),
        "outputs": task.network.outputs,
        "training": {method.called: study.training_of(method) for method in study.methods},
        **(start_facts(task, model) if study.task.weights is not None else {}),
    }


def own_metrics(study: Study) -> list[OwnMetricInfo]:
    """Return the metrics of packages that a study names."""
    named = [(name, own_metric(name)) for name in study.evaluation.own_metrics]
    return [
        OwnMetricInfo(name=name, label=own.label or name, higher_is_better=own.higher_is_better, unit=own.unit)
        for name, own in named
    ]


def metric_facts(study: Study) -> dict[str, Any]:
    """Return the metrics of packages for ``run.json``; nothing if the study names none."""
    return {"metrics": [entry.model_dump() for entry in own_metrics(study)]} if study.evaluation.own_metrics else {}


def space_of(study: Study, data: Federated) -> Literal["native", "grid"]:
    """Return where masks are compared: on the original grid of the files, if it is known, or on the network's grid."""
    known = all(
        getattr(e, "measured", None) is not None for roles in data.sites.values() for e in roles.values() if len(e)
    )
    return "native" if known and study.evaluation.space != "grid" else "grid"


def declared(study: Study) -> dict[str, Any]:
    """Return the comparisons that the study declares, for ``run.json``; nothing without any."""
    compare = [c.model_dump(exclude_none=True) for c in study.evaluation.compare]
    return {"compare": compare} if compare else {}


def patients_apart(data: Federated) -> bool:
    """Return whether the data name the patient of each example, and check that roles and sites share no patients.

    Raises:
        DataError: If a patient occurs in two roles or at two sites.
    """
    seen: dict[str, tuple[str, str]] = {}
    named, twice = False, dict[str, str]()
    for site, roles in data.sites.items():
        for role, examples in roles.items():
            if role == "public":  # public images belong to no patient
                continue
            named = named or examples.patients != examples.ids
            place = site, role if role in ("val", "test") else "train"
            for patient in set(examples.patients):
                if (first := seen.setdefault(patient, place)) != place:
                    twice[patient] = f"{first[1]} of {first[0]}, {place[1]} of {site}"
    if twice:
        who = "; ".join(f"{patient} ({places})" for patient, places in sorted(twice.items())[:3])
        raise DataError(
            f"{len(twice)} patients are in two places: {who}. That leaks test patients into training: "
            "correct the column that says whose an example is"
        )
    return named


def environment() -> dict[str, Any]:
    """Return the versions of packages and hardware backends that a result may depend on."""
    packages = {}
    for name in ("torch", "monai", "numpy", "scipy", "safetensors"):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = "absent"
    return {
        "polyclinic": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda or "none",
        **packages,
    }
