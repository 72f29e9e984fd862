"""Metrics of installed packages, or of the program that runs the study."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyclinic.core import extensions
from polyclinic.errors import ConfigError

NAME = re.compile(r"[a-z0-9][a-z0-9:._]*-[a-z0-9:._-]+")
Function = Callable[[NDArray[Any], NDArray[Any]], float]


@dataclass(frozen=True)
class OwnMetric:
    """A metric that a package provides as an entry point of ``polyclinic.metrics``.

    Attributes:
        function: A function of predictions and targets, NumPy arrays, that returns one number; NaN if they do not
            determine it. Classification, several labels and regression give it all examples of a site at once:
            probabilities or values [n, outputs] and targets, classes [n] or numbers [n, outputs]. Segmentation gives it
            the predicted and the true mask of one class in one image, bool [*spatial], and reconstruction one image,
            [C, *spatial]; the metric is then the mean over images and classes.
        label: The name in tables and figures; by default that in studies.
        higher_is_better: Whether higher values are better.
        unit: The unit of the value; empty if it has none.
    """

    function: Function
    label: str = ""
    higher_is_better: bool = True
    unit: str = ""


def own_metric(name: str) -> OwnMetric:
    """Return the metric called ``name``.

    Raises:
        ConfigError: If there is none, or a package provides something else under this name.
    """
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"the name {name!r} of a metric must have lowercase letters and digits and at least one hyphen, such as "
            '"acme-kappa"'
        )
    found = extensions.load("metrics", name)
    if not isinstance(found, OwnMetric):
        raise ConfigError(f"the metric {name!r} of a package is a {type(found).__name__}, not an OwnMetric")
    return found


def value_of(name: str, predictions: NDArray[Any], targets: NDArray[Any]) -> float:
    """Return the value of the metric called ``name``; NaN if it is not determined.

    Raises:
        ConfigError: If its function returns anything but one number.
    """
    value = own_metric(name).function(predictions, targets)
    if np.ndim(value) != 0 or not np.issubdtype(np.asarray(value).dtype, np.number) or np.iscomplexobj(value):
        what = f"an array of shape {np.shape(value)}" if np.ndim(value) else f"a {type(value).__name__}"
        raise ConfigError(f"the metric {name!r} returned {what}: return one number")
    return float(value)
