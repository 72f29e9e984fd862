"""Metrics: a second library, weights as repetition, invariances, and what has no value."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyclinic.evaluation import metric_functions as m
from polyclinic.evaluation.metric_functions import measure, metrics_for
from polyclinic.evaluation.records.predictions import Predictions, as_cases, as_images, by_patient
from polyclinic.statistics.auc import auc_of
from polyclinic.statistics.undefined import Undefined


def cases(task: Any, seed: Any, n: Any = 40, classes: Any = 2, decimals: Any = 2) -> Any:
    """Scores with ties, and targets in which every class occurs."""
    rng = np.random.default_rng(seed)
    if task == "classification":
        score = rng.dirichlet(np.ones(classes), n).round(decimals)
        target = rng.integers(classes, size=n)
        target[: 2 * classes] = np.tile(np.arange(classes), 2)
    elif task == "multilabel":
        score, target = (
            rng.uniform(size=(n, classes)).round(decimals),
            rng.integers(2, size=(n, classes)).astype("f4"),
        )
        target[0], target[1] = 0, 1
    else:
        target = rng.normal(50, 10, size=(n, 1))
        score = target + rng.normal(size=(n, 1))
    return score, target


@given(seed=st.integers(0, 10_000), classes=st.sampled_from([2, 3, 5]))
@settings(max_examples=30, deadline=None)
def test_classification_equals_scikit_learn(seed: int, classes: Any) -> None:
    sk = pytest.importorskip("sklearn.metrics", reason="scikit-learn is the second implementation")
    score, target = cases("classification", seed, classes=classes)
    got, said = measure("classification", score, target), score.argmax(1)
    score_ = score / score.sum(1, keepdims=True)
    one_vs_rest = (target[:, None] == np.arange(classes)).astype(int)
    ks = [1] if classes == 2 else range(classes)
    assert got["auc"] == pytest.approx(np.mean([sk.roc_auc_score(one_vs_rest[:, k], score[:, k]) for k in ks]))
    assert got["average_precision"] == pytest.approx(
        np.mean([sk.average_precision_score(one_vs_rest[:, k], score[:, k]) for k in ks])
    )
    assert got["accuracy"] == pytest.approx(sk.accuracy_score(target, said))
    assert got["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(target, said))
    kind = {"pos_label": 1} if classes == 2 else {"average": "macro", "labels": range(classes)}
    assert got["sensitivity"] == pytest.approx(sk.recall_score(target, said, zero_division=0, **kind))
    assert got["f1"] == pytest.approx(sk.f1_score(target, said, zero_division=0, **kind))
    if classes == 2:
        assert got["specificity"] == pytest.approx(sk.recall_score(target, said, pos_label=0))
        assert got["brier"] == pytest.approx(sk.brier_score_loss(target, score[:, 1]))
    else:
        assert m.CLASSIFICATION["brier"].of(score_, target) == pytest.approx(
            ((score_ - one_vs_rest) ** 2).sum(1).mean()
        )


def test_multilabel_is_the_mean_over_labels() -> None:
    sk = pytest.importorskip("sklearn.metrics", reason="scikit-learn is the second implementation")
    score, target = cases("multilabel", 1, n=80, classes=4)
    got = measure("multilabel", score, target)
    assert got["auc"] == pytest.approx(sk.roc_auc_score(target, score, average="macro"))
    assert got["average_precision"] == pytest.approx(sk.average_precision_score(target, score, average="macro"))
    assert got["f1"] == pytest.approx(sk.f1_score(target, score >= 0.5, average="macro"))
    assert got["accuracy"] == pytest.approx(((score >= 0.5) == target).mean())
    assert got["brier"] == pytest.approx(((score - target) ** 2).mean())
    recalls = [sk.balanced_accuracy_score(target[:, k], score[:, k] >= 0.5) for k in range(4)]
    assert got["balanced_accuracy"] == pytest.approx(np.mean(recalls))


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("name", ["accuracy", "balanced_accuracy", "sensitivity", "specificity"])
def test_a_metric_of_proportions_is_their_mean(name: str, classes: int) -> None:
    metric, (score, target) = m.CLASSIFICATION[name], cases("classification", 7, classes=classes)
    assert metric.proportions is not None
    found = metric.proportions(score, target)
    if classes > 2 and name in ("sensitivity", "specificity"):
        assert found is None
        return
    assert found is not None
    assert metric.of(score, target) == pytest.approx(np.mean([right[who].mean() for right, who in found]))
    assert metric.proportions(*cases("multilabel", 1)) is None


def test_errors_are_lower_if_better_and_limits_stay_in_range() -> None:
    """Limits of shares are found on the logit scale, those of errors and distances on the log scale."""
    errors = {"mae", "rmse", "brier", "hd95", "hd95_px", "volume_error", "volume_ml", "area_mm2", "volume_px", "nmse"}
    errors |= {"lesion_hd95", "lesion_hd95_px", "lesions_false", "grade_error"}
    for name, metric in {**m.CLASSIFICATION, **m.REGRESSION, **m.PER_CASE, **m.ORDERED}.items():
        if name in errors:
            assert (metric.higher_is_better, metric.scale) == (False, "log"), name
        elif name == "bias":
            assert (metric.higher_is_better, metric.scale) == (None, ""), name
        else:
            assert metric.higher_is_better is True, name
            assert metric.scale == ("" if name in ("r2", "psnr", "ssim", "quadratic_kappa") else "logit"), name


def test_regression_equals_scikit_learn() -> None:
    sk = pytest.importorskip("sklearn.metrics", reason="scikit-learn is the second implementation")
    score, target = cases("regression", 3)
    got = measure("regression", score, target)
    assert got["mae"] == pytest.approx(sk.mean_absolute_error(target, score))
    assert got["rmse"] == pytest.approx(sk.root_mean_squared_error(target, score))
    assert got["r2"] == pytest.approx(sk.r2_score(target, score))
    assert got["bias"] == pytest.approx((score - target).mean())


@given(seed=st.integers(0, 10_000), task=st.sampled_from(["classification", "multilabel", "regression"]))
@settings(max_examples=40, deadline=None)
def test_a_weight_of_two_is_a_case_twice(seed: int, task: str) -> None:
    classes = 2 + seed % 2
    score, target = cases(task, seed, n=30, classes=classes)
    weight = np.random.default_rng(seed + 1).integers(1, 4, size=30)
    for name, metric in metrics_for(task, classes).items():
        once = metric.kernel(score, target, weight[None].astype(float))[0]
        twice = metric.kernel(np.repeat(score, weight, 0), np.repeat(target, weight, 0), np.ones((1, weight.sum())))[0]
        assert once == pytest.approx(twice, rel=1e-6, abs=1e-9, nan_ok=True), name


@given(seed=st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_many_rows_of_weights_are_many_calls(seed: int) -> None:
    score, target = cases("classification", seed)
    weight = np.random.default_rng(seed).integers(0, 4, size=(5, 40)).astype(float)
    for name, metric in metrics_for("classification").items():
        rows = [metric.kernel(score, target, w[None])[0] for w in weight]
        np.testing.assert_allclose(metric.kernel(score, target, weight), rows, rtol=1e-6, atol=1e-9, err_msg=name)


@given(seed=st.integers(0, 10_000), power=st.floats(0.2, 5))
@settings(max_examples=20, deadline=None)
def test_auc_knows_only_the_order(seed: int, power: Any) -> None:
    score, target = cases("classification", seed, decimals=3)
    x, y, ones = score[:, 1], target == 1, np.ones((1, 40))
    assert auc_of(x**power, y, ones) == pytest.approx(auc_of(x, y, ones))
    assert auc_of(-x, y, ones) == pytest.approx(1 - auc_of(x, y, ones))
    assert auc_of(np.ones(40), y, ones) == pytest.approx(0.5)


def test_one_class_has_no_auc_and_says_why() -> None:
    score, target = np.array([[0.2, 0.8], [0.6, 0.4], [0.5, 0.5]]), np.array([1, 1, 1])
    got = measure("classification", score, target)
    assert got["auc"] == "all 3 cases are of one class"
    assert got["calibration_slope"] == "all 3 cases are of one class"
    assert got["sensitivity"] == pytest.approx(1 / 3)
    assert isinstance(got["specificity"], str)
    assert not any(isinstance(v, float) and np.isnan(v) for v in got.values())


def test_no_cases_and_an_unknown_task_are_refused() -> None:
    with pytest.raises(Undefined, match="no cases"):
        m.CLASSIFICATION["auc"].of(np.zeros((0, 2)), np.zeros(0, int))
    with pytest.raises(ValueError, match="unknown task 'clasification'"):
        metrics_for("clasification")


def test_r2_of_a_constant_target_is_undefined() -> None:
    assert isinstance(measure("regression", np.array([[1.0], [2.0]]), np.array([[3.0], [3.0]]))["r2"], str)


def test_per_case_values_average_known_classes_then_cases() -> None:
    values, zeros = np.array([[0.5, np.nan], [0.2, 0.4], [np.nan, np.nan]]), np.zeros(3, int)
    assert m.per_case(values, zeros, np.ones((1, 3)))[0] == pytest.approx((0.5 + 0.3) / 2)


# A patient's images


def test_images_of_one_patient_become_one_case() -> None:
    p = Predictions(
        np.array([4, 4, 9, 9]), np.array([[0.2, 0.8], [0.4, 0.6], [0.9, 0.1], [0.3, 0.7]]), np.array([1, 1, 0, 1])
    )
    c = by_patient(p)
    np.testing.assert_array_equal(c.patient, [4, 9])
    np.testing.assert_array_equal(c.target, [1, 1])
    np.testing.assert_allclose(c.score[:, 1], [0.7, 0.4])
    assert c.images == 4
    assert len(as_images(p).patient) == 4


def test_order_of_images_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    patient, score, target = rng.integers(6, size=30), rng.dirichlet([1, 1], 30), rng.integers(2, size=30)
    order = rng.permutation(30)
    a, b = (
        by_patient(Predictions(patient, score, target)),
        by_patient(Predictions(patient[order], score[order], target[order])),
    )
    np.testing.assert_allclose(a.score, b.score)
    np.testing.assert_array_equal(a.target, b.target)


def test_regression_and_masks_average_over_images() -> None:
    c = by_patient(
        Predictions(np.array([0, 0, 1]), np.array([[1.0], [3.0], [5.0]]), np.array([[2.0], [4.0], [6.0]])), True
    )
    np.testing.assert_allclose(c.score[:, 0], [2, 5])
    np.testing.assert_allclose(c.target[:, 0], [3, 6])
    values = {"dice": np.array([[0.5], [np.nan], [0.9]]), "empty": np.array([[0.0], [0.0], [1.0]])}
    c = by_patient(Predictions(np.array([7, 7, 8]), cases=values))
    np.testing.assert_allclose(c.values["dice"][:, 0], [0.5, 0.9])


def test_classes_that_neither_prediction_nor_truth_contains_have_no_value() -> None:
    values = {
        "dice": np.array([[0.5, 1.0], [0.7, 1.0], [1.0, 1.0]]),
        "empty": np.zeros((3, 2)),
        "absent": np.array([[0, 1], [0, 0], [1, 1]]),
    }
    for cases in (
        by_patient(Predictions(np.arange(3), cases=values)),
        as_images(Predictions(np.arange(3), cases=values)),
    ):
        np.testing.assert_array_equal(cases.values["dice"], [[0.5, np.nan], [0.7, 1.0], [np.nan, np.nan]])
        assert set(cases.values) == {"dice", "dice_empty"}
        np.testing.assert_array_equal(cases.values["dice_empty"], [[0.5, 1.0], [0.7, 1.0], [1.0, 1.0]])


def test_a_wrong_unit_is_refused() -> None:
    with pytest.raises(ValueError, match="'patient' or an 'image'"):
        as_cases(Predictions(np.zeros(1, int), np.ones((1, 2)), np.zeros(1, int)), "slice")


# Masks


def surface_distances(a: Any, b: Any, spacing: Any) -> Any:
    """From every border voxel of ``a`` to the nearest of ``b``, by SciPy's distance transform."""
    from scipy.ndimage import binary_erosion, distance_transform_edt

    edges = [mask & ~binary_erosion(mask, border_value=0) for mask in (a, b)]
    return distance_transform_edt(~edges[1], sampling=spacing)[edges[0]]


