"""The study file as a value: data, task, methods, seeds and budget, which determine a result.

A study is read from TOML, validated as a whole, and hashed before anything runs. It contains names from the catalogs
and numbers, never code and never import paths.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PlainValidator

from polyclinic.core.config_problems import Problem
from polyclinic.data.federation import DataSpec
from polyclinic.data.files import content_of, placed
from polyclinic.engines.plan import ways
from polyclinic.engines.policy.coverage import declared_problem
from polyclinic.errors import ConfigError, PolyclinicError
from polyclinic.learning.tasks.own_metrics import own_metric
from polyclinic.learning.weights import store
from polyclinic.methods import registry as methods
from polyclinic.studies.config.augmentation_schema import AugmentationSpec
from polyclinic.studies.config.diagnostics import BadStudy
from polyclinic.studies.config.loader import named_plan, table_of, text_of
from polyclinic.studies.config.planned_study import with_plan
from polyclinic.studies.config.schema import (
    METRICS,
    AttackSpec,
    EngineSpec,
    EvaluationSpec,
    MachinesSpec,
    MethodSpec,
    Positive,
    PrivacySpec,
    Table,
    TaskSpec,
    TrainingSpec,
    with_recipe,
)
from polyclinic.studies.config.search_space import NotChosen, SearchSpec, changed, count, extremes
from polyclinic.studies.config.validation import attack_problems, method_problems, validated

PROPORTIONS = ("auc", "accuracy", "balanced_accuracy", "dice", "ssim", "c_index", "uno_c", "ibs")
"""Metrics between 0 and 1."""


def _folds(value: Any) -> int | Literal["sites"] | None:
    if value is None or value == "sites" or (type(value) is int and 2 <= value <= 50):
        return value  # type: ignore[no-any-return]
    raise ConfigError('must be a whole number from 2 to 50, or "sites" to leave one site out after the other')


class Study(Table):
    """A study.

    ``folds`` cross-validates: every patient of every site is tested once for each seed, by a model that never saw
    that patient; or, with ``"sites"``, by a model that never saw the patient's site.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
    """The name of the study, part of the name of its run folder."""
    title: str = ""
    """The title of the report."""
    rounds: Annotated[int, Field(ge=1)]
    """The number of rounds."""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    """One run of each method per seed; a seed sets the split, the initial weights and the order of batches."""
    folds: Annotated[Any, PlainValidator(_folds)] = None
    """The number of cross-validation folds, or ``"sites"`` to leave out one site after the other."""
    sites_per_round: Annotated[int, Field(ge=1)] | None = None
    """The number of sites drawn for each round; all of them by default."""
    min_replies: Annotated[int, Field(ge=1)] = 1
    """The fewest replies with which a round counts."""
    deadline: Positive | None = None
    """Seconds after which the round ends without the missing sites."""
    data: DataSpec
    task: TaskSpec = TaskSpec()
    training: TrainingSpec = TrainingSpec()
    augmentation: AugmentationSpec | None = None
    methods: Annotated[tuple[MethodSpec, ...], Field(min_length=1)]
    evaluation: EvaluationSpec = EvaluationSpec()
    search: SearchSpec | None = None
    privacy: PrivacySpec | None = None
    machines: MachinesSpec | None = None
    attack: AttackSpec | None = None
    engine: EngineSpec = EngineSpec()

    UNSET: ClassVar[frozenset[str]] = frozenset({"augmentation"})

    @property
    def metric(self) -> str:
        """The score that decides, and that the report shows first."""
        usual = {"segmentation": "dice", "regression": "mae", "survival": "c_index", "reconstruction": "psnr"}
        return self.evaluation.metric or usual.get(self.task.kind, "quadratic_kappa" if self.task.ordered else "auc")

    @property
    def simulates(self) -> bool:
        """Whether machines or an attack are simulated."""
        return self.machines is not None or self.attack is not None

    @property
    def higher_is_better(self) -> bool:
        """Whether more of the metric is better."""
        if self.metric in self.evaluation.own_metrics:
            return own_metric(self.metric).higher_is_better
        return self.metric not in ("loss", "mae", "rmse", "nmse", "ibs", "grade_error")

    @property
    def hash(self) -> str:
        """SHA-256 of everything that a result depends on; of a plan, its content."""
        unset = {key for key in ("folds", "search", "machines", "attack") if getattr(self, key) is None}
        value = self.model_dump(mode="json", exclude={"engine", "title"} | unset)
        for key in self.evaluation.unset:
            del value["evaluation"][key]
        for method in value["methods"]:
            if not method["downlink"]:
                del method["downlink"]  # studies of before have the hash they had
        if self.data.plan is not None:
            value["data"]["plan"] = content_of(placed(self.data.plan, "plan"))
        for key in ("weights", "lora", "train", *(["loss"] if self.task.loss is None else [])):
            del value["task"][key]
        value["task"] |= {"tuning": self.task.tuning} if self.task.tuning else {}
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

    @property
    def task_options(self) -> dict[str, Any]:
        """The options of the task that the study sets, with those under ``[evaluation]``."""
        own = {"metrics": list(self.evaluation.own_metrics)} if self.evaluation.own_metrics else {}
        return {**self.task.settings, **self.evaluation.task_options, **own}

    @property
    def own_augmentations(self) -> tuple[str, ...]:
        """The augmentations of packages that the study or one of its methods names."""
        tables = (self.augmentation, *(method.augmentation for method in self.methods))
        return tuple(dict.fromkeys(name for table in tables if table is not None for name in table.own or ()))

    def training_of(self, method: MethodSpec) -> dict[str, Any]:
        """The fields of ``LocalTraining`` for one method, with ``private`` and ``augmentation`` as tables."""
        found = {**self.training.model_dump(exclude_none=True), **method.training}
        found.pop("recipe", None)
        if found.get("schedule"):
            found["schedule_rounds"] = self.rounds
        if (changes := method.augmentation or self.augmentation) is not None and (table := changes.expanded()):
            found["augmentation"] = table
        return found


