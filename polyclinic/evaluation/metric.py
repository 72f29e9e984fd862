"""Interface of a metric: a weighted function of scores and targets, with its labels and its properties.

Every metric takes ``weight`` of shape [b, n]: b ways of weighting the same n cases. One row of ones gives the metric
itself; rows without one patient give the jackknife. It returns b values, and NaN for a row that leaves the metric
undefined (an AUC of one class). ``Metric.of`` raises ``Undefined`` with the reason instead of returning NaN.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from polyclinic.statistics.undefined import Array, Undefined

Kernel = Callable[[Array, NDArray[Any], Array], Array]
Proportions = list[tuple[NDArray[np.bool_], NDArray[np.bool_]]]


@dataclass(frozen=True, eq=False)
class Metric:
    """A metric with its name, label and properties.

    Attributes:
        name: Name in records.
        label: Name in tables and figures.
        kernel: (score, target, weight [b, n]) -> [b]; NaN if undefined.
        higher_is_better: None if neither direction is better (an intercept, a slope).
        needs_two_classes: Whether it is undefined if only one class is present.
        unit: Unit of the value; empty if it has none.
        scale: Scale of Student's limits: ``"logit"``, ``"log"`` or none.
        by_class: Whether it compares classes, so that each class needs patients of its own.
        proportions: For a proportion or a mean of proportions: (score, target) -> a list of (hits [n], counted cases
            [n]) as booleans, one for each proportion; None if it is something else for these targets.
        has_interval: Whether an interval is computed; not for statistics that are biased in small samples.
        by_case: Whether cases of weight 0 do not affect the value, so that it is computed for several sites at once:
            ``"always"``, for ``"two classes"``, or never. Metrics that are means of values by case need no statement.
    """

    name: str
    label: str
    kernel: Kernel
    higher_is_better: bool | None = True
    needs_two_classes: bool = False
    unit: str = ""
    scale: str = ""
    by_class: bool = False
    proportions: Callable[[Array, NDArray[Any]], Proportions | None] | None = None
    has_interval: bool = True
    by_case: Literal["always", "two classes", ""] = ""

    @property
    def sign(self) -> float:
        """The factor that makes a better value a higher one: -1 if lower is better, otherwise 1."""
        return -1.0 if self.higher_is_better is False else 1.0

    def of(self, score: Array, target: NDArray[Any]) -> float:
        """Return the unweighted value.

        Raises:
            Undefined: If the cases do not determine it.
        """
        if len(score) == 0:
            raise Undefined("no cases")
        value = float(self.kernel(score, target, np.ones((1, len(score))))[0])
        if not np.isfinite(value):
            raise Undefined(self.why(target))
        return value

    def why(self, target: NDArray[Any]) -> str:
        """Return the reason why the metric is undefined for ``target``."""
        if self.needs_two_classes and target.ndim == 1 and len(np.unique(target)) < 2:
            return f"all {len(target)} cases are of one class"
        if self.needs_two_classes and target.ndim == 2 and all(len(np.unique(t)) < 2 for t in target.T):
            return f"no label has both kinds among {len(target)} cases"
        return f"not determined by these {len(target)} cases"
