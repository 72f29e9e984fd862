"""Attribution maps of a run's model at every site, computed on its validation patients.

A site sends one mean map over at least ten patients (``learning.tasks.saliency``), in the job ``explain/val``, which
its policy admits or refuses like any other job. Test data are not used, since they are used once only.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from polyclinic.core import serialization as states
from polyclinic.core.execution import Policy
from polyclinic.core.site import Site
from polyclinic.engines.local.in_process import InProcess
from polyclinic.errors import RunError
from polyclinic.evaluation.records.method_runs import arm_name
from polyclinic.evaluation.records.run_reader import Run, read_run
from polyclinic.studies.records.saliency_maps import FILE
from polyclinic.studies.run.data_identity import read_again
from polyclinic.studies.run.run_directory import read_plan, write_tensors

JOB = "explain/val"


class NotExplained(RunError, ValueError):
    """A run whose model cannot be explained. The message gives the reason."""


def explain(
    run_dir: str | Path, label: str = "", seed: int | None = None, policies: Mapping[str, Policy] | None = None
) -> tuple[Path, dict[str, str]]:
    """Request the attribution maps of one method run from every site, and write them to its folder for the report.

    Args:
        run_dir: A finished run, whose data are still available.
        label: Label of the method; by default the headline method of the report.
        seed: Seed of the method run; by default the first.
        policies: Policies of sites. A site without one allows everything.

    Returns:
        The file, and the sites without a map with their reasons.

    Raises:
        NotARun: If the folder is not a run.
        DataChanged: If the data are not those that the run began with.
        NotExplained: If the method run is not finished, or no site sent a map.
    """
    run = read_run(run_dir)
    label, seed = label or _headline(run), run.info.seeds[0] if seed is None else seed
    folder = run.path / "arms" / arm_name(label, seed, 0 if run.info.folds else None)
    if not (folder / "model.safetensors").is_file():
        raise NotExplained(f"{folder}: no model; the method run is not finished, or the run has no method {label!r}")
    _, source, data = read_again(run, seed)
    plan = read_plan(folder / "model.safetensors")
    method = plan.build_method()
    kept = states.load(folder / "best.safetensors")
    make = partial(Site, device="cpu", seed=seed)
    sites = {name: make(name, dict(roles)) for name, roles in data.sites.items()}
    engine = InProcess(method, sites, kept.memory, policies, seed)
    asked = [s for s in data.training if len(data.sites[s].get("val", ()))]
    found, refused = _ask(method, engine, kept.state, asked)
    if not found:
        why = "; ".join(f"{s}: {reason}" for s, reason in refused.items()) or "no site has validation patients"
        raise NotExplained(f"{run.path}: no site sent an attribution map: {why}")
    before, _ = _ask(method, engine, method.init(method.task.first(seed)), list(found))
    leaves = {f"{site}/{key}": leaf for site, maps in found.items() for key, leaf in maps.items()}
    leaves |= {f"{site}/untrained": maps["map"] for site, maps in before.items()}
    names = _features(source, next(iter(found.values()))["map"].ndim)
    write_tensors(folder / FILE, leaves, {"features": "\n".join(names), "role": "val"})
    return folder / FILE, refused


def _ask(method: Any, engine: InProcess, state: Any, sites: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the maps by site, requested one by one so that each refusal has its own reason."""
    maps: dict[str, Any] = {}
    refused: dict[str, str] = {}
    for site in sites:
        engine.send(replace(method.evaluation_request(state), job=JOB, secure=False, recipients=None), [site])
        for arrival in engine.replies():
            if arrival.reply is None:
                refused[site] = arrival.lost
            elif "explain" in arrival.reply.parts:
                maps |= arrival.reply.gather("explain")
    return maps, refused


def _features(source: Any, axes: int) -> tuple[str, ...]:
    return tuple(getattr(source, "names", ())) if axes == 1 else ()


def _headline(run: Run) -> str:
    from polyclinic.evaluation.run_evaluation import evaluate

    label = evaluate(run).headline
    if label is None:
        raise NotExplained(f"{run.path}: no method has been tested yet")
    return label