def read(path: Path, changes: Mapping[str, Any] | None = None) -> Study:
    """Read the study in the file at ``path``, with ``changes`` by dotted key, such as ``{"training.lr": 0.01}``.

    Raises:
        BadStudy: If it is invalid. The message lists every problem with its line and the correction.
        ConfigError: If the file does not exist or cannot be read.
    """
    return parse(text_of(path), path, changes)


def parse(
    text: str, path: Path | str = "study.toml", changes: Mapping[str, Any] | None = None, covered: bool = True
) -> Study:
    """Parse the study in ``text``; ``path`` is its name in messages.

    Args:
        covered: Whether to refuse methods whose noise does not cover all that sites release. Their audit does not.
    """
    data = table_of(text, path, changes)
    if "scenarios" in data:
        says = "this file holds several studies, and one is wanted here: take the study.toml of a scenario's run folder"
        raise BadStudy(path, text, data, [Problem(("scenarios",), says)])
    study, problems = checked(data, covered)
    if problems or study is None:
        raise BadStudy(path, text, data, problems)
    return study


def checked(data: Mapping[str, Any], covered: bool = True) -> tuple[Study | None, list[Problem]]:
    """Validate ``data``; return the study, or None and every problem. ``covered`` is that of ``parse``.

    The settings of ``training.recipe`` and of a plan are added to those of ``data``.
    """
    recipe, plan = list[Problem](), list[Problem]()
    if isinstance(training := data.get("training"), Mapping) and training.get("recipe") == "nnunet":
        try:
            data = with_recipe(data)
        except ConfigError as error:
            recipe.append(Problem(("training", "recipe"), str(error)))
    if named_plan(data) is not None:
        data, plan = with_plan(data)
    study, problems = validated(Study, data, ())
    problems = [*recipe, *plan, *problems]
    if isinstance(study, Study) and study.task.weights is not None:
        study, unknown = with_weights(study)
        problems += unknown
    items = data.get("methods")
    for i, item in enumerate(items if isinstance(items, list) else []):
        if isinstance(item, dict) and isinstance(item.get("name"), str):
            problems += method_problems(item, ("methods", i))
    if isinstance(attack := data.get("attack"), dict) and isinstance(attack.get("name"), str):
        problems += attack_problems(attack, ("attack",))
    if not isinstance(study, Study) or problems:
        return None, problems
    problems += [*_together(study), *(_uncovered(study) if covered else ())]
    return (None if problems else study), problems


def with_weights(study: Study) -> tuple[Study, list[Problem]]:
    """Return ``study`` with the hash of its start weights, looked up in the store; and the problems of its weights."""
    weights = study.task.weights
    assert weights is not None
    try:
        found = store.find(weights.file or weights.sha256 or "")
    except PolyclinicError as error:
        return study, [Problem(("task", "weights"), str(error))]
    if weights.sha256 not in (None, found.sha256):
        says = f"{weights.file} in the store has the hash {found.sha256}, not {weights.sha256}"
        return study, [Problem(("task", "weights", "sha256"), says)]
    known = weights.model_copy(update={"sha256": found.sha256})
    return study.model_copy(update={"task": study.task.model_copy(update={"weights": known})}), []


