"""Operating points: every seed has a threshold of its own, chosen on its own validation patients."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from polyclinic.evaluation.operating_points import operating_point
from polyclinic.evaluation.records.predictions import Predictions
from polyclinic.evaluation.records.run_reader import read_run
from polyclinic.statistics.undefined import Undefined
from tests.support.synthetic_run import write_run

SITES = {"ada": ("training", 40, 0.5, 0.0, 0.0), "bo": ("external", 30, 0.4, 0.2, 0.1)}


def predicted(p: Any, y: Any, first: Any = 0) -> Any:
    p = np.asarray(p, float)
    return Predictions(first + np.arange(len(p)), np.stack([1 - p, p], 1), np.asarray(y))


@pytest.fixture
def run(tmp_path: Path) -> Any:
    return read_run(write_run(tmp_path / "r", sites=SITES, seeds=(0, 1), methods=("fedavg",)))


def test_operating_point_uses_validation_for_the_threshold_only(run: Any) -> None:
    key = ("fedavg", 0)
    run = replace(
        run,
        arms={key: {"ada": predicted([0.1, 0.2, 0.4, 0.6, 0.9], [0, 0, 1, 0, 1])}},
        validation={key: {"ada": predicted([0.3, 0.5, 0.7], [0, 1, 1])}},
    )
    point = operating_point(run, "fedavg", ["ada"], "patient", 1.0)
    assert point.thresholds == (0.5,)
    assert point.sensitivity.value == 0.5
    assert point.specificity.value == pytest.approx(2 / 3)
    exact = stats.binomtest(1, 2).proportion_ci(method="exact")
    assert (point.sensitivity.low, point.sensitivity.high) == pytest.approx((exact.low, exact.high))
    alone = replace(run, arms={key: {"ada": predicted([0.1], [0])}})
    assert operating_point(alone, "fedavg", ["ada"], "patient", 1.0).sensitivity.value is None
    with pytest.raises(Undefined, match="no validation"):
        operating_point(replace(run, validation={}), "fedavg", ["ada"], "patient", 1.0)


def test_a_seeds_threshold_depends_on_no_other_seed(run: Any) -> None:
    both = operating_point(run, "fedavg", ["ada"], "patient", 0.9)
    for i, seed in enumerate((0, 1)):
        one = replace(run, arms={k: v for k, v in run.arms.items() if k[1] == seed})
        assert operating_point(one, "fedavg", ["ada"], "patient", 0.9).thresholds == (both.thresholds[i],)


def test_patients_of_several_seeds_count_once(run: Any) -> None:
    twice = dict.fromkeys(run.arms, run.arms["fedavg", 0])
    validation = dict.fromkeys(run.arms, run.validation["fedavg", 0])
    point = operating_point(replace(run, arms=twice, validation=validation), "fedavg", ["ada"], "patient", 0.9)
    hits = round((point.sensitivity.value or 0) * 20)
    exact = stats.binomtest(hits, 20).proportion_ci(method="exact")
    assert (point.sensitivity.low, point.sensitivity.high) == pytest.approx((exact.low, exact.high))
