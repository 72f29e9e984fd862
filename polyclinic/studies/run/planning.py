"""Planning of preprocessing from the federated fingerprint of a study's data."""

from collections.abc import Mapping

import numpy as np
import torch

from polyclinic.core.rounds import train
from polyclinic.core.site import Site
from polyclinic.data.examples import DataError, Dataset, in_memory
from polyclinic.data.federation import DataSpec, federate
from polyclinic.data.fingerprint import preprocessing_planner
from polyclinic.data.fingerprint.dataset_fingerprint import PLAIN, Measured, Numbered, measured
from polyclinic.data.fingerprint.preprocessing_plan import DataPlan
from polyclinic.data.preprocessing.table_statistics import Statistics
from polyclinic.data.quality.drift import FEWEST, SiteDrift, drift
from polyclinic.data.sources.feature_tables import FeatureTable
from polyclinic.engines.local.in_process import InProcess
from polyclinic.learning.networks.network_catalog import Network
from polyclinic.learning.tasks.classification import Classification
from polyclinic.methods.statistics.pooled_statistics import Fingerprint


def sites_of(spec: DataSpec, seed: int) -> dict[str, Measured]:
    """Return the measurements of each training site's training rows, labeled or not, in the split of ``seed``."""
    source = spec.source()
    whole, found = measured(source), {}
    data = federate(spec.model_copy(update=PLAIN), seed, source=Numbered(source))
    for name in data.training:
        roles = data.sites[name]
        rows = torch.cat([_rows(roles[role]) for role in ("train", "unlabeled") if role in roles])
        found[name] = whole.subset(rows)
    return found


def plan(spec: DataSpec, study: str, seed: int = 0, by_site: bool = False) -> DataPlan:
    """Compute the federated fingerprint of the training data of ``spec``, and the preprocessing that follows from it.

    Args:
        spec: The data.
        study: The study's name.
        seed: Seed of the split.
        by_site: Whether each site with enough patients is also described separately.

    Raises:
        DataError: If the data cannot be read, or have too few patients to be described without revealing them.
    """
    sites, source = sites_of(spec, seed), spec.source()
    patients = {name: len(set(found.patients)) for name, found in sites.items()}
    if sum(patients.values()) < preprocessing_planner.FEWEST:
        raise DataError(f"{sum(patients.values())} patients are too few to be described: their sums would reveal them")
    first = next(iter(sites.values()))
    targets, names = first.targets, first.names
    classes = class_names(source, targets)
    task = Classification(Network("mlp", (len(names),), max(len(classes), 1)))
    method = Fingerprint(task, by_site=by_site)
    state = method.init({})
    for step in train(method, InProcess(method, {n: Site(n, {"train": m}) for n, m in sites.items()}), state, rounds=1):
        state = step.state
    summary = method.summary(state)
    everywhere = preprocessing_planner.reference(summary, names, sum(patients.values()), classes)
    apart = {
        name: preprocessing_planner.reference(method.summary(state, name), names, patients[name], classes)
        for name in sorted(state.sites)
        if patients[name] >= preprocessing_planner.FEWEST
    }
    if isinstance(source, FeatureTable):
        inputs = _inputs(source, {"mean": summary.mean.numpy(), "std": summary.std.numpy()})
        from_sums = f"from the sums of {summary.examples} rows"
        return DataPlan(study, source.fingerprint, seed, everywhere, apart, (), inputs, (from_sums,))
    if not any(name.startswith("pixels along") for name in names):
        raise DataError(f"{source.info.name} is neither images nor a table of columns: there is nothing to prepare")
    about = getattr(source, "about", None)
    steps, why = preprocessing_planner.steps(everywhere, about.modality if about else "")
    return DataPlan(study, source.fingerprint, seed, everywhere, apart, steps, None, why)


def _rows(examples: Dataset) -> torch.Tensor:
    """Return the row numbers that ``Numbered`` gives as inputs."""
    return in_memory(examples, "a plan").inputs[:, 0].long()


def class_names(source: object, targets: torch.Tensor) -> tuple[str, ...]:
    """Return the names of the classes that are known before preprocessing; none for regression and survival."""
    if getattr(source, "regression", False) or getattr(source, "event", ""):
        return ()
    known = Numbered(source).info.classes  # type: ignore[arg-type]
    count = targets.shape[1] if targets.ndim == 2 else int(targets.max()) + 1
    return known if len(known) >= count else (*known, *(f"class {i}" for i in range(len(known), count)))


def _inputs(source: FeatureTable, found: Mapping[str, "np.ndarray[tuple[int], np.dtype[np.float64]]"]) -> Statistics:
    """Return the fill values and scaling of a table's inputs from sums. Binary inputs are not scaled."""
    _, names, amounts = source.inputs
    scaled = amounts & source.scale
    varies = scaled & (found["std"] > 1e-8 * np.abs(found["mean"]) + 1e-12)
    filling = np.zeros_like(found["mean"]) if source.fill == "zero" else found["mean"]
    return Statistics(
        names, np.where(scaled, found["mean"], 0), np.where(varies, found["std"], 1), np.where(amounts, filling, 0)
    )


def drifts(plan: DataPlan, spec: DataSpec) -> list[SiteDrift]:
    """Compare the data of ``spec`` at each site with the training data described by ``plan``.

    If sites are simulated or unknown, all data are compared together. Sites with few patients are omitted.
    """
    source = spec.source()
    whole, found = measured(source), []
    classes = class_names(source, whole.targets)
    if spec.partition or (spec.sites == "natural" and not source.table().sites):
        return [drift(plan, "all of it", whole, classes)]
    dealt = {**PLAIN, "min_patients": FEWEST, "external": (), "public": (), "unlabeled": 0.0, "split": (0.6, 0.0, 0.4)}
    data = federate(spec.model_copy(update=dealt), 0, source=Numbered(source))
    for name, roles in data.sites.items():
        rows = torch.cat([_rows(examples) for examples in roles.values()])
        found.append(drift(plan, name, whole.subset(rows), classes))
    return found
