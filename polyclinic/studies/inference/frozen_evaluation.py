"""Evaluation of trained models, which stay as they are, on the data of a study at each of its sites.

The sites predict in the same jobs as at the end of a run (``predict/test``), and the same code computes scores,
intervals and paired comparisons. A run's model keeps its method and the states of sites, so that a personalized method
predicts with the model of each site that trained, and with its model for new sites at all others.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from polyclinic.core import atomic
from polyclinic.core import serialization as states
from polyclinic.core.method import Method
from polyclinic.core.site import Site
from polyclinic.core.tree import Tree, Trees
from polyclinic.data.examples import Dataset, concat
from polyclinic.data.federation import Federated, federate
from polyclinic.data.source import FittedSource, Source
from polyclinic.data.sources.feature_tables import FeatureTable
from polyclinic.data.splits import Fold
from polyclinic.engines.local.in_process import InProcess
from polyclinic.errors import ConfigError
from polyclinic.evaluation.records.predictions import Predictions, predictions_of
from polyclinic.evaluation.records.record_schema import DataInfo, MethodInfo, RunInfo, SiteInfo
from polyclinic.evaluation.records.run_reader import Run
from polyclinic.evaluation.run_evaluation import Evaluation, Options
from polyclinic.evaluation.run_evaluation import evaluate as evaluate_run
from polyclinic.learning.tasks.task_evaluation import Evaluated, evaluate
from polyclinic.methods.optimization.baselines import Frozen
from polyclinic.studies.config.loader import table_of
from polyclinic.studies.config.study_config import Study, parse
from polyclinic.studies.inference.models import Member, TrainedModel
from polyclinic.studies.records.checkpoint import Checkpoint
from polyclinic.studies.run.run_directory import write_tensors

FILE, PREDICTIONS = "evaluation.json", "predictions.safetensors"


class NotEvaluated(ConfigError):
    """Models and data that do not fit each other. The message says what differs."""


@dataclass(frozen=True, eq=False)
class FrozenResult:
    """Scores of frozen models.

    Attributes:
        evaluation: The scores with intervals, and the comparison of the models if there are several.
        predictions: The outputs by model and seed, then by site.
        notes: Sentences that accompany the scores.
        sites: Numbers of tested images by site.
    """

    evaluation: Evaluation
    predictions: Mapping[tuple[str, int], Mapping[str, Tree]]
    notes: tuple[str, ...]
    sites: Mapping[str, int]


def study_for(model: TrainedModel, text: str, path: Path, changed: Mapping[str, Any] | None = None) -> Study:
    """Return the study in ``text``, completed by what the model determines: its task, and how images are acquired.

    A file with a ``[data]`` table alone is enough.

    Raises:
        NotEvaluated: If the task or the preparation differs from the model's.
        BadStudy: If the study is not valid.
    """
    given = table_of(text, path, changed)
    changes = dict[str, Any]()
    if "name" not in given:
        changes["name"] = "evaluation"
    if "rounds" not in given:
        changes["rounds"] = 1
    if "methods" not in given:
        changes["methods"] = [{"name": "fedavg"}]
    data = given.get("data")
    steps = model.reading.table.get("steps")
    if isinstance(data, dict) and not {"steps", "plan"} & data.keys() and steps:
        changes["data.steps"] = steps
    acquired = model.data.data if model.data else None
    if isinstance(data, dict) and acquired and acquired.accelerate and "accelerate" not in data:
        changes |= {"data.accelerate": acquired.accelerate, "data.center": data.get("center", acquired.center)}
    if "task" not in given:
        own = model.data.task.model_dump(mode="json", exclude_unset=True) if model.data else {}
        changes["task"] = own or {"kind": model.plan.kind}
    study = parse(text, path, {**changes, **(changed or {})})
    if study.task.kind != model.plan.kind:
        raise NotEvaluated(f"{path}: its task is {study.task.kind}, and {model.origin} predicts {model.plan.kind}")
    return study


def evaluate_frozen(models: Sequence[TrainedModel], study: Study, everything: bool = False) -> FrozenResult:
    """Evaluate models on the test data of ``study``, or on all its data, at each of its sites.

    Args:
        models: One model, or two that are compared, paired by patient. The models of several seeds are evaluated one by
            one, as in their run.
        study: The data. If it is the study that a model was trained by, each seed's model is tested on that seed's
            split; otherwise the split of the study's first seed is used.
        everything: Whether to use all examples, not only the test data. For data that no model was trained on.

    Raises:
        NotEvaluated: If a model does not fit the data, or ``everything`` would include training data.
        DataError: If the data cannot be read.
    """
    source = study.data.source()
    labels = _labels(models)
    found: dict[tuple[str, int], dict[str, Tree]] = {}
    numbers = {patient: i for i, patient in enumerate(sorted(set(source.table().patients)))}
    notes, first, data, read = list[str](), None, None, None
    for label, model in zip(labels, models, strict=True):
        own = model.study == study.hash
        if everything and own:
            raise NotEvaluated(f"{model.origin} was trained on this study's data: leave --all out")
        for number, member in enumerate(model.members):
            seed, fold = _place(member, model) if own else (study.seeds[0], None)
            scaled = source if own else _scaled(source, member)
            if data is None or (seed, fold, scaled) != read:
                data, read = federate(study.data, seed, fold, scaled), (seed, fold, scaled)
            _require_fit(model, data, scaled, own)
            first = first or replace(data, sites={site: {} for site in data.sites})  # without its images
            sites = {site: _tested(roles, everything) for site, roles in data.sites.items()}
            tested = {site: examples for site, examples in sites.items() if examples is not None and len(examples)}
            method, state, memory = _method(model, member)
            make = partial(Site, device=study.engine.device, seed=seed)
            engine = InProcess(method, {s: make(s, {"test": e}) for s, e in tested.items()}, memory, {}, seed)
            answers = evaluate(method, engine, state, list(tested), "predict/test")
            if missing := sorted(tested.keys() - answers.keys()):
                raise NotEvaluated(f"{model.origin}: {member.name} gives no valid prediction at {', '.join(missing)}")
            found[label, number if not own else seed] = {
                site: {**outputs, "patient": torch.tensor([numbers[p] for p in tested[site].patients])}
                for site, outputs in answers.items()
            }
        if not own:
            notes.append(
                f"{label}: the data are not those of its study; whether it knows their patients is not checked."
            )
    if first is None:
        raise NotEvaluated("there is no model to evaluate")
    _require_paired(found, labels)
    info = _info(study, models[0], labels, first, [seed for _, seed in found])
    arms = {key: {site: _predictions(o, study.task.kind) for site, o in sites.items()} for key, sites in found.items()}
    run = Run(models[0].origin, info, arms=arms)
    counts = {site: len(o["patient"]) for sites in found.values() for site, o in sites.items()}
    return FrozenResult(evaluate_run(run, Options(reference=labels[0])), found, tuple(notes), counts)


def write_result(result: FrozenResult, models: Sequence[TrainedModel], out: Path) -> Path:
    """Write the scores, and the outputs of every image, to the folder ``out``; return the file of scores."""
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]) and not (out / FILE).is_file():
        raise ConfigError(f"{out}: contains something else. Name an empty or new folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    table = summary(result) | {"models": json.loads(json.dumps([model.identity for model in models]))}
    atomic.write_json(out / FILE, table)
    leaves = {
        f"{label}/seed{seed}/{site}/{name}": leaf
        for (label, seed), sites in result.predictions.items()
        for site, outputs in sites.items()
        for name, leaf in outputs.items()
    }
    write_tensors(out / PREDICTIONS, leaves)
    return out / FILE


def summary(result: FrozenResult) -> dict[str, Any]:
    """Return the scores as plain values: by model and site, over all patients, and the comparison."""
    e = result.evaluation

    def plain(estimate: Any) -> dict[str, Any]:
        return {"value": estimate.value, "low": estimate.low, "high": estimate.high, "n": estimate.n}

    return {
        "metric": e.metric.name,
        "results": [
            {
                "model": m.label,
                "seeds": list(m.seeds),
                "mean_over_sites": plain(m.macro),
                "sites": {site: {k: plain(v) for k, v in found.items()} for site, found in m.sites.items()},
                "means": {k: plain(v) for k, v in m.means.items()},
                "external": {k: plain(v) for k, v in m.external.items()},
            }
            for m in e.methods
        ],
        "comparisons": [
            {
                "model": label,
                "reference": e.reference,
                "difference": d.value,
                "low": d.low,
                "high": d.high,
                "p": d.p,
                "how": d.how,
                "verdict": d.verdict(),
            }
            for label, d in e.comparisons.items()
        ],
        "images": dict(result.sites),
        "notes": list(result.notes),
    }


def _labels(models: Sequence[TrainedModel]) -> list[str]:
    """Return a label for each model, different for each."""
    found = [model.method for model in models]
    if len(set(found)) < len(found):
        found = [f"{model.origin.resolve().name}/{model.method}" for model in models]
    if len(set(found)) < len(found):
        found = [f"{label} ({i})" for i, label in enumerate(found, 1)]
    return found


def _place(member: Member, model: TrainedModel) -> tuple[int, Fold | None]:
    """Return the seed and the fold of a member, from the name of its method run; the plan's seed for a bundle."""
    if model.data is None:
        return model.plan.seed, None
    seed, _, fold = member.name.removeprefix(f"{model.method}-seed").partition("-fold")
    if fold:
        raise NotEvaluated(
            f"{model.origin}: its models are of cross-validation folds, each with other test data. Their scores are in "
            f"the report; evaluate them on other data"
        )
    return int(seed), None


