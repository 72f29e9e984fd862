"""ROC and precision-recall curves and confusion matrices: by hand, and against scikit-learn."""

import numpy as np
import pytest

from polyclinic.evaluation.discrimination_curves import (
    POSITIONS,
    confusion,
    mean_curve,
    precision_curve,
    roc_curve,
)
from polyclinic.statistics.auc import auc_of
from polyclinic.statistics.undefined import Array


def some(n: int, digits: int, seed: int = 0) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    positive = rng.uniform(size=n) < 0.4
    return np.round(rng.normal(size=n) + positive, digits), positive.astype(float)


def test_curves_by_hand() -> None:
    # From the highest score: positive, negative, positive, negative.
    score, positive = np.array([4.0, 3.0, 2.0, 1.0]), np.array([1.0, 0.0, 1.0, 0.0])
    roc = roc_curve(score, positive)
    assert roc is not None
    assert roc.area == pytest.approx(0.75)
    assert roc.values[[0, 49, 50, 99, 100]].tolist() == [0.5, 0.5, 1.0, 1.0, 1.0]
    precision = precision_curve(score, positive)
    assert precision is not None
    assert precision.area == pytest.approx((1 + 2 / 3) / 2)
    assert precision.values[[0, 50, 51, 100]].tolist() == pytest.approx([1.0, 1.0, 2 / 3, 2 / 3])


def test_ties_are_a_straight_line() -> None:
    roc = roc_curve(np.zeros(10), np.array([0.0, 1.0] * 5))
    assert roc is not None
    np.testing.assert_allclose(roc.values, POSITIONS)
    assert roc.area == 0.5


@pytest.mark.parametrize("digits", [0, 1, 6])
def test_areas_equal_those_of_the_report_and_of_another_library(digits: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    score, positive = some(200, digits)
    roc, precision = roc_curve(score, positive), precision_curve(score, positive)
    assert roc is not None
    assert precision is not None
    assert roc.area == pytest.approx(auc_of(score, positive, np.ones((1, 200)))[0])
    assert roc.area == pytest.approx(metrics.roc_auc_score(positive, score))
    assert precision.area == pytest.approx(metrics.average_precision_score(positive, score))
    x, y, _ = metrics.roc_curve(positive, score, drop_intermediate=False)
    highest = [y[x <= at + 1e-9].max() for at in POSITIONS]
    between = np.interp(POSITIONS, x, y)
    assert (roc.values >= np.minimum(highest, between) - 1e-9).all()
    assert (roc.values <= np.maximum(highest, between) + 1e-9).all()


def test_means_are_over_seeds_and_then_over_sites() -> None:
    one, two, other = (roc_curve(*some(60, 3, seed)) for seed in (0, 1, 2))
    found = mean_curve([[one, one, two], [other], [None]])
    assert found is not None
    assert one is not None
    assert two is not None
    assert other is not None
    assert found.sites == 2
    assert found.area == pytest.approx(((2 * one.area + two.area) / 3 + other.area) / 2)
    np.testing.assert_allclose(found.values, ((2 * one.values + two.values) / 3 + other.values) / 2)
    assert mean_curve([[None], []]) is None


def test_a_missing_class_has_no_curve() -> None:
    assert roc_curve(np.array([0.1, 0.2]), np.array([1, 1])) is None
    assert roc_curve(np.array([0.1, 0.2]), np.array([0, 0])) is None
    assert precision_curve(np.array([0.1, 0.2]), np.array([0, 0])) is None
    assert precision_curve(np.array([]), np.array([])) is None


def test_rows_of_a_confusion_matrix_are_true_classes() -> None:
    found = confusion(np.array([0, 2, 2, 1]), np.array([0, 0, 2, 2]), 3)
    assert found.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 1]]
