"""Runs a study: every method with every seed, one arm after the other, in a folder that survives any crash.

A generator: it yields what happened, and progress bars, early ends and tests are what the caller makes of it.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from polyclinic.data.examples import DataError
from polyclinic.data.federation import Federated, SiteSummary, federate
from polyclinic.engines.plan import Plan
from polyclinic.methods import registry
from polyclinic.methods.table import Entry
from polyclinic.studies.arm import POOLED, Arm, Event
from polyclinic.studies.folder import Folder, environment
from polyclinic.studies.spec import MethodSpec, Study
from polyclinic.tasks.model import inspect


def run(study: Study, text: str, path: Path, resume: bool = False) -> Iterator[Event]:
    """Runs ``study`` in the folder at ``path``; ``text`` is its file, kept beside the results.

    Raises:
        DataError: Where the data cannot be had or cannot be used, with every problem; nothing was run.
        RunExists: Where the folder holds a run and ``resume`` is not asked for.
    """
    data = {seed: federate(study.data, seed) for seed in study.seeds}
    first = data[study.seeds[0]]
    _check(study, first)
    plans = [(method, seed, _plan(study, method, data[seed], seed)) for method in study.methods for seed in study.seeds]
    for _, _, plan in plans:
        plan.build_method()  # a wrong combination is refused before anything runs
    task = plans[0][2].build_task()
    found = inspect(task.model())
    parameters = sum(leaf.numel() for leaf in task.first(0).values())
    folder = Folder(path)
    folder.begin(text, _info(study, first, parameters), resume)
    try:
        folder.journal.write("resumed" if resume else "begun", {"study": study.hash, "data": first.fingerprint})
        yield Event("data", notes=(*_described(first), *found.warnings))
        length = 0
        for method, seed, plan in plans:
            arm = Arm(study, method, seed, plan, data[seed], folder)
            yield from arm.run(length)
            length = arm.length
        folder.journal.write("finished", {})
    finally:
        folder.close()


def _check(study: Study, data: Federated) -> None:
    """Whether the task fits the data.

    Raises:
        DataError: Where it does not, with what to do.
    """
    kind, found = study.task.kind, data.info.task
    if kind != found:
        fast = "accelerate = 4 in [data], or " if kind == "reconstruction" else ""
        raise DataError(f'{data.info.name} is data for {found}: set {fast}task.kind = "{found}", not "{kind}"')
    if kind == "classification":
        present = [
            any(r.roles["train"].classes[c] for r in data.rows if not r.external) for c in range(len(data.info.classes))
        ]
        if sum(present) < 2:
            only = ", ".join(name for name, there in zip(data.info.classes, present, strict=True) if there) or "none"
            raise DataError(
                f"the training data of all sites hold one class only ({only}): there is nothing to tell apart"
            )


def _lacking(data: Federated) -> list[str]:
    """Sites that cannot learn or show what the others can, in sentences."""
    notes = []
    for row in data.rows:
        for role, found in row.roles.items():
            present = sum(count > 0 for count in found.classes)
            if not found.examples:
                notes.append(f"{row.name} has no labels to learn from: methods that need some do not train there.")
            elif found.classes and present < 2 and data.info.task == "classification":
                notes.append(f"{row.name} has one class only in its {role} data: no AUC can be given there.")
    return notes


def _plan(study: Study, method: MethodSpec, data: Federated, seed: int) -> Plan:
    continuous = study.task.kind in ("regression", "reconstruction")  # a target has as many channels as the output
    outputs = int(data.sites[data.training[0]]["train"].targets.shape[1]) if continuous else len(data.info.classes)
    return Plan(
        kind=study.task.kind,
        network=study.task.network,
        inputs=data.shape,
        outputs=outputs,
        method=method.name,
        sites=_trainers(registry.entry(method.name), data),
        rounds=study.rounds,
        seed=seed,
        task=study.task.settings,
        network_options=study.task.options,
        training=study.training_of(method),
        options=method.options,
        send=method.send,
    )


def _trainers(entry: Entry, data: Federated) -> tuple[str, ...]:
    """Who trains: all training sites, or those with labels, where the method can use no others."""
    if entry.pooled:
        return (POOLED,)
    return tuple(site for site in data.training if entry.unlabelled or len(data.sites[site].get("train", ())))


def _described(data: Federated) -> tuple[str, ...]:
    badge = (data.simulated,) if data.simulated else ()
    return (*badge, *data.notes, *_lacking(data))


def _sites_are(study: Study, data: Federated) -> str:
    if data.simulated:
        return data.simulated
    named = study.data.sites
    return "as the data say" if named == "natural" else f"by {named}"


def _patients_apart(data: Federated) -> bool:
    """Whether the data say whose each example is, and nobody is in two roles or at two sites."""
    seen: dict[str, tuple[str, str]] = {}
    named = False
    for site, roles in data.sites.items():
        for role, examples in roles.items():
            if role == "public":  # nobody's patients
                continue
            named = named or examples.patients != examples.ids
            for patient in set(examples.patients):
                if seen.setdefault(patient, (site, role)) != (site, role):
                    return False
    return named


def _site(row: SiteSummary) -> dict[str, Any]:
    roles = row.roles
    return {
        "name": row.name,
        "role": "external" if row.external else "training",
        "patients": {role: found.patients for role, found in roles.items()},
        "examples": {role: found.examples for role, found in roles.items()},
        "classes": {role: list(found.classes) for role, found in roles.items() if found.classes},
    }


def _info(study: Study, data: Federated, parameters: int) -> dict[str, Any]:
    """``run.json``."""
    methods = []
    for method in study.methods:
        entry = registry.entry(method.name)
        known = {"name": entry.name, "title": method.called, "citation": entry.paper, "leaves": entry.leaves}
        through = [item["name"] for item in method.send]
        methods.append(
            {"label": method.called, **known, "options": {**method.options, **({"send": through} if through else {})}}
        )
    return {
        "name": study.name,
        "title": study.title or study.name,
        "hash": study.hash,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "task": study.task.kind,
        "classes": list(data.info.classes),
        "metric": study.metric,
        "higher_is_better": study.higher_is_better,
        "data": {
            "title": data.info.title, "licence": data.info.licence, "citation": data.info.citation,
            "url": data.info.url, "notes": [*data.notes, *_lacking(data)], "simulated": data.simulated,
            "fingerprint": data.fingerprint, "sites_are": _sites_are(study, data),
            "checks": ["patients_apart"] if _patients_apart(data) else [],
        },
        "sites": [_site(row) for row in data.rows],
        "methods": methods,
        "rounds": study.rounds,
        "seeds": list(study.seeds),
        "engine": study.engine.model_dump(),
        "environment": environment(),
        "parameters": parameters,
    }  # fmt: skip
