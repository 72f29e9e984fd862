"""The study file: data, task, methods, seeds and budget, everything a result depends on, as a value.

A study is read from TOML, checked whole, and hashed before anything runs. It holds names from our tables and numbers;
never code and never a path to import.
"""

import hashlib
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from polyclinic.data.federation import DataSpec
from polyclinic.methods import registry as methods
from polyclinic.studies.problems import BadStudy, Problem, sentence
from polyclinic.transforms import table as transforms

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TaskSpec(_Spec):
    """What is learned. ``network`` is one of ``polyclinic networks``; ``options`` are its own."""

    kind: Literal["classification", "multilabel", "segmentation", "regression", "reconstruction"] = "classification"
    network: str = "cnn"
    options: dict[str, Any] = {}
    class_weights: tuple[Positive, ...] | None = None
    label_smoothing: Share | None = None
    centre: float | None = None
    spread: Positive | None = None
    spacing_mm: tuple[Positive, ...] | None = None
    tolerance_mm: Positive | None = None
    window: tuple[int, ...] | None = None
    residual: bool | None = None

    @model_validator(mode="after")
    def _known(self) -> "TaskSpec":
        from polyclinic.studies.problems import nearest
        from polyclinic.tasks.networks import ARCHITECTURES

        if self.network not in ARCHITECTURES:
            raise ValueError(f'no network is called "{self.network}".{nearest(self.network, ARCHITECTURES)}')
        allowed = {
            "classification": {"class_weights", "label_smoothing"},
            "multilabel": set[str](),
            "segmentation": {"spacing_mm", "tolerance_mm", "window"},
            "regression": {"centre", "spread"},
            "reconstruction": {"residual"},
        }[self.kind]
        if wrong := self.settings.keys() - allowed:
            raise ValueError(f"{sorted(wrong)[0]} is not for {self.kind}")
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """What is set of the task's own options."""
        return self.model_dump(exclude={"kind", "network", "options"}, exclude_none=True)


class PrivateSpec(_Spec):
    """Differentially private training (``tasks/dpsgd.py``): noise, the bound on one unit's gradient, and the unit."""

    noise: Positive
    bound: Positive = 1.0
    unit: Literal["record", "patient"] = "patient"
    chunk: Annotated[int, Field(ge=1)] | None = None


class PrivacySpec(_Spec):
    """The budget that a site may spend in one arm. Methods that add no noise have none, and the report says so."""

    epsilon: Positive
    delta: Annotated[float, Field(gt=0, lt=1)]
    unit: Literal["record", "patient", "site"] = "patient"


class TrainingSpec(_Spec):
    """How a site trains in a round."""

    epochs: Annotated[int, Field(ge=1)] = 1
    steps: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 16
    optimiser: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: Positive = 0.05
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    warm_up: Annotated[int, Field(ge=0)] = 0
    cosine: Annotated[int, Field(ge=1)] | None = None
    clip_norm: Positive | None = None
    amp: bool = False
    private: PrivateSpec | None = None


class MethodSpec(_Spec):
    """A method by name, with its options; ``send`` lists what its replies pass through; ``training`` what differs."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    name: str
    label: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.+-]{0,40}$")] = ""
    send: tuple[dict[str, Any], ...] = ()
    training: dict[str, Any] = {}

    @property
    def options(self) -> dict[str, Any]:
        """What the study sets for the method."""
        return dict(self.model_extra or {})

    @property
    def called(self) -> str:
        """The label, or the name where there is none."""
        return self.label or self.name


class EvaluationSpec(_Spec):
    """How models are judged: every ``every`` rounds on validation data, and once on the test data.

    ``metric`` decides which round's model is tested, by its mean over sites (``select = "best"``); or the last is.
    """

    metric: (
        Literal["auc", "accuracy", "balanced_accuracy", "loss", "dice", "mae", "rmse", "r2", "psnr", "ssim", "nmse"]
        | None
    ) = None
    every: Annotated[int, Field(ge=1)] = 1
    select: Literal["best", "last"] = "best"


class EngineSpec(_Spec):
    """Where sites run. It changes no bit of a result, and is no part of a study's hash."""

    kind: Literal["workers", "in-process"] = "workers"
    workers: Annotated[int, Field(ge=1, le=256)] | None = None
    device: str = "cpu"


class Study(_Spec):
    """A study, whole."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
    title: str = ""
    rounds: Annotated[int, Field(ge=1)]
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    cohort: Annotated[int, Field(ge=1)] | None = None
    min_replies: Annotated[int, Field(ge=1)] = 1
    deadline: Positive | None = None
    data: DataSpec
    task: TaskSpec = TaskSpec()
    training: TrainingSpec = TrainingSpec()
    methods: Annotated[tuple[MethodSpec, ...], Field(min_length=1)]
    evaluation: EvaluationSpec = EvaluationSpec()
    privacy: PrivacySpec | None = None
    engine: EngineSpec = EngineSpec()

    @property
    def metric(self) -> str:
        """The score that decides, and that the report shows first."""
        usual = {"segmentation": "dice", "regression": "mae", "reconstruction": "psnr"}
        return self.evaluation.metric or usual.get(self.task.kind, "auc")

    @property
    def higher_is_better(self) -> bool:
        """Whether more of the metric is better."""
        return self.metric not in ("loss", "mae", "rmse", "nmse")

    @property
    def hash(self) -> str:
        """SHA-256 of everything that a result depends on."""
        value = self.model_dump(mode="json", exclude={"engine", "title"})
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

    def training_of(self, method: MethodSpec) -> dict[str, Any]:
        """The fields of ``Local`` for one method."""
        return {**self.training.model_dump(exclude_none=True), **method.training}


def read(path: Path, changes: Mapping[str, Any] | None = None) -> Study:
    """The study in the file at ``path``, with ``changes`` by dotted key, such as ``{"training.lr": 0.01}``.

    Raises:
        BadStudy: Lists every problem, each with its line, what is wrong and what to do.
        FileNotFoundError: Where there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such study file. `polyclinic new {path.name}` writes one")
    text = path.read_text(encoding="utf-8")
    return parse(text, path, changes)


