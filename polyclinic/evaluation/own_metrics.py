"""The metrics of a run: those of its task, and those of packages that its study names."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyclinic.errors import ConfigError
from polyclinic.evaluation.metric import Kernel, Metric
from polyclinic.evaluation.metric_functions import LOG_LOSS, metrics_for, per_case
from polyclinic.evaluation.records.predictions import PER_CASE_TASKS
from polyclinic.evaluation.records.record_schema import OwnMetricInfo, RunInfo
from polyclinic.learning.tasks.own_metrics import own_metric, value_of
from polyclinic.statistics.undefined import Array


@dataclass(frozen=True)
class NotHere(Metric):
    """A metric that cannot be computed here, because no installed package provides it."""

    def why(self, target: NDArray[Any]) -> str:
        """Return the reason."""
        return f"no package that provides {self.name} is installed here"


def metrics_of(info: RunInfo) -> Mapping[str, Metric]:
    """Return the metrics of a run by name, those of packages last.

    Raises:
        ConfigError: If the primary metric is one of a package that is not installed here.
    """
    found = metrics_with(info.task, len(info.classes) or 2, info.metrics, info.ordered)
    if info.metric == LOG_LOSS.name and info.task == "classification" and not info.ordered:
        found = {**found, LOG_LOSS.name: LOG_LOSS}
    if isinstance(found.get(info.metric), NotHere):
        raise ConfigError(
            f"the metric {info.metric!r} of the run {info.name} is of a package, or a program, that is not here: "
            "install the package, or call result.report() in the program"
        )
    return found


def metrics_with(task: str, classes: int, own: Iterable[OwnMetricInfo], ordered: bool = False) -> Mapping[str, Metric]:
    """Return the metrics of a task by name, and those of packages. ``ordered``: whether the classes are grades."""
    return {**metrics_for(task, classes, ordered), **{entry.name: _metric(entry, task) for entry in own}}


@lru_cache(maxsize=256)  # one object for one metric, since estimates are kept by metric
def _metric(entry: OwnMetricInfo, task: str) -> Metric:
    def made(kind: type[Metric], kernel: Kernel) -> Metric:
        return kind(entry.name, entry.label, kernel, entry.higher_is_better, unit=entry.unit)

    if task in PER_CASE_TASKS:
        return made(Metric, per_case)
    try:
        own_metric(entry.name)
    except ConfigError:
        return made(NotHere, lambda score, target, weight: np.full(len(weight), np.nan))
    return made(Metric, _over_all(entry.name))


def _over_all(name: str) -> Kernel:
    """Return the kernel of a function of all cases, for weights of 0 and 1."""

    def kernel(score: Array, target: NDArray[Any], weight: Array) -> Array:
        return np.array([value_of(name, score[row > 0], target[row > 0]) for row in weight])

    return kernel
