"""A study with everything that its validation builds: source, splits, plans and methods.

The runner uses these objects, so that what was validated is what runs, and nothing is built twice.
"""

import copy
import dataclasses
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from polyclinic.core.config_problems import Problem
from polyclinic.core.pipeline import UnsuitableTransforms, transforms_of
from polyclinic.data.examples import DataError
from polyclinic.data.federation import Federated, federate
from polyclinic.data.source import Source
from polyclinic.data.splits import Fold
from polyclinic.engines.plan import Plan
from polyclinic.engines.policy.coverage import uncovered
from polyclinic.evaluation.subgroup_results import MANY, groups_of
from polyclinic.learning.networks.model_tree import inspect
from polyclinic.learning.tasks.task import Task
from polyclinic.learning.tasks.task_evaluation import Evaluated
from polyclinic.learning.training.dp_sgd import DPSGD
from polyclinic.methods import registry
from polyclinic.methods.frozen_networks import frozen_problem
from polyclinic.secure_aggregation import SecureSum
from polyclinic.studies.config import simulation_schema
from polyclinic.studies.config.diagnostics import BadStudy
from polyclinic.studies.config.method_plan import plan_of
from polyclinic.studies.config.schema import MethodSpec
from polyclinic.studies.config.study_config import Study
from polyclinic.studies.records.run_description import information, patients_apart, space_of
from polyclinic.studies.run.events import Job


@dataclass(frozen=True, eq=False)
class ResolvedMethod:
    """A method of a study with its plan, for one seed and one split of the data.

    Attributes:
        spec: The method as the study specifies it.
        plan: The plan.
        method: The method that the plan builds, with the study's simulated attack.
    """

    spec: MethodSpec
    plan: Plan
    method: Evaluated[Any]


@dataclass(frozen=True, eq=False)
class ResolvedStudy:
    """A validated study.

    Attributes:
        study: The study.
        text: Its file.
        source: The source of its data.
        splits: The splits of the first seed, one for each fold. Only the first one holds the examples.
        jobs: The method runs in their order.
        methods: The methods that were built for validation, by the name of their job.
        numbers: A number for each patient, by which test sets are compared between method runs.
        warnings: Sentences on the network for the reader.
        info: The content of ``run.json``.
    """

    study: Study
    text: str
    source: Source
    splits: tuple[Federated, ...]
    jobs: tuple[Job, ...]
    methods: Mapping[str, ResolvedMethod]
    numbers: Mapping[str, int]
    warnings: tuple[str, ...]
    info: Mapping[str, Any]

    @property
    def task(self) -> Task:
        """The task of every method."""
        return next(iter(self.methods.values())).method.task

    @property
    def hash(self) -> str:
        """The study's hash."""
        return str(self.info["hash"])

    @property
    def table(self) -> bool:
        """Whether the data are rows of a table, not images."""
        return len(self.splits[0].shape) == 1

    def method(self, job: Job, data: Federated, study: Study) -> ResolvedMethod:
        """Return the method of ``job`` on ``data``. It is built unless the validation has built it.

        Args:
            job: The method run. A search changes its method.
            data: The split of its seed and fold.
            study: The study, whose number of rounds differs in the trials of a search.
        """
        known = self.methods.get(job.name)
        if known is not None and job.trial is None and known.spec == job.method:
            return known
        return _build(study, job, data)


def resolve(study: Study, text: str) -> ResolvedStudy:
    """Read the data of ``study``, and build its methods on them.

    Args:
        study: The study.
        text: Its file, for the lines of messages.

    Raises:
        BadStudy: If methods cannot be built with these settings and data. The message gives the reason for each.
        DataError: If the data cannot be read or used. The message lists every problem.
    """
    source = study.data.source()
    if study.evaluation.subgroups:
        _require_columns(study, source)
    patients = sorted(set(source.table().patients))
    folds: list[Fold | None] = [None]
    if study.folds == "sites":
        count = len(federate(study.data, study.seeds[0], None, source).training)
        folds = [Fold(i, count, "sites") for i in range(count)]
    elif study.folds is not None:
        folds = [Fold(i, study.folds) for i in range(study.folds)]
    jobs = tuple(Job(m, seed, fold) for seed in study.seeds for fold in folds for m in study.methods)
    splits, patients_known = _splits(study, source, jobs)
    model = _model(study, text, splits[0])
    if reason := _size_problem(model, splits[0], study):
        raise BadStudy(f"{study.name}.toml", text, tomllib.loads(text), [Problem(("task", "network"), reason)])
    methods = _methods(study, text, splits[0], folds[0])
    numbers, task = {name: i for i, name in enumerate(patients)}, next(iter(methods.values())).method.task
    info = information(study, splits, patients_known, task, model)
    return ResolvedStudy(study, text, source, splits, jobs, methods, numbers, inspect(model).warnings, info)


