"""Test predictions of a method run, and their conversion to cases.

A safetensors file contains ``<site>/score``, ``<site>/target`` and ``<site>/patient``. Segmentation and reconstruction
have values per image instead of score and target: ``<site>/dice``, ``<site>/hd95``, ``<site>/empty`` and so on. The
optional ``<site>/silent`` marks examples for which the model's output was not finite. For survival,
``<site>/target`` is time and event, and ``<site>/times`` repeats the times up to which survival is judged.

The unit is the patient, formed without knowledge that is unavailable at prediction time. Scores of a patient's images
are averaged. If images of one patient have different labels, such as several lesions, the patient's label is positive
if any image is (two classes; for several labels, each label by itself). With three or more classes there is no such
rule; every image is then a case, and variances are clustered by patient. For regression, targets are averaged too; for
survival, they are equal for all images of a patient.
Per-image values are averaged over the images for which they are finite. If ``<site>/sliced`` marks the images as slices
with known positions, the Dice of a patient is that of all slices together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

NO_VALUES = (
    "empty",
    "absent",
    "blank",
    "sliced",
    "overlap",
    "predicted",
    "reference",
    "lesions",
    "lesions_found",
    "lesions_predicted",
)
PER_CASE_TASKS = ("segmentation", "reconstruction")
AVERAGED_TARGETS = ("regression", "survival")
"""Tasks whose targets are averaged over a patient's images."""


@dataclass(frozen=True)
class Predictions:
    """The test predictions of one method run at one site.

    Attributes:
        patient: [n], the number of each example's patient within the site.
        score: [n, C], probabilities (regression: predictions; survival: see ``survival_metrics``); None for per-case
            tasks.
        target: [n], [n, L] or [n, 1]; for survival [n, 2 + m], with the times; None for per-case tasks.
        cases: Per-case metrics by name, [n, K] each, for segmentation and reconstruction.
        silent: Number of examples whose non-finite output was replaced by the task's guess.
    """

    patient: NDArray[np.int64]
    score: NDArray[np.float64] | None = None
    target: NDArray[Any] | None = None
    cases: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    silent: int = 0

    def __len__(self) -> int:
        return len(self.patient)


def joined(a: Predictions, b: Predictions) -> Predictions:
    """Concatenate the predictions of two folds at one site, which are of different patients."""
    score = None if a.score is None or b.score is None else np.concatenate([a.score, b.score])
    target = None if a.target is None or b.target is None else np.concatenate([a.target, b.target])
    cases = {k: np.concatenate([a.cases[k], b.cases[k]]) for k in a.cases if k in b.cases}
    return Predictions(np.concatenate([a.patient, b.patient]), score, target, cases, a.silent + b.silent)


