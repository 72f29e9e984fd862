"""The study file: data, task, methods, seeds and budget, everything a result depends on, as a value.

A study is read from TOML, checked whole, and hashed before anything runs. It holds names from our tables and numbers;
never code and never a path to import.
"""

import hashlib
import json
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PlainValidator, ValidationError, create_model

from polyclinic.data.federation import DataSpec
from polyclinic.methods import registry as methods
from polyclinic.studies.parts import (
    EngineSpec,
    EvaluationSpec,
    MethodSpec,
    Positive,
    PrivacySpec,
    Table,
    TaskSpec,
    TrainingSpec,
)
from polyclinic.studies.problems import BadStudy, Problem, sentence
from polyclinic.studies.search import NotChosen, SearchSpec, changed, count, extremes
from polyclinic.transforms import table as transforms


def _folds(value: Any) -> int | Literal["sites"] | None:
    if value is None or value == "sites" or (type(value) is int and 2 <= value <= 50):
        return value  # type: ignore[no-any-return]
    raise ValueError('must be a whole number from 2 to 50, or "sites" to leave one site out after the other')


class Study(Table):
    """A study, whole.

    ``folds`` cross-validates: every patient of every site is tested once for each seed, by a model that never saw
    that patient; or, with ``"sites"``, by a model that never saw the patient's site.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
    title: str = ""
    rounds: Annotated[int, Field(ge=1)]
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    folds: Annotated[Any, PlainValidator(_folds)] = None
    cohort: Annotated[int, Field(ge=1)] | None = None
    min_replies: Annotated[int, Field(ge=1)] = 1
    deadline: Positive | None = None
    data: DataSpec
    task: TaskSpec = TaskSpec()
    training: TrainingSpec = TrainingSpec()
    methods: Annotated[tuple[MethodSpec, ...], Field(min_length=1)]
    evaluation: EvaluationSpec = EvaluationSpec()
    search: SearchSpec | None = None
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
        unset = {key for key in ("folds", "search") if getattr(self, key) is None}
        value = self.model_dump(mode="json", exclude={"engine", "title"} | unset)
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
    return parse(text_of(path), path, changes)


def text_of(path: Path) -> str:
    """What is in the study file at ``path``.

    Raises:
        FileNotFoundError: Where there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such study file. `polyclinic new {path.name}` writes one")
    return path.read_text(encoding="utf-8")


def table_of(text: str, path: Path | str, changes: Mapping[str, Any] | None) -> dict[str, Any]:
    """The table in ``text``, with ``changes`` by dotted key; not yet checked.

    Raises:
        BadStudy: Where it is not TOML.
    """
    try:
        data = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise BadStudy(path, text, {}, [Problem((), f"this is not TOML: {error}")]) from None
    for key, value in (changes or {}).items():
        set_key(data, key.split("."), value)
    return data


def parse(text: str, path: Path | str = "study.toml", changes: Mapping[str, Any] | None = None) -> Study:
    """The study in ``text``; ``path`` is its name in messages."""
    data = table_of(text, path, changes)
    if "scenarios" in data:
        says = "this file holds several studies, and one is wanted here: take the study.toml of a scenario's run folder"
        raise BadStudy(path, text, data, [Problem(("scenarios",), says)])
    study, problems = checked(data)
    if problems or study is None:
        raise BadStudy(path, text, data, problems)
    return study


def checked(data: Mapping[str, Any]) -> tuple[Study | None, list[Problem]]:
    """The study that ``data`` describes, or everything that is wrong with it."""
    study, problems = _validated(Study, data, ())
    items = data.get("methods")
    for i, item in enumerate(items if isinstance(items, list) else []):
        if isinstance(item, dict) and isinstance(item.get("name"), str):
            problems += _method_problems(item, ("methods", i))
    if not isinstance(study, Study) or problems:
        return None, problems
    problems += _together(study)
    return (None if problems else study), problems


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
    model: type[BaseModel] = create_model(name, __base__=Table, **dict(fields))
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
    return [*problems, *_folded(study), *_searched(study)]


def _folded(study: Study) -> Iterator[Problem]:
    """What does not go with folds."""
    if study.folds is None:
        return
    if study.data.split == "official":
        says = "the data's official split has one test set: leave folds out, or give split as shares"
        yield Problem(("folds",), says)
    elif study.data.split[1] == 0:
        yield Problem(("data", "split"), "folds need validation patients beside them: give validation a share above 0")
    if study.folds != "sites":
        return
    if study.data.external:
        yield Problem(("data", "external"), 'folds = "sites" holds every site out in turn: leave external out')
    for i, method in enumerate(study.methods):
        if not methods.entry(method.name).newcomers:
            says = f'{method.name} has no model for a site that was held out, so folds = "sites" cannot test it'
            yield Problem(("methods", i, "name"), says)


def _searched(study: Study) -> Iterator[Problem]:
    """What is wrong with a search: unknown labels, keys or values, and budgets that differ."""
    search = study.search
    if search is None:
        return
    if study.privacy is not None:
        says = "trials spend privacy too, and the budget would not count them: search without [privacy]"
        yield Problem(("search",), says)
    by_label = {method.called: method for method in study.methods}
    for label in search.methods.keys() - by_label.keys():
        says = f"no method of this study is called so. There are {', '.join(by_label)}"
        yield Problem(("search", "methods", label), says)
    for key in search.space:
        if not key.startswith("training."):
            says = f"is for every method, so only training.… may stand here; put {key} under [search.methods.LABEL]"
            yield Problem(("search", "space", key), says)
    for label, method in by_label.items():
        space = search.of(label)
        item = method.model_dump(mode="json", exclude_defaults=True)
        for key, value in extremes(space):
            for problem in _method_problems(changed(item, {key: value}), ()):
                where = ("search", "methods", label) if key in search.methods.get(label, {}) else ("search", "space")
                yield Problem((*where, *key.split(".")), f"{label} cannot use {json.dumps(value)}: {problem.says}")
        if (many := count(space)) is not None and many < search.trials:
            says = (
                f"{label} has {many} settings to try: every method gets the same number of trials, so give it "
                f"{search.trials} or more, or lower trials"
            )
            yield Problem(("search", "trials"), says)


def with_values(method: MethodSpec, values: Mapping[str, Any], file: Path | None = None) -> MethodSpec:
    """``method`` with what a search chose.

    Raises:
        NotChosen: Where the method cannot use the values; ``file`` is where they are from.
    """
    item = changed(method.model_dump(mode="json", exclude_defaults=True), values)
    if problems := _method_problems(item, ()):
        said = "; ".join(f"{'.'.join(map(str, p.path))}: {p.says}" for p in problems)
        raise NotChosen(f"{file or method.called}: {said}")
    return MethodSpec.model_validate_json(json.dumps(item))


def set_key(data: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        data = data[int(part)] if isinstance(data, list) else data.setdefault(part, {})
    data[path[-1]] = value
