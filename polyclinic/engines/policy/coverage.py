"""Check that what the sites of a plan release is covered by the privacy mechanism that the plan accounts for.

Methods of the catalog declare their coverage, and a test verifies each declaration
(``tests/attacks/test_release_audit.py``). For a method from another package there is no declaration, so the release
audit runs on it, once for each plan.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from polyclinic.attacks import release_audit
from polyclinic.attacks.neighboring_sites import PATIENTS, neighbors, sites
from polyclinic.attacks.release_audit import Verdict
from polyclinic.core.metering import Unit
from polyclinic.core.site import Site
from polyclinic.engines.plan import Plan, ways
from polyclinic.methods.catalog import METHODS, Way
from polyclinic.methods.registry import entry, options

ROUNDS, SITES, SIDE = 3, 5, 16


def uncovered(plan: Plan) -> str | None:
    """Return why the noise of ``plan`` does not cover what the sites release, and what to do; None if it does.

    A plan without noise has nothing to cover.

    Raises:
        ValueError: If the plan cannot be built.
    """
    if not plan.private:
        return None
    if plan.method in METHODS:
        return declared_problem(plan.method, ways(plan.training, plan.uplink))
    verdict = audited(plan)
    return None if verdict.covered else verdict.says


def declared_problem(name: str, asked: Sequence[Way]) -> str | None:
    """Return why a catalog method is not covered in one of the ways ``asked``; None if it is, or is a plug-in."""
    if (line := METHODS.get(name)) is None or line.leaves == "nothing":
        return None
    if not (missing := [way for way in asked if way not in line.private]):
        return None
    how = {"dp-sgd": "private training (DP-SGD) does not cover", "gaussian": "noise on its replies does not cover"}
    why = f" ({line.exposes})" if line.exposes else ""
    return (
        f"{how[missing[0]]} what {name} sends{why}, so the stated ε would be too small: "
        f"{alternative(name, missing)}; or add no noise and claim no ε"
    )


def alternative(name: str, missing: Sequence[Way]) -> str:
    """Return what to use instead of a method that is not covered in the ways ``missing``."""
    others = [e.name for e in METHODS.values() if set(missing) <= set(e.private) and not e.baseline and e.name != name]
    found = f"use {', '.join(others[:3])} or another of the {len(others)} methods that docs/reference lists as covered"
    line = METHODS.get(name)
    if line is not None and "dp-sgd" in missing and "gaussian" in line.private:
        found += ", or send through clip and gaussian instead of training privately"
    if line is not None and "gaussian" in missing and "dp-sgd" in line.private:
        found += ", or train privately ([training] private = …) instead of adding noise to replies"
    return found


def typical(name: str, way: Way, kind: str = "") -> Plan:
    """Return a small plan of the method ``name`` with default options and one accounted mechanism.

    Args:
            kind: The kind of task; one that the method supports if empty.
    """
    line = entry(name)
    kind = kind or next((k for k in ("multilabel", "classification", *line.tasks) if k in line.tasks), "classification")
    images = kind in ("segmentation", "reconstruction")
    training: dict[str, Any] = {"batch_size": PATIENTS // 2, "lr": 0.2}
    send: tuple[Mapping[str, Any], ...] = ()
    if way == "dp-sgd":
        training["private"] = {"noise": 1.0, "bound": 0.5, "unit": "patient"}
    else:
        send = ({"name": "clip", "bound": 0.05}, {"name": "gaussian", "multiplier": 1.0})
    return Plan(
        kind=kind,
        network="unet" if images else "cnn",
        inputs=(1, 16, 16) if images else (1, 8, 8),
        outputs={"regression": 1, "reconstruction": 1, "multilabel": 3, "survival": 3}.get(kind, 2),
        method=name,
        sites=("pooled",) if line.pooled else ("site-0", "site-1", "site-2"),
        rounds=ROUNDS,
        task={"cuts": (1.0, 2.0, 3.0)} if kind == "survival" else {},
        network_options={"width": 8, "norm": "group"} | ({} if images else {"depth": 2}),
        training=training,
        options={"uniform": True} if way == "gaussian" and "uniform" in options(line) else {},
        uplink=send,
    )


_verdicts: dict[str, Verdict] = {}


def audited(plan: Plan, full: bool = False) -> Verdict:
    """Run the release audit on the method of ``plan``, with synthetic data in its shapes.

    Args:
        full: Whether to test more changes, in all roles and at all sites.

    Raises:
        ValueError: If the plan cannot be built.
    """
    key = f"{plan.hash} {full}"
    if key not in _verdicts:
        _verdicts[key] = _audited(small(plan), full)
    return _verdicts[key]


def _audited(plan: Plan, full: bool) -> Verdict:
    private = plan.training.get("private")
    unit: Unit = private.get("unit", "patient") if private else "site"
    method, task = plan.build_method(), plan.build_task()
    verdict, instead = None, alternative(plan.method, ways(plan.training, plan.uplink))
    for seed in range(2 if full else 1):
        places = sites(plan.kind, plan.inputs, plan.outputs, plan.sites, seed)  # type: ignore[arg-type]
        changed = [
            n
            for name in (plan.sites if full else plan.sites[:1])
            for n in neighbors(places[name], plan.kind, plan.outputs, unit, full, seed)  # type: ignore[arg-type]
        ]
        server = Site("server", {"public": places[plan.sites[0]].data["public"]})
        verdict = release_audit.audit(
            plan.method,
            method,
            task.first(seed),
            places,
            changed,
            unit,
            rounds=plan.rounds,
            server=server,
            alternative=instead,
        )
        if not verdict.covered:
            return verdict
    assert verdict is not None
    return verdict


def small(plan: Plan) -> Plan:
    """Reduce the rounds, sites and steps of ``plan``, and its image size if its network supports smaller images.

    Batches are half as large as the synthetic sites, so that each changed patient is drawn into some steps only. The
    other steps must not depend on the patient.
    """
    training = {**plan.training, "batch_size": PATIENTS // 2, "epochs": 1}
    training |= {"steps": 2} if training.get("steps") else {}
    less = replace(plan, rounds=min(plan.rounds, ROUNDS), sites=plan.sites[:SITES], training=training)
    for inputs in _smaller(plan.inputs):
        try:
            candidate = replace(less, inputs=inputs)
            task = candidate.build_task()
            with torch.no_grad():
                task.model()(torch.zeros(2, *inputs))
            return candidate
        except (ValueError, RuntimeError, TypeError):
            continue
    return less


def _smaller(inputs: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Yield smaller input shapes to try, the smallest first."""
    for side in (SIDE, 2 * SIDE, 4 * SIDE):
        if len(inputs) > 1 and any(size > side for size in inputs[1:]):
            yield (inputs[0], *(min(size, side) for size in inputs[1:]))