def _require_columns(study: Study, source: Source) -> None:
    """Check that the columns of subgroups exist and form groups.

    Raises:
        DataError: If not. The message lists every problem.
    """
    columns, problems = source.table().columns, []
    for name in study.evaluation.subgroups:
        if name not in columns:
            listed = ", ".join(columns) or "none"
            problems.append(f'evaluation.subgroups: the data have no column "{name}". There are: {listed}')
        elif not groups_of(source.table(), dict.fromkeys(source.table().patients, 0), [name]).get(name):
            many = len(set(columns[name]))
            problems.append(
                f'evaluation.subgroups: column "{name}" has {many} values and forms no 2 to {MANY} groups of patients. '
                "Leave it out, or give the data a column with fewer values"
            )
    if problems:
        raise DataError("\n".join(problems))


def _splits(study: Study, source: Source, jobs: tuple[Job, ...]) -> tuple[tuple[Federated, ...], bool]:
    """Check the splits of all seeds and folds; return those of the first seed, and whether the data name patients.

    Raises:
        DataError: If any of them cannot be used.
    """
    splits, known = list[Federated](), list[bool]()
    for seed, fold in dict.fromkeys((job.seed, job.fold) for job in jobs):
        data = federate(study.data, seed, fold, source)
        _require_task(study, data)
        known.append(patients_apart(data))
        if seed == study.seeds[0]:
            splits.append(data if not splits else dataclasses.replace(data, sites={}))
    return tuple(splits), known[0]


def _model(study: Study, text: str, data: Federated) -> nn.Module:
    """Build a model, to check and to describe it.

    Raises:
        BadStudy: If start weights, adapters or what is trained do not fit the network.
        ConfigError: If the options or the shape of the inputs do not suit the network.
    """
    try:
        return plan_of(study, study.methods[0], data, study.seeds[0]).build_task().model()
    except ValueError as error:
        if not study.task.tuning:
            raise
        key, _, says = str(error).partition(": ")
        raise BadStudy(f"{study.name}.toml", text, tomllib.loads(text), [Problem(_place(key), says)]) from None


def _size_problem(model: nn.Module, data: Federated, study: Study) -> str | None:
    """Return why the network cannot be trained on inputs of the size of these; None if it can."""
    examples = next(roles["train"] for roles in data.sites.values() if len(roles.get("train", ())))
    x, _ = examples[torch.zeros(min(study.training.batch_size, 2), dtype=torch.long)]
    found = None
    for device in ("meta", "cpu"):  # without a computation first, which a network of one's own may not support
        try:
            with torch.no_grad():
                copy.deepcopy(model).to(device)(x.to(device, torch.float32))
        except Exception as error:  # whatever the network raises
            found = f"{type(error).__name__}: {error}"
        else:
            return None
    size = " x ".join(map(str, x.shape[2:] if x.ndim > 2 else x.shape[1:]))
    return (
        f"this network cannot be trained with inputs of {size} and batch_size = {study.training.batch_size}: use "
        f"larger images, patches or batches, or another network or options. {found}"
    )


def _methods(study: Study, text: str, data: Federated, fold: Fold | None) -> dict[str, ResolvedMethod]:
    """Build every method on the first split; with an attack, also for the other seeds, whose attackers differ.

    Raises:
        BadStudy: If a method cannot be built.
    """
    methods = dict[str, ResolvedMethod]()
    problems = list[Problem]()
    for i, spec in enumerate(study.methods):
        first = Job(spec, study.seeds[0], fold)
        try:
            methods[first.name] = _build(study, first, data)
            for seed in study.seeds[1:] if study.attack else ():
                _build(study, Job(spec, seed, fold), data)
            plan = methods[first.name].plan
            if reason := _no_patches(plan, data):
                problems.append(Problem(("training",), reason))
            if reason := _too_heavy(plan, methods[first.name].method, data):
                problems.append(Problem(("methods", i, "uplink"), reason))
            task = methods[first.name].method.task
            reason = _stacked(plan.method, data) or frozen_problem(plan.method, task)
            if reason or (plan.private and (reason := uncovered(plan))):
                problems.append(Problem(("methods", i, "name"), reason))
            elif plan.training.get("private") and isinstance(local := plan.build_local(), DPSGD):
                labeled = [roles["train"] for roles in data.sites.values() if len(roles.get("train", ()))]
                refusals = [
                    r for examples in labeled[:1] for r in local.trial(methods[first.name].method.task, examples)
                ]
                problems += [Problem(("methods", i), refusal) for refusal in refusals]
        except (TypeError, ValueError) as error:
            key = ("uplink",) if isinstance(error, UnsuitableTransforms) else ()
            problems.append(Problem(("methods", i, *key), str(error)))
    for site in sorted((study.machines.sites if study.machines else {}).keys() - data.sites.keys()):
        problems.append(Problem(("machines", "sites", site), f"no such site. The sites are {', '.join(data.sites)}"))
    if problems:
        raise BadStudy(f"{study.name}.toml", text, tomllib.loads(text), problems)
    return methods


