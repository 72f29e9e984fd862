"""A study from Python: from data sets and a network in memory to a report.

The study is the same value as one from a file, and runs through the same checks, records and report. Its network, loss,
metrics, augmentations and data have names that begin with ``local:`` and contain a hash of their source, so that a
changed network is another study. Such a study cannot run between hospitals: publish the parts as a package first
(``polyclinic new --plugin``).
"""

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from polyclinic.core import extensions, toml_text
from polyclinic.data.source import Task as Kind
from polyclinic.data.sources.datasets import Datasets, MapStyle
from polyclinic.errors import ConfigError, RunError
from polyclinic.evaluation.records.method_runs import arm_name
from polyclinic.evaluation.records.run_reader import read_run
from polyclinic.evaluation.run_evaluation import Evaluation, evaluate
from polyclinic.learning.networks.adapters import merge_adapters
from polyclinic.learning.networks.architectures import Architecture
from polyclinic.learning.networks.model_tree import load, params_of
from polyclinic.learning.tasks.own_metrics import Function, OwnMetric
from polyclinic.studies.config.study_config import Study, parse
from polyclinic.studies.run.events import Event
from polyclinic.studies.run.run_directory import read_plan, read_tensors
from polyclinic.studies.run.scheduler import run as run_study

Build = Callable[..., nn.Module]
Loss = Callable[[Tensor, Tensor], Tensor]


def network(build: Build, *, head: str | Sequence[str] = (), encoder: str | Sequence[str] = (), name: str = "") -> str:
    """Make a network of your own available to studies, and return its name.

    Args:
        build: A class or function that returns a module: with the arguments ``(inputs, outputs)``, the shape of an
            example and the number of outputs, or without arguments.
        head: The beginnings of the names of the last layers' tensors, such as ``"fc."``; found by rule if empty.
        encoder: Those of the layers before the representation; found by rule if empty.
        name: The name; by default that of ``build``.

    Raises:
        ConfigError: If no tensor of the network, where it can be built without arguments, has such a name.
    """
    heads, encoders = _words(head), _words(encoder)
    plain = not _takes_shapes(build)
    if plain:
        names = list(params_of(build()))
        for what, prefixes in (("head", heads), ("encoder", encoders)):
            if missing := [prefix for prefix in prefixes if not any(one.startswith(prefix) for one in names)]:
                tops = ", ".join(dict.fromkeys(one.split(".")[0] + "." for one in names))
                raise ConfigError(f"{what} = {missing[0]!r}: no tensor's name begins so. They begin with {tops}")

    def made(inputs: tuple[int, ...], outputs: int, **options: Any) -> nn.Module:
        return build() if plain else build(inputs, outputs, **options)

    called = _called(build, name, "network")
    architecture = Architecture(made, summary="of this program", head=heads, encoder=encoders)
    return _registered("networks", f"{called}-{_source_hash(build)}", architecture)


def loss(function: Loss, name: str = "") -> str:
    """Make a loss of your own available to studies, and return its name.

    Args:
        function: A function of predictions [b, ...] and targets [b, ...] that returns the mean over the examples.
        name: The name; by default that of ``function``.
    """
    return _registered("losses", f"{_called(function, name, 'loss')}-{_source_hash(function)}", function)


def metric(
    function: Function, *, name: str = "", label: str = "", higher_is_better: bool = True, unit: str = ""
) -> str:
    """Make a metric of your own available to studies, and return its name.

    Args:
        function: A function of predictions and targets, NumPy arrays, that returns one number; ``OwnMetric`` describes
            the arguments. NaN means that they do not determine it.
        name: The name; by default that of ``function``.
        label: The name in tables and figures; by default ``name``.
        higher_is_better: Whether higher values are better.
        unit: The unit of the value.
    """
    called = _called(function, name, "metric")
    part = OwnMetric(function, label or called, higher_is_better, unit)
    return _registered("metrics", f"{called}-{_source_hash(function)}", part)


def augmentation(function: Callable[..., Any], name: str = "") -> str:
    """Make an augmentation of your own available to studies, and return its name.

    Args:
        function: A function of an image [C, *spatial], its target (for segmentation the mask [*spatial]) and a
            ``torch.Generator``, from which alone it draws random numbers. It returns image and target.
        name: The name; by default that of ``function``.
    """
    return _registered("augmentations", f"{_called(function, name, 'augmentation')}-{_source_hash(function)}", function)


def training(function: Callable[..., Any], name: str = "") -> str:
    """Make a training loop of your own available to studies, and return its name, for ``training={"loop": ...}``.

    Args:
        function: A function of a module, a map-style data set with items (input, target), the round from 0, and a
            ``torch.Generator``. It trains the module in place.
        name: The name; by default that of ``function``.
    """
    return _registered("trainings", f"{_called(function, name, 'training')}-{_source_hash(function)}", function)


