"""The models of a run or of an exported bundle, with how their images or tables are read."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyclinic.core import serialization as states
from polyclinic.core.tree import Tree
from polyclinic.data.sources.feature_tables import FeatureTable
from polyclinic.engines.plan import Plan
from polyclinic.errors import ConfigError, RunError
from polyclinic.evaluation.records.method_runs import arm_name
from polyclinic.evaluation.records.run_reader import Run, read_run
from polyclinic.learning.networks.model_tree import params_of
from polyclinic.learning.tasks.task import Task
from polyclinic.methods import registry
from polyclinic.studies.config.study_config import Study, parse
from polyclinic.studies.inference.reading import Reading
from polyclinic.studies.inference.table_reading import TableReading
from polyclinic.studies.records.checkpoint import Checkpoint
from polyclinic.studies.run.run_directory import read_plan, read_tensors, statistics_file

READING = "reading.json"
"""File of a bundle that says how images are read."""


class NoModel(RunError, ValueError):
    """A run or bundle without the requested model. The message says which models there are."""


@dataclass(frozen=True, eq=False)
class Member:
    """One model of an ensemble.

    Attributes:
        name: Such as ``"fedavg-seed0-fold1"``.
        task: Its task, whose network the parameters are of.
        params: Its parameters.
        sha256: Hash of the file they come from.
        statistics: For tables, the file with which rows are filled and scaled; None for images, and if each site has
            its own.
    """

    name: str
    task: Task
    params: Tree
    sha256: str
    statistics: Path | None = None


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """A model, or an ensemble of models of the same study, that can be applied to new data.

    Attributes:
        origin: The run folder or bundle.
        members: The models, at least one.
        plan: The plan of the first one.
        reading: How images, or the rows of a table, are read.
        classes: Names of the classes, in order.
        study: Hash of the study.
        method: Label of the method.
        site: The site whose own model it is; empty for the model of the federation.
        data: The study, if known.
    """

    origin: Path
    members: tuple[Member, ...]
    plan: Plan
    reading: Reading | TableReading
    classes: tuple[str, ...]
    study: str
    method: str
    site: str = ""
    data: Study | None = None

    @property
    def mirror_axes(self) -> tuple[int, ...]:
        """The spatial axes that training mirrored."""
        return self.plan.build_local().mirror_axes(len(self.plan.inputs) - 1)

    @property
    def identity(self) -> dict[str, Any]:
        """What a prediction depends on, as JSON."""
        return {
            "origin": self.origin.name,
            "study": self.study,
            "method": self.method,
            "site": self.site,
            "models": {member.name: member.sha256 for member in self.members},
            "reading": self.reading.table,
        }


def trained_model(
    origin: Path, method: str = "", seeds: Sequence[int] = (), folds: Sequence[int] = (), site: str = ""
) -> TrainedModel:
    """Read the model of a run, or of a bundle that ``polyclinic export`` wrote.

    Args:
        origin: The run folder, or the bundle's.
        method: Label of the method; by default the report's main method.
        seeds: Seeds whose models are averaged; by default all.
        folds: Folds whose models are averaged; by default all.
        site: Site whose own model is used, for personalized methods.

    Raises:
        NoModel: If there is no such model. The message says which there are.
        NotARun: If ``origin`` is neither a run nor a bundle.
    """
    if (origin / "configs" / "inference.json").is_file():
        if method or seeds or folds or site:
            raise NoModel(f"{origin}: a bundle holds one model: leave --method, --seed, --fold and --site out")
        return _of_bundle(origin)
    run = read_run(origin)
    if not run.study:
        raise NoModel(f"{origin}: study.toml is missing, which says how images are read")
    label = method or _headline(run)
    _require_among(origin, "method", [label], [m.label for m in run.info.methods])
    _require_among(origin, "seed", seeds, run.info.seeds)
    _require_among(origin, "fold", folds, range(run.info.folds))
    study = parse(run.study, run.path / "study.toml")
    splits = (folds or range(run.info.folds)) if run.info.folds else [None]
    names = [arm_name(label, seed, fold) for seed in seeds or run.info.seeds for fold in splits]
    ready = [name for name in names if (run.path / "arms" / name / "model.safetensors").is_file()]
    if missing := [name for name in names if name not in ready]:
        raise NoModel(
            f"{origin}: {', '.join(missing[:3])} {'has' if len(missing) == 1 else 'have'} no model yet. Finish the run "
            "(polyclinic run --resume), or choose with --seed and --fold"
        )
    found = [_member(run, run.path / "arms" / name, site) for name in names]
    plan, classes, source = found[0][0], run.info.classes, study.data.source()
    reading: Reading | TableReading
    if isinstance(source, FeatureTable):
        reading = TableReading(source, found[0][1].statistics)
    else:
        reading = Reading.of(source, plan.inputs, plan.kind == "segmentation")
    return TrainedModel(
        origin, tuple(member for _, member in found), plan, reading, classes, run.info.hash, label, site, study
    )


def _require_among(origin: Path, what: str, given: Sequence[Any], known: Sequence[Any]) -> None:
    if wrong := [one for one in given if one not in known]:
        listed = ", ".join(map(str, known)) or "none"
        raise NoModel(f"{origin}: the run has no {what} {wrong[0]}. It has {listed}")


def _headline(run: Run) -> str:
    from polyclinic.evaluation.run_evaluation import evaluate

    label = evaluate(run).headline
    if label is None:
        raise NoModel(f"{run.path}: no method has been tested yet; name one with --method")
    return label


def _member(run: Run, folder: Path, site: str) -> tuple[Plan, Member]:
    """Return the plan and the model of one method run; the model of ``site``, if given."""
    file = folder / "model.safetensors"
    plan = read_plan(file)
    method = plan.build_method()
    task: Task = method.prediction_task or method.task
    if not site:
        if not registry.entry(plan.method).newcomers:
            raise NoModel(
                f"{run.path}: {plan.method} has a model for each site and none for others: choose one with --site "
                f"({', '.join(plan.sites)})"
            )
        return plan, Member(folder.name, task, read_tensors(file), _sha256(file), statistics_file(folder))
    _require_among(run.path, "training site", [site], plan.sites)
    file = folder / "best.safetensors"
    file = file if file.is_file() else folder / "checkpoint.safetensors"
    if not file.is_file():
        raise NoModel(f"{run.path}: {folder.name} keeps no states of sites, so the model of {site} is not here")
    kept: Checkpoint = states.load(file)
    request = method.evaluation_request(kept.state).for_site(site)
    params = method.site_model(request, kept.memory.get(site, {}))
    return plan, Member(folder.name, task, params, _sha256(file), statistics_file(folder, site))


def _of_bundle(origin: Path) -> TrainedModel:
    """Return the model of a bundle."""
    try:
        inference = json.loads((origin / "configs" / "inference.json").read_text(encoding="utf-8"))
        plan = Plan.from_json(json.dumps(inference["network_def"]["plan"]))
        about = json.loads((origin / "configs" / READING).read_text(encoding="utf-8"))
        file = origin / "models" / "model.safetensors"
        weights = read_tensors(file)
    except FileNotFoundError as error:
        raise NoModel(f"{error.filename} is missing: the bundle is not complete; export it again") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NoModel(f"{origin}: is not a bundle of polyclinic export ({type(error).__name__}: {error})") from None
    reading = Reading.of_table(about)
    if (reading.channels, reading.axes) != (plan.inputs[0], len(plan.inputs) - 1):
        raise ConfigError(f"{origin}: {READING} and the plan describe different images: export the bundle again")
    method = plan.build_method()
    task: Task = method.prediction_task or method.task
    network = task.model()
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise NoModel(f"{origin}: the weights are not those of the plan's network ({error})") from None
    member = Member(plan.method, task, params_of(network), _sha256(file))
    classes = tuple(map(str, about.get("classes", ())))
    return TrainedModel(origin, (member,), plan, reading, classes, str(about.get("study", "")), plan.method)


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
