"""Decision curves: the net benefit of acting on a model's predictions, with intervals, by site.

Vickers and Elkin, "Decision Curve Analysis", Medical Decision Making 2006, https://doi.org/10.1177/0272989X06295361.
The net benefit of one patient at threshold t is 1 for a treated patient with the disease, ``−t / (1 − t)`` for one
without, and 0 if untreated. It is a mean over patients, so that its interval is Student's with the jackknife's
variance, like that of any other metric. Curves are computed for each seed's model and averaged, and are means over
sites, because the prevalence of pooled patients is that of no hospital.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyclinic.evaluation.metric import Metric
from polyclinic.evaluation.sample import Sample
from polyclinic.statistics.intervals import Estimate
from polyclinic.statistics.undefined import Array

THRESHOLDS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class NetBenefit:
    """Net benefit per patient at one threshold, mean over sites.

    Attributes:
        threshold: The threshold probability.
        model: Of treating the patients whose predicted probability is at least the threshold.
        treat_all: Of treating all patients.
        gain: Of the model, minus the better of treating all and treating none at each site.
    """

    threshold: float
    model: Estimate
    treat_all: Estimate
    gain: Estimate


def decision_curve(
    data: Sample, label: str, sites: Sequence[str], thresholds: Sequence[float] = THRESHOLDS
) -> tuple[NetBenefit, ...]:
    """Return the decision curve of ``label``, mean over ``sites``, for a task with two classes."""
    return tuple(
        NetBenefit(t, *(data.macro_estimate(label, sites, metric(t)) for metric in (of_model, of_all, gain)))
        for t in thresholds
    )


def of_model(threshold: float) -> Metric:
    """Return the net benefit of the model at ``threshold`` as a metric."""
    return Metric("net_benefit", "Net benefit", partial(_model, threshold))


def of_all(threshold: float) -> Metric:
    """Return the net benefit of treating all patients as a metric."""
    return Metric("net_benefit_all", "Net benefit of treating all", partial(_all, threshold))


def gain(threshold: float) -> Metric:
    """Return the net benefit of the model minus the better of treating all and none as a metric."""
    return Metric("net_benefit_gain", "Gain in net benefit", partial(_gain, threshold))


def _model(threshold: float, score: Array, target: NDArray[Any], weight: Array) -> Array:
    return _mean(_of_patients(threshold, target) * (score[:, 1] >= threshold), weight)


def _all(threshold: float, score: Array, target: NDArray[Any], weight: Array) -> Array:
    return _mean(_of_patients(threshold, target), weight)


def _gain(threshold: float, score: Array, target: NDArray[Any], weight: Array) -> Array:
    return _model(threshold, score, target, weight) - np.maximum(_all(threshold, score, target, weight), 0.0)


def _of_patients(threshold: float, target: NDArray[Any]) -> Array:
    return np.where(target == 1, 1.0, -threshold / (1 - threshold))


def _mean(values: Array, weight: Array) -> Array:
    return np.asarray((weight @ values) / weight.sum(1))
