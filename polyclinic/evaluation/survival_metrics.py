"""The metrics of survival, as weighted functions (see ``metric``).

A target has 2 + m columns: the time, the event (1, or 0 for censored), and the same m times for every case, up to which
survival is judged; the last is the horizon. A score of m columns is the predicted probability of surviving beyond each
of these times; a score of one column is only an order, higher for a longer expected survival (Cox's model).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyclinic.evaluation.metric import Metric
from polyclinic.statistics import survival
from polyclinic.statistics.undefined import Array


def times_of(target: NDArray[Any]) -> Array:
    """Return the times up to which survival is judged. [m]"""
    return np.asarray(target[0, 2:], float) if len(target) else np.zeros(0)


def predicts_probabilities(score: Array, target: NDArray[Any]) -> bool:
    """Return whether ``score`` [n, m] is the probability of surviving beyond each of the m times of ``target``."""
    return score.ndim == 2 and score.shape[1] > 1 and score.shape[1] == target.shape[1] - 2


def order_of(score: Array, target: NDArray[Any]) -> Array:
    """Return what patients are ranked by: the expected time lived up to the horizon, or the score of one column. [n]"""
    if not predicts_probabilities(score, target):
        return np.asarray(score[:, 0], float)
    return survival.mean_time(score, times_of(target))


def _c_index(score: Array, target: NDArray[Any], weight: Array) -> Array:
    return survival.concordance(order_of(score, target), target[:, 0], target[:, 1], weight)


def _uno_c(score: Array, target: NDArray[Any], weight: Array) -> Array:
    horizon = float(times_of(target)[-1])
    return survival.weighted_concordance(order_of(score, target), target[:, 0], target[:, 1], weight, horizon)


def _integrated_brier(score: Array, target: NDArray[Any], weight: Array) -> Array:
    if not predicts_probabilities(score, target):
        return np.full(len(weight), np.nan)
    at = times_of(target)
    return survival.integrated(survival.brier_scores(score, target[:, 0], target[:, 1], weight, at), at)


def _observed_to_expected(score: Array, target: NDArray[Any], weight: Array) -> Array:
    """Return the observed risk at the horizon, 1 − Kaplan-Meier, divided by the mean predicted risk."""
    if not predicts_probabilities(score, target):
        return np.full(len(weight), np.nan)
    observed = 1 - survival.survival_curve(target[:, 0], target[:, 1], weight, times_of(target)[-1:])[:, 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = (weight @ (1 - score[:, -1])) / weight.sum(1)
        return np.where(expected > 0, observed / expected, np.nan)


SURVIVAL: Mapping[str, Metric] = {
    m.name: m
    for m in (
        Metric("c_index", "C-index (Harrell)", _c_index, scale="logit"),
        Metric("uno_c", "C-index (Uno)", _uno_c, scale="logit"),
        Metric("ibs", "Integrated Brier score", _integrated_brier, higher_is_better=False, scale="log"),
        Metric(
            "observed_to_expected",
            "Observed / expected at the horizon",
            _observed_to_expected,
            higher_is_better=None,
            scale="log",
        ),
    )
}
