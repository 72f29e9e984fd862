"""The metrics of each task, as weighted functions (see ``metric``), so that one definition serves values and intervals.

The definitions are the usual ones: the AUC is the rank statistic with half a point for ties (Hanley and McNeil,
"The meaning and use of the area under a ROC curve", Radiology 1982, https://doi.org/10.1148/radiology.143.1.7063747);
average precision is the step-wise sum, without interpolation; the Brier score of more than two classes sums over
classes (0 to 2). With three or more classes, or several labels, AUC, average precision, sensitivity, specificity and
F1 are means over classes of one-versus-rest values.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyclinic.evaluation.calibration import CALIBRATION
from polyclinic.evaluation.metric import Kernel, Metric, Proportions
from polyclinic.evaluation.survival_metrics import SURVIVAL
from polyclinic.statistics import agreement
from polyclinic.statistics.auc import auc_of, sums_by_score
from polyclinic.statistics.undefined import Array, Undefined


def _ratio(above: Array, below: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(below > 0, above / below, np.nan)


def mean_of(values: Array, weight: Array) -> Array:
    """Return ``Σ w·x / Σ w`` over the finite values. Shapes [n], [b, n] -> [b]."""
    known = np.isfinite(values)
    return _ratio(weight @ np.where(known, values, 0.0), weight @ known.astype(float))


def average_precision_of(score: Array, positive: NDArray[Any], weight: Array) -> Array:
    """Return ``Σ (R_k − R_{k−1}) P_k`` over descending thresholds. Shapes [n], [n], [b, n] -> [b]."""
    pos, neg = sums_by_score(-score, positive, weight)
    true, false = np.cumsum(pos, axis=1), np.cumsum(neg, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.where(true + false > 0, true / (true + false), 0.0)
    return _ratio((pos * precision).sum(1), pos.sum(1))


def sensitivity_of(predicted: Array, positive: Array, weight: Array) -> Array:
    """Return TP / (TP + FN) of a binary prediction. Shapes [n], [n], [b, n] -> [b]."""
    return _ratio(weight @ (predicted * positive), weight @ positive)


def specificity_of(predicted: Array, positive: Array, weight: Array) -> Array:
    """Return TN / (TN + FP) of a binary prediction. Shapes [n], [n], [b, n] -> [b]."""
    return sensitivity_of(1 - predicted, 1 - positive, weight)


def f1_of(predicted: Array, positive: Array, weight: Array) -> Array:
    """Return 2 TP / (2 TP + FP + FN) of a binary prediction. Shapes [n], [n], [b, n] -> [b]."""
    return _ratio(weight @ (2 * predicted * positive), weight @ (predicted + positive))


def one_hot(target: NDArray[Any], classes: int) -> NDArray[Any]:
    """Return the class, or the labels, as 0/1 of shape [n, classes]."""
    return target.astype(float) if target.ndim == 2 else (target[:, None] == np.arange(classes)).astype(float)


def predicted_of(score: Array, target: NDArray[Any]) -> NDArray[Any]:
    """Return the prediction: the most probable class, or each label with p ≥ 0.5. 0/1 of shape [n, classes]."""
    if target.ndim == 2:
        return (score >= 0.5).astype(float)
    return one_hot(np.argmax(score, axis=1), score.shape[1])


def _over_classes(score: Array, target: NDArray[Any], one: Callable[[int, NDArray[Any]], Array]) -> Array:
    """Return the value of the second of two classes, else the mean over classes with positive and negative cases."""
    truth = one_hot(target, score.shape[1])
    if target.ndim == 1 and score.shape[1] == 2:
        return one(1, truth)
    mixed = [k for k in range(truth.shape[1]) if 0 < truth[:, k].sum() < len(truth)]
    if not mixed:
        return one(0, truth) * np.nan
    return np.asarray(np.mean([one(k, truth) for k in mixed], axis=0))


def _auc(score: Array, target: NDArray[Any], weight: Array) -> Array:
    return _over_classes(score, target, lambda k, truth: auc_of(score[:, k], truth[:, k], weight))


def _average_precision(score: Array, target: NDArray[Any], weight: Array) -> Array:
    return _over_classes(score, target, lambda k, truth: average_precision_of(score[:, k], truth[:, k], weight))


def _rate(rate: Kernel) -> Kernel:
    """Return the metric of a rate of binary predictions."""

    def kernel(score: Array, target: NDArray[Any], weight: Array) -> Array:
        predicted = predicted_of(score, target)
        return _over_classes(score, target, lambda k, truth: rate(predicted[:, k], truth[:, k], weight))

    return kernel


def _accuracy(score: Array, target: NDArray[Any], weight: Array) -> Array:
    right = (predicted_of(score, target) == one_hot(target, score.shape[1])).astype(float)
    return mean_of(right.mean(1) if target.ndim == 2 else right.min(1), weight)


def _balanced_accuracy(score: Array, target: NDArray[Any], weight: Array) -> Array:
    predicted, truth = predicted_of(score, target), one_hot(target, score.shape[1])

    def rate(of: Kernel, k: int) -> Array:
        return of(predicted[:, k], truth[:, k], weight)

    if target.ndim == 2:  # for each label (sensitivity + specificity) / 2
        mixed = [k for k in range(truth.shape[1]) if 0 < truth[:, k].sum() < len(truth)]
        each = [(rate(sensitivity_of, k) + rate(specificity_of, k)) / 2 for k in mixed]
    else:  # the mean sensitivity over classes
        present = [k for k in range(truth.shape[1]) if truth[:, k].any()]
        each = [rate(sensitivity_of, k) for k in present] if len(present) > 1 else []
    return np.mean(each, axis=0) if each else np.full(len(weight), np.nan)


def _brier(score: Array, target: NDArray[Any], weight: Array) -> Array:
    error = (score - one_hot(target, score.shape[1]).astype(float)) ** 2
    if target.ndim == 2:
        return mean_of(error.mean(1), weight)
    return mean_of(error[:, 1] if score.shape[1] == 2 else error.sum(1), weight)


def _log_loss(score: Array, target: NDArray[Any], weight: Array) -> Array:
    return mean_of(-np.log(np.maximum(score[np.arange(len(score)), target], 1e-12)), weight)


def _kappa(score: Array, target: NDArray[Any], weight: Array) -> Array:
    return agreement.quadratic_kappa(np.argmax(score, axis=1), target, weight)


def _grade_error(score: Array, target: NDArray[Any], weight: Array) -> Array:
    return agreement.grade_error(np.argmax(score, axis=1), target, weight)


def _mae(score: Array, target: NDArray[Any], weight: Array) -> Array:
    return mean_of(np.abs(score - target).mean(1), weight)


def _rmse(score: Array, target: NDArray[Any], weight: Array) -> Array:
    return np.sqrt(mean_of(((score - target) ** 2).mean(1), weight))


def _r2(score: Array, target: NDArray[Any], weight: Array) -> Array:
    # R² = 1 − Σ w (y − ŷ)² / Σ w (y − ȳ)²
    y, error = target.astype(float), ((score - target) ** 2)
    center = _ratio(weight @ y.mean(1), weight.sum(1))
    spread = weight @ (y**2).mean(1) - weight.sum(1) * center**2
    spread = np.where(spread > 1e-12 * np.abs(weight @ (y**2).mean(1)), spread, 0.0)
    return 1.0 - _ratio(weight @ error.mean(1), spread)


def _bias(score: Array, target: NDArray[Any], weight: Array) -> Array:
    return mean_of((score - target).mean(1), weight)


def per_case(score: Array, target: NDArray[Any], weight: Array) -> Array:
    """Return the mean over cases of per-case values ``score`` [n, k], which are first averaged over finite k."""
    with np.errstate(invalid="ignore"):
        known = np.isfinite(score)
        values = _ratio(np.where(known, score, 0.0).sum(1), known.sum(1).astype(float))
    return mean_of(values, weight)


def _hits(score: Array, target: NDArray[Any]) -> Proportions | None:
    if target.ndim == 2:
        return None
    right = np.argmax(score, axis=1) == target
    return [(right, np.ones(len(target), bool))]


def _hits_by_class(score: Array, target: NDArray[Any]) -> Proportions | None:
    if target.ndim == 2:
        return None
    right = np.argmax(score, axis=1) == target
    return [(right, target == k) for k in np.unique(target)]


def _hits_of(truth: int) -> Callable[[Array, NDArray[Any]], Proportions | None]:
    """Return the hits of the second class, or of the first, if there are two; sensitivity and specificity."""

    def proportions(score: Array, target: NDArray[Any]) -> Proportions | None:
        if target.ndim == 2 or score.shape[1] != 2:
            return None
        return [(np.argmax(score, axis=1) == target, target == truth)]

    return proportions


CLASSIFICATION: Mapping[str, Metric] = {
    m.name: m
    for m in (
        Metric("auc", "AUC", _auc, needs_two_classes=True, by_case="two classes", scale="logit", by_class=True),
        Metric("accuracy", "Accuracy", _accuracy, scale="logit", proportions=_hits, by_case="always"),
        Metric(
            "balanced_accuracy",
            "Balanced accuracy",
            _balanced_accuracy,
            needs_two_classes=True,
            by_case="two classes",
            scale="logit",
            by_class=True,
            proportions=_hits_by_class,
        ),
        Metric(
            "sensitivity",
            "Sensitivity",
            _rate(sensitivity_of),
            by_case="two classes",
            scale="logit",
            by_class=True,
            proportions=_hits_of(1),
        ),
        Metric(
            "specificity",
            "Specificity",
            _rate(specificity_of),
            by_case="two classes",
            scale="logit",
            by_class=True,
            proportions=_hits_of(0),
        ),
        Metric("f1", "F1", _rate(f1_of), by_case="two classes", scale="logit", by_class=True),
        Metric(
            "average_precision",
            "Average precision",
            _average_precision,
            needs_two_classes=True,
            by_case="two classes",
            scale="logit",
            by_class=True,
        ),
        Metric("brier", "Brier score", _brier, higher_is_better=False, scale="log", by_case="always"),
    )
}
LOG_LOSS = Metric("loss", "Log loss", _log_loss, higher_is_better=False, scale="log", by_case="always")
"""A metric of classes without an order, in studies that select the round by it."""
ORDERED: Mapping[str, Metric] = {
    m.name: m
    for m in (
        Metric("quadratic_kappa", "Kappa (quadratic weights)", _kappa),
        Metric("grade_error", "Mean distance of grades", _grade_error, higher_is_better=False, scale="log"),
    )
}
"""Metrics of ordered grades, in addition to those of classification."""
REGRESSION: Mapping[str, Metric] = {
    m.name: m
    for m in (
        Metric("mae", "Mean absolute error", _mae, higher_is_better=False, scale="log", by_case="always"),
        Metric("rmse", "Root mean squared error", _rmse, higher_is_better=False, scale="log", by_case="always"),
        Metric("r2", "R²", _r2, by_case="always"),
        Metric("bias", "Mean error (bias)", _bias, higher_is_better=None, by_case="always"),
    )
}
PER_CASE: Mapping[str, Metric] = {
    m.name: m
    for m in (
        Metric("dice", "Dice", per_case, scale="logit"),
        Metric("hd95", "HD95", per_case, higher_is_better=False, unit="mm", scale="log"),
        Metric("nsd", "Surface Dice", per_case, scale="logit"),
        Metric("hd95_px", "HD95", per_case, higher_is_better=False, unit="pixels", scale="log"),
        Metric("volume_error", "Relative volume error", per_case, higher_is_better=False, scale="log"),
        Metric("volume_ml", "Volume difference", per_case, higher_is_better=False, unit="ml", scale="log"),
        Metric("area_mm2", "Area difference", per_case, higher_is_better=False, unit="mm²", scale="log"),
        Metric("volume_px", "Size difference", per_case, higher_is_better=False, unit="pixels", scale="log"),
        Metric("dice_empty", "Dice, both empty = 1", per_case, scale="logit"),
        Metric("lesion_dice", "Lesion-wise Dice", per_case, scale="logit"),
        Metric("lesion_hd95", "Lesion-wise HD95", per_case, higher_is_better=False, unit="mm", scale="log"),
        Metric("lesion_hd95_px", "Lesion-wise HD95", per_case, higher_is_better=False, unit="pixels", scale="log"),
        Metric("lesion_sensitivity", "Lesion sensitivity", per_case, scale="logit"),
        Metric("lesion_f1", "Lesion F1", per_case, scale="logit"),
        Metric("lesions_false", "False lesions a case", per_case, higher_is_better=False, scale="log"),
        Metric("psnr", "PSNR", per_case, unit="dB"),
        Metric("ssim", "SSIM", per_case),
        Metric("nmse", "NMSE", per_case, higher_is_better=False, scale="log"),
    )
}


IMAGE_QUALITY = ("psnr", "ssim", "nmse")


def metrics_for(task: str, classes: int = 2, ordered: bool = False) -> Mapping[str, Metric]:
    """Return the metrics of a task by name, the most common first.

    Observed/expected, slope and intercept are for two classes, kappa and the distance of grades for ordered ones.

    Raises:
        ValueError: If the task is unknown.
    """
    error = {"calibration_error": CALIBRATION["calibration_error"]}
    tables: dict[str, Mapping[str, Metric]] = {
        "classification": {
            **(ORDERED if ordered else {}),
            **CLASSIFICATION,
            **(CALIBRATION if classes == 2 else error),
        },
        "multilabel": {**CLASSIFICATION, **error},
        "regression": REGRESSION,
        "survival": SURVIVAL,
        "segmentation": {k: m for k, m in PER_CASE.items() if k not in IMAGE_QUALITY},
        "reconstruction": {k: PER_CASE[k] for k in IMAGE_QUALITY},
    }
    if task not in tables:
        raise ValueError(f"unknown task {task!r}; the tasks are {', '.join(tables)}")
    return tables[task]


def measure(task: str, score: Array, target: NDArray[Any]) -> dict[str, float | str]:
    """Compute every metric of ``task`` over one set of cases: its value, or the reason why it is undefined.

    For segmentation and reconstruction, average the per-case values with ``per_case`` instead.
    """
    values: dict[str, float | str] = {}
    for name, metric in metrics_for(task, score.shape[1]).items():
        try:
            values[name] = metric.of(score, target)
        except Undefined as reason:
            values[name] = str(reason)
    return values