def _method(model: TrainedModel, member: Member) -> tuple[Method[Any], Any, Mapping[str, Trees]]:
    """Return the method of a member, the state of its server, and the states of sites."""
    folder = model.origin / "arms" / member.name
    kept = next((f for name in ("best", "checkpoint") if (f := folder / f"{name}.safetensors").is_file()), None)
    if kept is None:
        frozen = Frozen(member.task)
        return Evaluated(frozen, member.task), frozen.init(member.params), {}
    method = model.plan.build_method()
    checkpoint: Checkpoint = states.load(kept)
    return method, checkpoint.state, checkpoint.memory


def _scaled(source: Source, member: Member) -> Source:
    """Return a table that is filled and scaled with the statistics of a model's training; other sources as they are."""
    if not isinstance(source, FeatureTable) or source.statistics == "declared" or member.statistics is None:
        return source
    return replace(source, statistics="declared", declared=str(member.statistics.resolve()), fill="mean")


def _tested(roles: Mapping[str, Dataset], everything: bool) -> Dataset | None:
    if not everything:
        return roles.get("test")
    parts = [roles[role] for role in ("train", "val", "test") if len(roles.get(role, ()))]
    return concat(parts) if parts else None


def _require_fit(model: TrainedModel, data: Federated, source: Source, own: bool) -> None:
    """Require that the images and classes of ``data`` are those the model was trained for.

    Raises:
        NotEvaluated: If they are not. The message says what differs.
    """
    problems = []
    if tuple(data.shape) != tuple(model.plan.inputs):
        wanted, given = (" x ".join(map(str, shape)) for shape in (model.plan.inputs, data.shape))
        problems.append(f"takes images of {wanted}, and after the study's steps they are {given}")
    if data.info.task != model.plan.kind:
        problems.append(f"predicts {model.plan.kind}, and the data are for {data.info.task}")
    elif tuple(data.info.classes) != tuple(model.classes) and model.plan.kind != "regression":
        problems.append(f"predicts {', '.join(model.classes)}, and the data have {', '.join(data.info.classes)}")
    if isinstance(source, FittedSource) and not own and getattr(source, "statistics", "") != "declared":
        problems.append(
            "was trained on rows that were scaled with other statistics: give those of its study with "
            'statistics = "declared"'
        )
    if problems:
        raise NotEvaluated("\n".join(f"{model.origin} {problem}" for problem in problems))