def read_predictions(
    file: Path, task: str, metric: str, sites: Sequence[str], problems: list[str]
) -> Mapping[str, Predictions]:
    """Return the predictions in ``file`` by site, in the order of names. Problems are appended to ``problems``."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        problems.append(f"{file}: not a safetensors file ({error}). Run this method and seed again.")
        return {}
    found: dict[str, dict[str, NDArray[Any]]] = {}
    for key, array in arrays.items():
        site, _, name = key.rpartition("/")
        found.setdefault(site, {})[name] = array
    read = dict[str, Predictions]()
    for site, parts in sorted(found.items()):
        bad = [] if site in sites else [f"{file}: site {site!r} is not among the run's sites {sorted(sites)}"]
        bad += [f"{file}: {text}" for text in _faults(site, parts, task, metric)]
        problems.extend(bad)
        if not bad and len(parts["patient"]):
            read[site] = predictions_of(parts, task)
    return read


def _faults(site: str, parts: Mapping[str, NDArray[Any]], task: str, metric: str) -> list[str]:
    """Return the problems of the arrays of one site."""
    per_case = task in PER_CASE_TASKS
    wanted = ["patient", metric] if per_case else ["patient", "score", "target"]
    wanted += ["times"] if task == "survival" else []
    if faults := [f"{site}/{name} is missing" for name in wanted if name not in parts]:
        return faults
    n = len(parts["patient"])
    if faults := [f"{site}/{k} has {len(v)} rows, but {site}/patient has {n}" for k, v in parts.items() if len(v) != n]:
        return faults
    if parts["patient"].ndim != 1:
        return [f"{site}/patient has shape {list(parts['patient'].shape)}; it must be one number for each example"]
    if per_case or n == 0:
        return []
    if task == "survival":
        return _survival_faults(site, parts["score"], parts["target"], parts["times"])
    return _score_faults(site, parts["score"], parts["target"], task)


def _score_faults(site: str, score: NDArray[Any], target: NDArray[Any], task: str) -> list[str]:
    if score.ndim != 2:
        return [f"{site}/score has shape {list(score.shape)}; it must be [examples, classes]"]
    if not np.isfinite(score).all():
        return [f"{site}/score contains {int((~np.isfinite(score)).sum())} values that are not finite"]
    if task == "classification":
        if score.shape[1] < 2:
            return [f"{site}/score has one column; classification needs one for each class"]
        if target.ndim != 1 or target.min() < 0 or target.max() >= score.shape[1]:
            return [f"{site}/target must be class numbers from 0 to {score.shape[1] - 1}, one for each example"]
    elif target.shape != score.shape:
        return [f"{site}/target has shape {list(target.shape)}, but {site}/score has {list(score.shape)}"]
    if task != "regression" and (score.min() < -1e-6 or score.max() > 1 + 1e-6):
        return [f"{site}/score must contain probabilities between 0 and 1"]
    return []


def _survival_faults(site: str, score: NDArray[Any], target: NDArray[Any], times: NDArray[Any]) -> list[str]:
    if target.ndim != 2 or target.shape[1] != 2 or not np.isfinite(target).all() or (target[:, 0] <= 0).any():
        return [f"{site}/target must be a time above 0 and an event for each example, [examples, 2]"]
    if not np.isin(target[:, 1], (0, 1)).all():
        return [f"{site}/target has events other than 0 and 1"]
    if times.ndim != 2 or times.shape[1] < 2 or (times != times[:1]).any() or (np.diff(times[0], prepend=0) <= 0).any():
        return [f"{site}/times must be the same two or more ascending times for each example"]
    if score.ndim != 2 or score.shape[1] not in (1, times.shape[1]):
        return [f"{site}/score has shape {list(score.shape)}; it must have one column, or one for each of the times"]
    if not np.isfinite(score).all():
        return [f"{site}/score contains {int((~np.isfinite(score)).sum())} values that are not finite"]
    if score.shape[1] > 1 and (score.min() < -1e-6 or score.max() > 1 + 1e-6):
        return [f"{site}/score must contain probabilities between 0 and 1"]
    return []


def predictions_of(parts: Mapping[str, NDArray[Any]], task: str) -> Predictions:
    """Return the predictions in the arrays of one site, by their names in the file."""
    patient = np.asarray(parts["patient"], np.int64)
    if task in PER_CASE_TASKS:
        cases = {k: np.asarray(v, np.float64).reshape(len(patient), -1) for k, v in parts.items() if k != "patient"}
        return Predictions(patient, cases=cases)
    silent = int(np.sum(parts.get("silent", 0)))
    target = np.asarray(parts["target"])
    if task == "survival":
        target = np.concatenate([target, parts["times"]], axis=1).astype(np.float64)
    return Predictions(patient, np.asarray(parts["score"], np.float64), target, silent=silent)


@dataclass(frozen=True)
class Cases:
    """The cases that are evaluated, one per row.

    Attributes:
        patient: [n], as in ``Predictions``.
        score: [n, C]. NaN [n, 1] for per-case tasks, so that a metric that is not in ``values`` is undefined.
        target: [n], [n, L] or [n, 1]. Zeros for per-case tasks.
        values: Per-case values by metric, [n, K] each.
        images: Number of images from which the cases were computed.
    """

    patient: NDArray[np.int64]
    score: NDArray[np.float64]
    target: NDArray[Any]
    values: Mapping[str, NDArray[np.float64]]
    images: int

    def score_for(self, metric: str) -> NDArray[np.float64]:
        """Return the ``score`` argument of the metric's kernel."""
        return self.values.get(metric, self.score)


def by_patient(predictions: Predictions, regression: bool = False) -> Cases:
    """Return one case for each patient, as described in the module's docstring."""
    n = len(predictions)
    if (
        predictions.score is not None
        and predictions.target is not None
        and bool((np.diff(predictions.patient) > 0).all())
    ):
        target = np.asarray(predictions.target)  # one example of each patient, in order
        return Cases(predictions.patient, predictions.score, target.astype(np.float64) if regression else target, {}, n)
    ids, first, index = np.unique(predictions.patient, return_index=True, return_inverse=True)
    if len(ids) == n and predictions.score is not None and predictions.target is not None:
        target = np.asarray(predictions.target)[first]
        return Cases(ids, predictions.score[first], target.astype(np.float64) if regression else target, {}, n)
    if predictions.score is None or predictions.target is None:
        values = {k: _mean_by(index, v, len(ids)) for k, v in _present(predictions.cases).items()}
        if "sliced" in predictions.cases:
            values |= _volumes(predictions, index, len(ids))
        return Cases(ids, np.full((len(ids), 1), np.nan), np.zeros(len(ids), np.int64), values, n)
    score = _mean_by(index, predictions.score, len(ids))
    if regression:
        return Cases(ids, score, _mean_by(index, predictions.target, len(ids)), {}, n)
    target = np.zeros((len(ids), *predictions.target.shape[1:]), predictions.target.dtype)
    np.maximum.at(target, index, predictions.target)
    return Cases(ids, score, target, {}, n)


