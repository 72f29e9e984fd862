"""Linear baselines of a simulated run of a table: of each training site alone, and of all of them in one place.

They are fitted for every seed and fold after the method runs, on the same splits. Their test predictions are added to
the run folder, where the evaluation finds them.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from polyclinic.core.tree import Tree
from polyclinic.data.federation import Federated
from polyclinic.data.splits import Fold
from polyclinic.engines.site_runtime import repeatable
from polyclinic.evaluation.records.method_runs import LINEAR_FOLDER, LINEAR_LOCAL, LINEAR_POOLED, arm_name
from polyclinic.learning.linear_model import fit_linear
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.tasks.task_evaluation import outputs
from polyclinic.studies.run.method_run import tested_sites
from polyclinic.studies.run.run_directory import write_tensors


def linear_files(path: Path, seed: int, fold: Fold | None) -> dict[str, Path]:
    """Return the files with the predictions of the linear baselines of one seed and fold, by label.

    A site that is held out has no model of its own.
    """
    index = None if fold is None else fold.index
    labels = (LINEAR_POOLED,) if fold is not None and fold.by == "sites" else (LINEAR_LOCAL, LINEAR_POOLED)
    names = {label: arm_name(label, seed, index) for label in labels}
    return {label: path / LINEAR_FOLDER / f"{name}.safetensors" for label, name in names.items()}


def write_linear_baselines(
    files: Mapping[str, Path], task: Task, data: Federated, fold: Fold | None, numbers: Mapping[str, int]
) -> None:
    """Fit the linear baselines on one split, and write their test predictions.

    Args:
        files: The file of each baseline, from ``linear_files``.
        task: The study's task with a linear model, from ``linear_task``.
        data: The split.
        fold: Its fold.
        numbers: A number for each patient.
    """
    for label, file in files.items():
        with repeatable():
            models = _alone(task, data) if label == LINEAR_LOCAL else _pooled(task, data)
            leaves = _predictions(task, models, data, fold, numbers)
        if leaves:
            file.parent.mkdir(exist_ok=True)
            write_tensors(file, leaves)


def _predictions(
    task: Task, models: Mapping[str, Tree], data: Federated, fold: Fold | None, numbers: Mapping[str, int]
) -> dict[str, Tensor]:
    """Return the predictions for the test patients of each site that has a model."""
    leaves: dict[str, Tensor] = {}
    for site in tested_sites([s for s in data.sites if s in models], data.external, fold):
        if test := data.sites[site].get("test"):
            predicted = outputs(task, models[site], test)
            patients = torch.tensor([numbers[patient] for patient in test.patients])
            leaves |= {f"{site}/{name}": leaf for name, leaf in {**predicted, "patient": patients}.items()}
    return leaves


def _alone(task: Task, data: Federated) -> dict[str, Tree]:
    """Return the model of each training site that has labels; external sites have none."""
    found = {}
    for site in data.training:
        roles = data.sites[site]
        model = fit_linear(task, roles["train"], roles.get("val")) if len(roles.get("train", ())) else None
        if model is not None:
            found[site] = model
    return found


def _pooled(task: Task, data: Federated) -> dict[str, Tree]:
    """Return the same model for every site, also for external ones."""
    roles = data.pooled
    model = fit_linear(task, roles["train"], roles.get("val")) if "train" in roles else None
    return {} if model is None else dict.fromkeys(data.sites, model)