def _require_paired(found: Mapping[tuple[str, int], Any], labels: Sequence[str]) -> None:
    """Require that compared models have the same seeds."""
    seeds = {label: [seed for name, seed in found if name == label] for label in labels}
    if len({tuple(s) for s in seeds.values()}) > 1:
        counts = ", ".join(f"{label} {len(s)}" for label, s in seeds.items())
        raise NotEvaluated(f"compared models need the same number of seeds ({counts}): choose with --seed")


def _info(study: Study, model: TrainedModel, labels: Sequence[str], data: Federated, seeds: Sequence[int]) -> RunInfo:
    """Return the description of the evaluation in the form of a run's."""
    metric = model.data.metric if model.data is not None else study.metric
    higher = model.data.higher_is_better if model.data is not None else study.higher_is_better
    return RunInfo(
        name=study.name,
        task=study.task.kind,
        classes=tuple(data.info.classes),
        metric=metric,
        higher_is_better=higher,
        data=DataInfo(title=data.info.title),
        sites=tuple(
            SiteInfo(name=site, role="external" if site in data.external else "training") for site in data.sites
        ),
        methods=tuple(MethodInfo(label=label) for label in labels),
        seeds=tuple(dict.fromkeys(seeds)),
    )


def _predictions(outputs: Tree, task: str) -> Predictions:
    return predictions_of({name: leaf.numpy() for name, leaf in outputs.items()}, task)
