"""Scores of single sites and their mean: one definition for the console, the records and the report."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from polyclinic.evaluation.metric import Metric
from polyclinic.evaluation.records.predictions import AVERAGED_TARGETS, as_cases, predictions_of
from polyclinic.statistics.undefined import Undefined


def scores_on_test(
    outputs: Mapping[str, NDArray[np.generic]], task: str, metrics: Mapping[str, Metric]
) -> dict[str, float]:
    """Compute the metrics of one site's test predictions, with one case per patient as in the report.

    Args:
        outputs: The arrays of the site in ``predictions.safetensors``.
        task: The kind of task.
        metrics: The metrics by name.

    Returns:
        The value of each metric that the cases determine.
    """
    cases = as_cases(predictions_of(outputs, task), regression=task in AVERAGED_TARGETS)
    scores = {}
    for name, metric in metrics.items():
        try:
            scores[name] = metric.of(cases.score_for(name), cases.target)
        except Undefined:
            continue
    return scores


def mean_over_sites(scores: Mapping[str, float | None]) -> float | None:
    """Return the mean of the finite scores by site; None if there are none."""
    known = _finite(scores)
    return float(np.mean(list(known.values()))) if known else None


def worst_site(scores: Mapping[str, float | None], higher_is_better: bool) -> tuple[str, float] | None:
    """Return the site with the worst finite score, and that score; None if there are none."""
    known = _finite(scores)
    if not known:
        return None
    choose = min if higher_is_better else max
    return choose(known.items(), key=lambda item: item[1])


def decimals(value: float, digits: int = 3) -> str:
    """Format with ``digits`` decimals, equal for values that differ by rounding errors of different sums only."""
    return f"{round(value, 10):.{digits}f}"


def _finite(scores: Mapping[str, float | None]) -> dict[str, float]:
    return {site: score for site, score in scores.items() if score is not None and np.isfinite(score)}