def _together(study: Study) -> list[Problem]:
    """Return the conflicts between tables that are valid by themselves."""
    problems = list[Problem]()
    labels = [method.called for method in study.methods]
    for i, label in enumerate(labels):
        if label in labels[:i]:
            problems.append(Problem(("methods", i), f'two methods are called "{label}"; give one of them a label'))
    for i, method in enumerate(study.methods):
        entry = methods.entry(method.name)
        if entry.tasks and study.task.kind not in entry.tasks:
            says = f"{method.name} is for {' and '.join(entry.tasks)}, not for {study.task.kind}"
            problems.append(Problem(("methods", i, "name"), says))
        if entry.network and study.task.network != entry.network:
            says = f'{method.name} is for network = "{entry.network}" in [task], not for "{study.task.network}"'
            problems.append(Problem(("methods", i, "name"), says))
        if entry.stacks and study.data.options.get("patch"):
            says = f"{method.name} takes all images of a site at once, and patch in [data] leaves them on disk"
            problems.append(Problem(("methods", i, "name"), says))
    if len(set(study.seeds)) != len(study.seeds):
        problems.append(Problem(("seeds",), "the same seed twice would count one result twice"))
    for key in study.evaluation.task_options if study.task.kind != "segmentation" else ():
        problems.append(Problem(("evaluation", key), f"is for segmentation, not for {study.task.kind}"))
    problems += _selected(study)
    problems += _trained(study)
    if study.evaluation.patience is not None:
        problems += _ended_early(study)
    if study.evaluation.compare:
        problems += _compared(study)
    if study.folds is not None:
        problems += _folded(study)
    if study.search is not None:
        problems += _searched(study, study.search)
    if study.machines is not None:
        problems += _simulated(study)
    if study.engine.kind == "ray" and study.engine.parallel == "sites":
        problems += _distributed(study)
    return problems


def _selected(study: Study) -> Iterator[Problem]:
    """Yield the primary metric if the task does not have it."""
    ordered, curves = bool(study.task.ordered), study.task.hazards != "proportional"
    needs = {"loss": not ordered, "quadratic_kappa": ordered, "grade_error": ordered, "ibs": curves}
    known = [name for name in METRICS[study.task.kind] if needs.get(name, True)]
    if study.metric not in (*known, *study.evaluation.own_metrics):
        says = f"is not a metric of this task that can select the round. There are {', '.join(known)}"
        yield Problem(("evaluation", "metric"), says)


def _compared(study: Study) -> Iterator[Problem]:
    """Yield declared comparisons of unknown methods, with margins that cannot be meant, or given twice."""
    labels, seen = [method.called for method in study.methods], set[tuple[str, str, str]]()
    for i, c in enumerate(study.evaluation.compare):
        place = ("evaluation", "compare", i)
        for key in ("method", "reference"):
            if (label := getattr(c, key)) not in labels:
                says = f'no method of this study is called "{label}". There are {", ".join(labels)}'
                yield Problem((*place, key), says)
        if c.margin is not None and c.margin >= 0.5 and study.metric in PROPORTIONS:
            says = f"{study.metric} lies between 0 and 1, so a margin is a fraction, such as 0.02 for two points"
            yield Problem((*place, "margin"), says)
        if (c.method, c.reference, c.kind) in seen:
            yield Problem(place, "the same comparison twice would be corrected for twice")
        seen.add((c.method, c.reference, c.kind))


def _uncovered(study: Study) -> Iterator[Problem]:
    """Yield the methods whose noise does not cover all that sites release, so that the stated ε would be too small."""
    for i, method in enumerate(study.methods):
        asked = ways(study.training_of(method), method.uplink)
        if asked and (says := declared_problem(method.name, asked)):
            yield Problem(("methods", i, "name"), says)


def _trained(study: Study) -> Iterator[Problem]:
    """Yield the training settings that do not go together, once for each set of methods that has them."""
    told = set[str]()
    for i, method in enumerate(study.methods):
        table = study.training_of(method)
        found = list[str]()
        if table.get("nesterov") and not (table["optimizer"] == "sgd" and table["momentum"] > 0):
            found.append('nesterov is a momentum of SGD: set optimizer = "sgd" and momentum, or leave nesterov out')
        if table.get("schedule") and table.get("cosine_rounds"):
            found.append("schedule and cosine_rounds both lower the learning rate: leave one of them out")
        if table.get("power") and not table.get("schedule"):
            found.append('power is the exponent of schedule = "poly", which is not set')
        if table.get("milestone_factor") and not table.get("milestones"):
            found.append("milestone_factor needs milestones")
        if table.get("balance") and study.task.kind != "classification":
            found.append(f"balance is for classification, not for {study.task.kind}")
        if table.get("foreground") and study.task.kind != "segmentation":
            found.append(f"foreground is for segmentation, not for {study.task.kind}")
        if table.get("augmentation") and study.task.kind == "reconstruction":
            found.append("augmentation would change images, and not the measurements that they come from: leave it out")
        for says in found:
            if says not in told:
                told.add(says)
                own = says.split(" ")[0] in method.training
                yield Problem(("methods", i, "training") if own else ("training",), says)