def experiment(
    name: str,
    sites: Mapping[str, MapStyle],
    *,
    patients: Mapping[str, Sequence[Any]] | None,
    network: str,
    methods: Sequence[str | Mapping[str, Any]] = ("local", "fedavg"),
    rounds: int = 10,
    seeds: int | Sequence[int] = 1,
    kind: Kind | None = None,
    classes: Sequence[str] = (),
    keys: tuple[str, str] | None = None,
    loss: str | None = None,
    metrics: Sequence[str] = (),
    task: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    augmentation: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    engine: Mapping[str, Any] | None = None,
    out: str | Path = "runs",
    progress: bool | Callable[[Event], None] = False,
) -> "Result":
    """Run a study of data sets in memory, or continue it where it stopped, and return its result.

    Args:
        name: The name of the study: small letters, digits and hyphens.
        sites: A map-style data set for each site, with items (input, target) or mappings, as MONAI's.
        patients: The patient of each item, by site, so that no patient is in training and in test; None states that
            every item is another patient's.
        network: The name of a network: of the catalog, or from ``network``.
        methods: Names of methods, or tables as in a study file.
        rounds: The number of rounds.
        seeds: The seeds, or how many.
        kind: What the targets are; by default determined from the first ones.
        classes: Names of the classes.
        keys: The keys of input and target in items that are mappings.
        loss: The name from ``loss``; by default the task's.
        metrics: Names from ``metric``, of metrics that are computed in addition to those of the task.
        task: Further keys of ``[task]``, such as ``weights``, ``lora`` and ``train``.
        training: Keys of ``[training]``.
        augmentation: Keys of ``[augmentation]``; names from ``augmentation`` are under ``own``.
        data: Further keys of ``[data]``, such as ``external`` and ``split``.
        evaluation: Keys of ``[evaluation]``, such as ``metric``, which selects the round and comes first in the report.
        engine: Keys of ``[engine]``; by default the sites run in this process.
        out: The folder of run folders.
        progress: Whether to show the progress of the run, or a function that is called with each of its events.

    Raises:
        BadStudy: If the study is not valid. The message lists every problem.
        DataError: If the data cannot be used. The message lists every problem.
    """
    source = Datasets(name, sites, patients, kind, classes, keys)
    called = _registered("sources", f"{name}-{source.fingerprint[:12]}", source)
    own = {"loss": loss} if loss else {}
    table = {
        "name": name,
        "rounds": rounds,
        "seeds": list(range(seeds)) if isinstance(seeds, int) else list(seeds),
        "data": {"kind": called, "min_patients": 2, **(data or {})},
        "task": {
            "kind": source.task,
            "network": network,
            **own,
            **(task or {}),
        },
        "training": dict(training or {}),
        **({"augmentation": dict(augmentation)} if augmentation else {}),
        **({"evaluation": judged} if (judged := _evaluation(metrics, evaluation)) else {}),
        "engine": {"kind": "in-process", **(engine or {})},
        "methods": [{"name": item} if isinstance(item, str) else dict(item) for item in methods],
    }
    text = toml_text.dumps(json.loads(json.dumps(table)))
    study = parse(text, f"{name} (from Python)")
    folder = Path(out) / f"{name}-{study.hash[:8]}"
    with _shown_by(progress, study) as show:
        for event in run_study(study, text, folder, resume=(folder / "run.json").exists()):
            show(event)
    return Result(folder)