def parse(text: str, path: Path | str = "study.toml", changes: Mapping[str, Any] | None = None) -> Study:
    """The study in ``text``; ``path`` is its name in messages."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadStudy(path, text, {}, [Problem((), f"this is not TOML: {error}")]) from None
    for key, value in (changes or {}).items():
        _set(data, key.split("."), value)
    study, problems = _validated(Study, data, ())
    items = data.get("methods")
    for i, item in enumerate(items if isinstance(items, list) else []):
        if isinstance(item, dict) and isinstance(item.get("name"), str):
            problems += _method_problems(item, ("methods", i))
    if isinstance(study, Study) and not problems:
        problems += _together(study)
    if problems or not isinstance(study, Study):
        raise BadStudy(path, text, data, problems)
    return study


def _validated(model: type[BaseModel], data: Any, at: tuple[str | int, ...]) -> tuple[BaseModel | None, list[Problem]]:
    """``data`` as a ``model``, or what is wrong with it. JSON's rules make lists tuples and nothing else anything."""
    try:
        return model.model_validate_json(json.dumps(data, default=str)), []
    except ValidationError as error:
        found = error.errors(include_url=False)
        return None, [Problem((*at, *_clean(e["loc"])), sentence(e, _known_at(model, e["loc"]))) for e in found]


def _clean(loc: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """A place without the names that pydantic gives to the members of a union."""
    return tuple(part for part in loc if isinstance(part, int) or part.replace("_", "").replace("-", "").isalnum())


def _known_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """The keys that are allowed in the table where an error lies."""
    here: Any = model
    for part in loc[:-1]:
        if isinstance(part, int):
            continue
        field = here.model_fields.get(part) if hasattr(here, "model_fields") else None
        if field is None:
            return []
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        here = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
        if here is None:
            return []
    return [f.alias or name for name, f in here.model_fields.items()]


def _method_problems(item: dict[str, Any], at: tuple[str | int, ...]) -> list[Problem]:
    """What is wrong with one ``[[methods]]``: its name, its options, its transforms, its training."""
    try:
        entry = methods.entry(item["name"])
    except methods.UnknownMethod as error:
        return [Problem((*at, "name"), str(error))]
    fixed = {"name", "label", "send", "training"}
    fields = {key: (p.annotation, p.default) for key, p in methods.options(entry).items()}
    problems = _options(item["name"], fields, {k: v for k, v in item.items() if k not in fixed}, at)
    if isinstance(training := item.get("training", {}), dict):
        problems += _validated(TrainingSpec, training, (*at, "training"))[1]
    send = item.get("send", [])
    for i, transform in enumerate(send if isinstance(send, list) else []):
        place = (*at, "send", i)
        if not isinstance(transform, dict) or not isinstance(transform.get("name"), str):
            problems.append(Problem(place, 'each transform is a table with a name, as in {name = "clip", bound = 1.0}'))
            continue
        try:
            known = transforms.options(transforms.entry(transform["name"]))
        except ValueError as error:
            problems.append(Problem((*place, "name"), str(error)))
            continue
        kinds = transforms.types(transforms.entry(transform["name"]))
        fields = {key: (kinds[key], transforms.default(f)) for key, f in known.items()}
        problems += _options(transform["name"], fields, {k: v for k, v in transform.items() if k != "name"}, place)
    return problems


def _options(name: str, fields: Mapping[str, Any], given: dict[str, Any], at: tuple[str | int, ...]) -> list[Problem]:
    model: type[BaseModel] = create_model(name, __base__=_Spec, **dict(fields))
    return _validated(model, given, at)[1]


def _together(study: Study) -> list[Problem]:
    """What is wrong between parts that are each right."""
    problems = []
    labels = [method.called for method in study.methods]
    for i, label in enumerate(labels):
        if label in labels[:i]:
            problems.append(Problem(("methods", i), f'two methods are called "{label}"; give one of them a label'))
    for i, method in enumerate(study.methods):
        entry = methods.entry(method.name)
        if entry.tasks and study.task.kind not in entry.tasks:
            says = f"{method.name} is for {' and '.join(entry.tasks)}, not for {study.task.kind}"
            problems.append(Problem(("methods", i, "name"), says))
    if len(set(study.seeds)) != len(study.seeds):
        problems.append(Problem(("seeds",), "the same seed twice would count one result twice"))
    return problems


def _set(data: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        data = data[int(part)] if isinstance(data, list) else data.setdefault(part, {})
    data[path[-1]] = value