def _ended_early(study: Study) -> Iterator[Problem]:
    """Yield conflicts between patience and the rest of the study."""
    if study.evaluation.select == "last":
        says = 'patience counts rounds since the best one: set select = "best", or leave patience out'
        yield Problem(("evaluation", "patience"), says)
    elif not any(method.name in ("local", "pooled") for method in study.methods):
        yield Problem(("evaluation", "patience"), "is for the methods local and pooled, and neither is here")


def _folded(study: Study) -> Iterator[Problem]:
    """Yield conflicts between folds and the rest of the study."""
    if study.data.split == "official":
        says = "the data's official split has one test set: leave folds out, or give split as shares"
        yield Problem(("folds",), says)
    elif study.data.split[1] == 0:
        yield Problem(("data", "split"), "folds need validation patients in addition: give validation a share above 0")
    if study.folds != "sites":
        return
    if study.data.external:
        yield Problem(("data", "external"), 'folds = "sites" holds every site out in turn: leave external out')
    for i, method in enumerate(study.methods):
        if not methods.entry(method.name).newcomers:
            says = f'{method.name} has no model for a site that was held out, so folds = "sites" cannot test it'
            yield Problem(("methods", i, "name"), says)


def _simulated(study: Study) -> Iterator[Problem]:
    """Yield conflicts between simulated machines and the rest of the study."""
    if study.sites_per_round is not None and any(method.name == "fedbuff" for method in study.methods):
        says = "fedbuff sends the next request to a site as soon as it replies: leave sites_per_round out"
        yield Problem(("sites_per_round",), says)


def _distributed(study: Study) -> Iterator[Problem]:
    """Yield what workers on other machines cannot do if they share the sites of one method run."""
    for key in ("attack", "privacy", "machines"):
        if getattr(study, key) is not None:
            says = f'a study with [{key}] distributes whole method runs: set parallel = "arms", or leave it out'
            yield Problem(("engine", "parallel"), says)


def _searched(study: Study, search: SearchSpec) -> Iterator[Problem]:
    """Yield the problems of a search: unknown labels, keys or values, and too few settings."""
    if study.privacy is not None:
        says = "trials spend privacy too, and the budget would not count them: search without [privacy]"
        yield Problem(("search",), says)
    by_label = {method.called: method for method in study.methods}
    for label in search.methods.keys() - by_label.keys():
        says = f"no method of this study is called so. There are {', '.join(by_label)}"
        yield Problem(("search", "methods", label), says)
    for key in search.space:
        if not key.startswith("training."):
            says = f"is for every method, so only training.… is allowed here; put {key} under [search.methods.LABEL]"
            yield Problem(("search", "space", key), says)
    for label, method in by_label.items():
        space = search.of(label)
        item = method.model_dump(mode="json", exclude_unset=True)
        for key, value in extremes(space):
            for problem in method_problems(changed(item, {key: value}), ()):
                where = ("search", "methods", label) if key in search.methods.get(label, {}) else ("search", "space")
                yield Problem((*where, *key.split(".")), f"{label} cannot use {json.dumps(value)}: {problem.says}")
        if (many := count(space)) is not None and many < search.trials:
            says = (
                f"{label} has {many} settings to try: every method gets the same number of trials, so give it "
                f"{search.trials} or more, or lower trials"
            )
            yield Problem(("search", "trials"), says)


def with_values(method: MethodSpec, values: Mapping[str, Any], file: Path | None = None) -> MethodSpec:
    """Return ``method`` with the values that a search chose.

    Raises:
        NotChosen: If the method cannot use the values. ``file`` contains them.
    """
    item = changed(method.model_dump(mode="json", exclude_unset=True), values)
    if problems := method_problems(item, ()):
        said = "; ".join(f"{'.'.join(map(str, p.path))}: {p.says}" for p in problems)
        raise NotChosen(f"{file or method.called}: {said}")
    return MethodSpec.model_validate_json(json.dumps(item))
