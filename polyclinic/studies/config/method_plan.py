"""The plan of each method of a study: the study's settings completed with the shapes and sites of its data."""

from polyclinic.data.federation import Federated
from polyclinic.engines.plan import Plan
from polyclinic.learning.tasks.survival import outputs_for
from polyclinic.methods import registry
from polyclinic.methods.catalog import Entry
from polyclinic.studies.config.schema import MethodSpec
from polyclinic.studies.config.study_config import Study

POOLED = "pooled"
"""The name of the one site that holds all training data, for methods that pool them."""


def plan_of(study: Study, method: MethodSpec, data: Federated, seed: int) -> Plan:
    """Return the plan of ``method`` with one seed, completed with the sites and example shapes of ``data``."""
    continuous = study.task.kind in ("regression", "reconstruction")  # a target has as many channels as the output
    if study.task.kind == "survival":
        outputs = outputs_for(study.task_options)
    elif study.task.regions is not None:
        outputs = len(study.task.regions)
    else:
        outputs = data.sites[data.training[0]]["train"].width if continuous else len(data.info.classes)
    return Plan(
        kind=study.task.kind,
        network=study.task.network,
        inputs=data.shape,
        outputs=outputs,
        method=method.name,
        sites=_trainers(registry.entry(method.name), data),
        rounds=study.rounds,
        seed=seed,
        task=study.task_options,
        network_options=study.task.options,
        tuning=study.task.tuning,
        training=study.training_of(method),
        options=method.options,
        uplink=method.uplink,
        downlink=method.downlink,
    )


def _trainers(entry: Entry, data: Federated) -> tuple[str, ...]:
    """Return the sites that train: all training sites, or the labeled ones if the method requires labels."""
    if entry.pooled:
        return (POOLED,)
    return tuple(site for site in data.training if entry.unlabeled or len(data.sites[site].get("train", ())))