def unit_of(predictions: Sequence[Predictions], task: str, unit: str) -> str:
    """Return the unit of a run's cases: ``unit``, or ``"image"`` if no rule gives a patient one class."""
    if unit != "patient" or task != "classification":
        return unit
    several = [p for p in predictions if p.score is not None and p.target is not None and p.score.shape[1] > 2]
    return "image" if any(_has_mixed_patient(p) for p in several) else "patient"


def _has_mixed_patient(p: Predictions) -> bool:
    """Return whether images of one patient have different labels."""
    assert p.target is not None
    ids, first, index = np.unique(p.patient, return_index=True, return_inverse=True)
    return len(ids) < len(p) and bool((p.target != p.target[first][index]).any())


def as_images(predictions: Predictions) -> Cases:
    """Return each image as a case, in the order of patients."""
    p, order = predictions, np.argsort(predictions.patient, kind="stable")
    if p.score is None or p.target is None:
        values = {k: v[order] for k, v in _present(p.cases).items()}
        return Cases(p.patient[order], np.full((len(p), 1), np.nan), np.zeros(len(p), np.int64), values, len(p))
    return Cases(p.patient[order], p.score[order], p.target[order], {}, len(p))


def as_cases(predictions: Predictions, unit: str = "patient", regression: bool = False) -> Cases:
    """Return the cases by ``by_patient`` or ``as_images``.

    Raises:
        ValueError: If ``unit`` is neither ``"patient"`` nor ``"image"``.
    """
    if unit not in ("patient", "image"):
        raise ValueError(f"unit {unit!r}: a case is a 'patient' or an 'image'")
    return by_patient(predictions, regression) if unit == "patient" else as_images(predictions)


def _volumes(predictions: Predictions, index: NDArray[np.int64], size: int) -> dict[str, NDArray[np.float64]]:
    """Return Dice and relative volume error of each patient, with the slices of the patient as one volume."""
    sums = {}
    for name in ("overlap", "predicted", "reference"):
        sums[name] = np.zeros((size, predictions.cases[name].shape[1]))
        np.add.at(sums[name], index, predictions.cases[name])
    both = sums["predicted"] + sums["reference"]
    with np.errstate(invalid="ignore", divide="ignore"):
        dice = 2 * sums["overlap"] / both
        error = np.abs(sums["predicted"] - sums["reference"]) / sums["reference"]
    error = np.where(sums["reference"] > 0, error, np.where(both > 0, 1.0, np.nan))
    return {"dice": dice, "dice_empty": np.where(both > 0, dice, 1.0), "volume_error": error}


def _detection(cases: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float64]]:
    """Return sensitivity and F1 of the detection of lesions; NaN for cases without lesions, or with neither kind."""
    true, found, predicted = (np.asarray(cases[k], float) for k in ("lesions", "lesions_found", "lesions_predicted"))
    right = predicted - np.asarray(cases["lesions_false"], float)
    with np.errstate(invalid="ignore", divide="ignore"):
        recall, precision = found / true, right / predicted
        f1 = 2 * recall * precision / (recall + precision)
    f1 = np.where((true == 0) & (predicted == 0), np.nan, np.nan_to_num(f1))
    return {"lesion_sensitivity": recall, "lesion_f1": f1}


def _present(cases: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Return the values of each metric, NaN for classes that neither prediction nor truth of a case contains.

    Dice is given by both conventions: ``dice`` leaves these out (nnU-Net), ``dice_empty`` counts them as 1.
    """
    values = {name: value for name, value in cases.items() if name not in NO_VALUES}
    if {"lesions", "lesions_found", "lesions_predicted", "lesions_false"} <= cases.keys():
        values |= _detection(cases)
    if "absent" not in cases:
        return values
    absent = np.asarray(cases["absent"]).astype(bool)
    both = {"dice_empty": np.where(absent, 1.0, values["dice"])} if "dice" in values else {}
    return {name: np.where(absent, np.nan, value) for name, value in values.items()} | both


def _mean_by(index: NDArray[np.int64], values: NDArray[Any], size: int) -> NDArray[np.float64]:
    """Return the mean of the finite rows of ``values`` [n, k] for each index; NaN if there are none. [size, k]"""
    values = np.asarray(values, np.float64).reshape(len(index), -1)
    known = np.isfinite(values)
    total, count = np.zeros((size, values.shape[1])), np.zeros((size, values.shape[1]))
    np.add.at(total, index, np.where(known, values, 0.0))
    np.add.at(count, index, known)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(count > 0, total / count, np.nan))
