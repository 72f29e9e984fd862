"""Settings that a study takes from a plan of ``polyclinic plan``: preprocessing, patch, network and batch."""

from collections.abc import Mapping
from typing import Any

from polyclinic.core.config_problems import Problem
from polyclinic.data.files import placed
from polyclinic.data.fingerprint.nnunet_plan import NnunetPlan
from polyclinic.errors import DataError
from polyclinic.studies.config.loader import AUTOMATIC

NETWORKS = ("nnunet", "resenc")


def with_plan(data: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[Problem]]:
    """Return the tables of a study with the settings of its plan in place of ``data.plan``; keys that are set remain.

    The contents of the plan thereby belong to the study and its hash. A plan of another kind, which describes
    preprocessing only (``polyclinic data plan``), is left to the data.

    Args:
        data: The tables, among them ``data.plan``.

    Returns:
        The tables, and every problem of the plan.
    """
    own = data["data"]
    given = own["plan"]
    if given == AUTOMATIC:
        says = "`polyclinic run` plans by itself; here, write the plan with `polyclinic plan STUDY` and name its file"
        return data, [Problem(("data", "plan"), says)]
    try:
        plan = NnunetPlan.read(placed(given, "plan"))
    except DataError as error:
        return data, [Problem(("data", "plan"), says) for says in error.problems]
    if plan is None:
        return data, []
    if twice := [key for key in ("steps", "patch") if key in own]:
        says = f"plan = {given!r} determines {twice[0]} too: remove one of them, or edit the plan"
        return data, [Problem(("data", twice[0]), says)]
    rest = {key: value for key, value in own.items() if key != "plan"}
    changed = {**data, "data": {**rest, **plan.data_options}}
    task = data.get("task")
    if isinstance(task, Mapping) and task.get("network") in NETWORKS:
        if task["network"] != plan.network:
            says = (
                f'the plan {given!r} is for the network "{plan.network}": name it, or plan again with another --preset'
            )
            return data, [Problem(("task", "network"), says)]
        options = task.get("options", {})
        if isinstance(options, Mapping):
            changed["task"] = {**plan.task_options, **task, "options": {**plan.options, **options}}
    training = data.get("training", {})
    if isinstance(training, Mapping):
        changed["training"] = {"batch_size": plan.batch_size, **training}
    return changed, []