@pytest.mark.parametrize(("shape", "spacing"), [((40, 36), (0.5, 2.0)), ((18, 20, 16), (3.0, 1.0, 0.7))])
@pytest.mark.parametrize("seed", range(3))
def test_dice_hd95_and_volume_equal_plain_scipy(shape: tuple[int, ...], spacing: tuple[float, ...], seed: int) -> None:
    """Distances are MONAI's inside; here they are computed from their definition, by another library."""
    import torch
    from scipy.ndimage import gaussian_filter

    from polyclinic.learning.tasks.segmentation import agreement

    field = gaussian_filter(np.random.default_rng(seed).normal(size=(2, *shape)), (0, *[3] * len(shape)))
    t, p = field[0] > 0.0, field[0] + 0.3 * field[1] > 0.0
    got = agreement(torch.tensor(p)[None].long(), torch.tensor(t)[None].long(), 2, spacing, full_metrics=True)
    assert got["dice"].item() == pytest.approx(2 * (p & t).sum() / (p.sum() + t.sum()))
    both = [surface_distances(p, t, spacing), surface_distances(t, p, spacing)]
    assert got["hd95"].item() == pytest.approx(max(np.percentile(d, 95) for d in both), rel=1e-5)
    assert got["volume_error"].item() == pytest.approx(abs(int(p.sum()) - int(t.sum())) / t.sum())