@dataclass(frozen=True)
class Result:
    """The result of a study in its run folder.

    Attributes:
        folder: The run folder, which all commands of ``polyclinic`` take.
    """

    folder: Path

    @property
    def evaluation(self) -> Evaluation:
        """The evaluation on test data, as reported."""
        return evaluate(read_run(self.folder))

    def compare(self) -> "ResultTable":
        """Return the methods' results, means over the training sites: a row for each method."""
        found = self.evaluation
        rows = []
        for method in found.methods:
            mean, worst = method.macro, method.worst
            row: dict[str, Any] = {
                "method": method.label,
                found.metric.name: mean.value,
                "low": mean.low,
                "high": mean.high,
            }
            rows.append(row | ({"worst_site": worst[0], "worst": worst[1]} if worst else {}))
        return ResultTable(tuple(rows))

    def sites(self) -> "ResultTable":
        """Return the methods' results at every site: a row for each method, site and metric, with the interval."""
        rows = [
            {"method": method.label, "site": site, "metric": name, "value": e.value, "low": e.low, "high": e.high}
            for method in self.evaluation.methods
            for site, found in method.sites.items()
            for name, e in found.items()
            if e.value is not None
        ]
        return ResultTable(tuple(rows))

    def curves(self) -> "ResultTable":
        """Return the scores on validation data: a row for each method, seed, round and site."""
        return ResultTable(
            tuple(
                {"method": s.method, "seed": s.seed, "round": s.round, "site": s.site, **s.metrics}
                for s in read_run(self.folder).curves
            )
        )

    def report(self, out: str | Path | None = None) -> Path:
        """Write the report into the folder ``out``, by default within the run folder, and return its page."""
        from polyclinic.report.report_builder import build_report

        return build_report(self.folder, out)

    def model(self, method: str = "", seed: int | None = None) -> nn.Module:
        """Return the tested model of a method as a module in evaluation mode, with adapters merged.

        Args:
            method: Its label; by default the report's main method.
            seed: The seed; by default the first.

        Raises:
            RunError: If there is no such model, or the method keeps parts of it at the sites.
        """
        run = read_run(self.folder)
        label = method or self.evaluation.headline or ""
        seeds = run.info.seeds
        file = self.folder / "arms" / arm_name(label, seeds[0] if seed is None else seed) / "model.safetensors"
        if not file.is_file():
            raise RunError(f"{file}: no such model. The methods are {', '.join(m.label for m in run.info.methods)}")
        plan = read_plan(file)
        module = (plan.build_method().prediction_task or plan.build_task()).model()
        leaves = read_tensors(file)
        if kept := sorted(params_of(module).keys() - leaves.keys()):
            raise RunError(
                f"{label} keeps {', '.join(kept[:3])}{' and others' if len(kept) > 3 else ''} at each site, so that "
                "there is no one model: choose another method"
            )
        return merge_adapters(load(module, leaves)).eval()


@dataclass(frozen=True)
class ResultTable:
    """A table of results, for notebooks, as text and as rows.

    Attributes:
        rows: Mappings from column to value.
    """

    rows: tuple[Mapping[str, Any], ...]

    def frame(self) -> Any:
        """Return the table as a pandas data frame.

        Raises:
            RunError: If pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise RunError("a data frame needs pandas, which is not installed: pip install pandas") from error
        return pd.DataFrame(self.rows)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        lines = [self._columns, *([_shown(row.get(key)) for key in self._columns] for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self._columns))]
        return "\n".join(
            "  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines
        )

    def _repr_html_(self) -> str:
        """Return the table for a notebook."""
        head = "".join(f"<th>{escape(key)}</th>" for key in self._columns)
        cells = ("".join(f"<td>{escape(_shown(row.get(key)))}</td>" for key in self._columns) for row in self.rows)
        return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in cells)}</table>"

    @property
    def _columns(self) -> list[str]:
        return list(dict.fromkeys(key for row in self.rows for key in row))


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def _called(part: Any, name: str, usual: str) -> str:
    return name or str(getattr(part, "__name__", usual)).strip("<>").lower()


def _evaluation(metrics: Sequence[str], evaluation: Mapping[str, Any] | None) -> dict[str, Any]:
    given = dict(evaluation or {})
    own = [*metrics, *given.get("metrics", ())]
    return given | ({"metrics": own} if own else {})


@contextmanager
def _shown_by(progress: bool | Callable[[Event], None], study: Study) -> Iterator[Callable[[Event], None]]:
    """Give the function that shows the events of a run."""
    if progress is not True:
        yield progress or (lambda event: None)
        return
    from rich.console import Console

    from polyclinic.cli.progress import Display

    with Display(Console(), study) as display:
        yield display.show


def _words(given: str | Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _takes_shapes(build: Build) -> bool:
    """Return whether ``build`` needs the arguments (inputs, outputs)."""
    required = [p for p in inspect.signature(build).parameters.values() if p.default is p.empty and p.kind in (0, 1)]
    if len(required) not in (0, 2):
        raise ConfigError(
            f"{getattr(build, '__name__', build)} needs {len(required)} arguments: give a function of (inputs, "
            "outputs), or one without arguments, such as lambda: MyNet(1, 3)"
        )
    return bool(required)


def _registered(group: str, name: str, part: Any) -> str:
    """Register ``part``; the same source again is the same part."""
    if (known := extensions.LOCAL + name) in extensions.names(group):
        return known
    return extensions.register(group, name, part)


def _source_hash(part: Any) -> str:
    """Return eight digits that identify the source of ``part``, or the tensors of the network that it builds."""
    try:
        text = inspect.getsource(part)
        module = inspect.getmodule(part)
        whole = inspect.getsource(module) if module is not None and hasattr(module, "__file__") else ""
        return hashlib.sha256((text + whole).encode()).hexdigest()[:8]
    except (OSError, TypeError):
        code = getattr(part, "__code__", None)
        known = (code.co_code, code.co_consts, code.co_names) if code is not None else repr(part)
        return hashlib.sha256(repr(known).encode()).hexdigest()[:8]