def _no_patches(plan: Plan, data: Federated) -> str | None:
    """Return why ``foreground`` or ``augmentation`` cannot be used with these data; None if they can."""
    if plan.training.get("augmentation") and len(plan.inputs) not in (3, 4):
        return "augmentation is for images and volumes, and these data are a table: leave [augmentation] out"
    examples = (roles["train"] for roles in data.sites.values() if len(roles.get("train", ())))
    if plan.training.get("foreground") and not all(hasattr(one, "draw") for one in examples):
        return "foreground is for random patches, and these images are used whole: set patch in [data], or remove it"
    return None


def _too_heavy(plan: Plan, method: Evaluated[Any], data: Federated) -> str:
    """Return why a secure sum refuses the weight of the largest site, its number of examples; empty if it does not."""
    uniform = registry.options(registry.entry(plan.method)).get("uniform")
    if uniform is None or plan.options.get("uniform", uniform.default):
        return ""
    counts = {site: len(data.sites[site].get("train", ())) for site in plan.sites}
    largest = max(counts, key=lambda site: counts[site], default="")
    for t in transforms_of(method):
        if isinstance(t, SecureSum) and t.heaviest < counts.get(largest, 0):
            return (
                f"SecureSum(heaviest={t.heaviest:g}): {largest} has weight {counts[largest]}, its number of examples. "
                f"Set heaviest = {counts[largest]}, or uniform = true"
            )
    return ""


def _place(key: str) -> tuple[str, ...]:
    """Return the key of a study that a message on the fine-tuned network begins with."""
    return {"task.weights": ("task", "weights"), "lora": ("task", "lora")}.get(key, ("task", "train"))


def _stacked(method: str, data: Federated) -> str:
    """Return why a method that takes all images at once cannot be used, if the data's plan leaves them on disk."""
    if registry.entry(method).stacks and hasattr(next(iter(data.sites[data.training[0]].values())), "patch"):
        return f"{method} takes all images of a site at once, and the patch of the plan in [data] leaves them on disk"
    return ""


def _build(study: Study, job: Job, data: Federated) -> ResolvedMethod:
    plan = plan_of(study, job.method, data, job.seed)
    method = plan.build_method()
    if study.attack is not None:
        method = simulation_schema.attacked(method, study.attack, study, plan, data.training)
    return ResolvedMethod(job.method, plan, method)


def _require_task(study: Study, data: Federated) -> None:
    """Require that the task fits the data.

    Raises:
        DataError: If it does not. The message says what to change.
    """
    kind, expected = study.task.kind, data.info.task
    if kind != expected:
        fast = "accelerate = 4 in [data], or " if kind == "reconstruction" else ""
        raise DataError(f'{data.info.name} is data for {expected}: set {fast}task.kind = "{expected}", not "{kind}"')
    if study.evaluation.space == "native" and space_of(study, data) != "native":
        raise DataError(
            f"{data.info.name} does not come from image files, so the original grid of its masks is not known: leave "
            '[evaluation] space out, or set space = "grid"'
        )
    if kind == "survival" and not any(r.roles["train"].classes[1] for r in data.rows if not r.external):
        raise DataError("the training data of all sites contain no event, so survival cannot be learned")
    if study.task.ordered:
        _require_order(study, data)
    if study.task.regions is not None:
        _require_regions(study.task.regions, data)
    if kind == "classification":
        weights, count = study.task.class_weights, len(data.info.classes)
        if weights is not None and len(weights) != count:
            raise DataError(f"task.class_weights: {len(weights)} weights, but {data.info.name} has {count} classes")
        present = [
            any(r.roles["train"].classes[c] for r in data.rows if not r.external) for c in range(len(data.info.classes))
        ]
        if sum(present) < 2:
            only = ", ".join(name for name, has in zip(data.info.classes, present, strict=True) if has) or "none"
            raise DataError(f"the training data of all sites contain one class only ({only}); at least two are needed")


def _require_regions(regions: Sequence[Sequence[int]], data: Federated) -> None:
    """Require that the regions contain the labels of the masks.

    Raises:
        DataError: If they do not. The message lists the labels.
    """
    if {n for region in regions for n in region} != set(range(1, len(data.info.classes))):
        named = ", ".join(f"{n} ({name})" for n, name in enumerate(data.info.classes) if n)
        raise DataError(
            f"task.regions: each label above 0 of the masks must be in a region, and no other: they are {named}"
        )


def _require_order(study: Study, data: Federated) -> None:
    """Require that the order of grades is known: whole numbers in ascending order, or a list in the study.

    Raises:
        DataError: If it is not. The message says what to set.
    """
    names = data.info.classes
    if len(names) < 3:
        raise DataError(f"task.ordered: {data.info.name} has {len(names)} classes; an order matters for three or more")
    if "classes" in study.data.options:
        return
    if all(re.fullmatch(r"\d+", name) for name in names) and list(names) == sorted(names, key=int):
        return
    raise DataError(
        f"task.ordered: the order of the classes {', '.join(names[:10])} of {data.info.name} is not known: list them "
        "in ascending order, with classes = [...] in [data]"
    )
