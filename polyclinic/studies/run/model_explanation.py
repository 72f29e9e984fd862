"""Attribution maps of a run's model at every site, computed on its validation patients.

A site sends one mean map over at least ten patients (``learning.tasks.saliency``), in the job ``explain/val``, which
its policy admits or refuses like any other job. Test data are not used, since they are used once only.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyclinic.core.execution import Policy
from polyclinic.errors import RunError
from polyclinic.studies.records.saliency_maps import FILE
from polyclinic.studies.run.finished_method import finished_method
from polyclinic.studies.run.run_directory import write_tensors

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
        NotFinished: If the method run is not finished.
        NotExplained: If no site sent a map.
    """
    run = finished_method(run_dir, label, seed, policies)
    found, refused = run.ask(JOB, [s for s in run.data.training if len(run.data.sites[s].get("val", ()))])
    if not found:
        why = "; ".join(f"{s}: {reason}" for s, reason in refused.items()) or "no site has validation patients"
        raise NotExplained(f"{run_dir}: no site sent an attribution map: {why}")
    before, _ = run.ask(JOB, list(found), trained=False)
    leaves = {f"{site}/{key}": leaf for site, maps in found.items() for key, leaf in maps.items()}
    leaves |= {f"{site}/untrained": maps["map"] for site, maps in before.items()}
    names = _features(run.source, next(iter(found.values()))["map"].ndim)
    write_tensors(run.folder / FILE, leaves, {"features": "\n".join(names), "role": "val"})
    return run.folder / FILE, refused


def _features(source: Any, axes: int) -> tuple[str, ...]:
    return tuple(getattr(source, "names", ())) if axes == 1 else ()
